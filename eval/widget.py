"""The examples of the card's widget, answered by the model: `python -m eval.widget`.

Asks fixed requests of the model of this repository, as chats (messages and tools) and as the raw prompt that
`pipeline("text-generation")` takes, and writes eval/results/widget.json. `python -m eval.report` puts the examples into
the metadata of README.md and a table of them into docs/evaluation.md; a test asks them again.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from demo import ALARM, WEATHER
from eval.devices import device_name
from eval.held_out_tables import markdown
from eval.resumable import RESULTS, versions
from repo_package import ROOT

BOOKING = {
    "type": "function",
    "function": {
        "name": "book_table",
        "description": "Book a table at a restaurant",
        "parameters": {
            "type": "object",
            "properties": {
                "restaurant": {"type": "string", "description": "Name of the restaurant"},
                "people": {"type": "integer", "minimum": 1},
            },
            "required": ["restaurant", "people"],
        },
    },
}
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Example:
    """A request of the widget.

    Args:
        title: its name in the widget's list.
        text: what the user says.
        tools: those that are shown.
        raw: whether the example is the rendered prompt, in which the tools stand, instead of messages.
    """

    title: str
    text: str
    tools: Sequence[Mapping[str, Any]] = ()
    raw: bool = False


EXAMPLES = (
    Example("A call", "What is the weather in Lisbon?", [WEATHER]),
    Example("Two values", "book a table for 4 people at Olive Garden", [BOOKING]),
    Example("Optional arguments", "wake me up at 7 am on monday", [ALARM]),
    Example("Nothing to call", "what can you do", [WEATHER]),
    Example("A mistake: small talk taken for a request", "good morning", [WEATHER]),
    Example("The raw prompt", "What's the weather like in Paris?", [WEATHER], raw=True),
)


def answered(model: Any, tokenizer: Any, example: Example) -> dict[str, Any]:
    """An example as the card holds it, with what the model answers.

    Args:
        model: with its own generation config.
        tokenizer: its tokenizer.
        example: the request.

    Returns:
        `example_title`, `messages` and `tools` or `text`, and `output` with its `text`, without the end token.
    """
    messages = [{"role": "user", "content": example.text}]
    tools = [dict(tool) for tool in example.tools]
    if example.raw:
        prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        reply = generator(prompt, return_full_text=False, max_new_tokens=MAX_NEW_TOKENS)[0]["generated_text"]
        asked: dict[str, Any] = {"text": prompt}
    else:
        ids = model.respond(messages, tools=tools, tokenizer=tokenizer, max_new_tokens=MAX_NEW_TOKENS).token_ids
        reply, asked = tokenizer.decode(ids), {"messages": messages, "tools": tools}
    return {"example_title": example.title, **asked, "output": {"text": reply.removesuffix(tokenizer.eos_token)}}


def body(results: Mapping[str, Any]) -> list[str]:
    """The examples as a table.

    Args:
        results: contents of widget.json.
    """
    rows = [
        [
            one["example_title"],
            one["messages"][-1]["content"] if "messages" in one else "(the prompt as the model reads it)",
            ", ".join(f"`{tool['function']['name']}`" for tool in one.get("tools", [])),
            f"`{' '.join(one['output']['text'].split())}`",
        ]
        for one in results["examples"]
    ]
    return [
        "The examples of the widget in README.md's metadata, and what the model in this repository answers.",
        markdown(["example", "request", "tools", "answer"], rows),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.widget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT), help="folder or repo of the model")
    parser.add_argument("--out", type=Path, default=RESULTS / "widget.json", help="the result file")
    options = parser.parse_args(arguments)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        sys.exit(f"eval.widget: {error}")
    examples = [answered(model, tokenizer, example) for example in tqdm(EXAMPLES, "examples", unit="request")]
    typed = sys.argv[1:] if arguments is None else arguments
    report = {
        "command": shlex.join(["python", "-m", "eval.widget", *typed]),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": device_name(model.device),
        "dtype": "float32",
        "examples": examples,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(body(report)))


if __name__ == "__main__":
    main()
