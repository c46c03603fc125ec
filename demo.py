"""Terminal demo: what happens between a request and its tool call.

`python demo.py` asks three prepared requests, `python demo.py "text" --tools file.json` yours.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "date": {"type": "string", "description": "Date as said by the user"},
            },
            "required": ["city"],
        },
    },
}
MUSIC = {
    "type": "function",
    "function": {
        "name": "play_music",
        "description": "Play music in a room",
        "parameters": {
            "type": "object",
            "properties": {
                "artist": {"type": "string", "description": "Artist to play"},
                "room": {
                    "type": "string",
                    "enum": ["kitchen", "bedroom", "living room"],
                    "description": "Where to play",
                },
                "shuffle": {"type": "boolean", "description": "Whether to shuffle the songs"},
            },
            "required": ["artist"],
        },
    },
}
ALARM = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "description": "Set an alarm",
        "parameters": {
            "type": "object",
            "properties": {
                "time": {"type": "string", "description": "Time of the alarm"},
                "day": {"type": "string", "description": "Day of the alarm"},
                "repeat": {"type": "string", "enum": ["once", "daily", "weekly"]},
            },
            "required": ["time"],
        },
    },
}
REQUESTS = [
    ("a call", "Will it rain in Berlin tomorrow?", [WEATHER, MUSIC]),
    ("a call with optional and enum arguments", "wake me up at 7 am on monday", [WEATHER, ALARM]),
    ("a chat turn", "what can you do", [WEATHER, ALARM]),
]

_MASKED, _ABSENT = "▒", "∅"
_MOST_MASKS = 12


class Style:
    """Colours where the output is a terminal, nothing elsewhere."""

    def __init__(self, colours: bool) -> None:
        self.colours = colours

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colours else text

    def head(self, text: str) -> str:
        return self._paint("1", text)

    def fixed(self, text: str) -> str:
        return self._paint("2", text)

    def slot(self, text: str) -> str:
        return self._paint("36", text)

    def wrong(self, text: str) -> str:
        return self._paint("31", text)


def show_canvas(canvas: list[Any], style: Style) -> str:
    """One line: fixed text, slots with their tokens, masked positions as blocks, slots that hold nothing as `∅`."""
    parts = []
    for piece in canvas:
        if isinstance(piece, str):
            parts.append(style.fixed(piece.replace("\n", " ")))
            continue
        if piece.role != "value" and all(text is not None for text in piece.tokens):
            decided = "".join(text or "" for text in piece.tokens)
            parts.append(style.slot({"true": "+", "false": "-"}.get(decided, f"{decided}x " if decided else "")))
            continue
        masks = sum(text is None for text in piece.tokens)
        text = "".join(text or "" for text in piece.tokens) + _MASKED * min(masks, _MOST_MASKS)
        parts.append(style.slot(text or _ABSENT))
    return "".join(parts)


def first_canvas(canvas: list[Any]) -> list[Any]:
    """The canvas before the first step: every slot masked."""
    return [
        piece if isinstance(piece, str) else type(piece)(piece.path, piece.role, (None,) * len(piece.tokens))
        for piece in canvas
    ]


def show_trace(trace: list[Any], style: Style) -> None:
    """Print route, scaffold, denoising steps and checks in the order in which they happened."""
    step, call = 0, None
    for event in trace:
        data = event.data
        if event.kind == "route":
            why = "the request asks for a call" if data["forced"] else f"P(call) = {data['probability']:.3f}"
            print(f"  route     {data['mode']}  ({why})")
        elif event.kind == "draft":
            if data["call"] != call:
                call, step = data["call"], 0
                print(f"  scaffold  {show_canvas(first_canvas(data['canvas']), style)}")
            step += 1
            print(f"  step {step}    {show_canvas(data['canvas'], style)}")
        else:
            accepted = style.fixed(json.dumps(data["accepted"], ensure_ascii=False))
            print(f"  check     accepted {accepted}")
            if data["drafted"]:
                drafted, chosen = (json.dumps(data[name], ensure_ascii=False) for name in ("drafted", "chosen"))
                print(f"            replaced {style.wrong(drafted)} by {style.slot(chosen)}")


def ask(model: Any, tokenizer: Any, text: str, tools: list[Any], style: Style) -> None:
    """Answer one request and print how; the reference runs beside it for its count of forwards."""
    messages = [{"role": "user", "content": text}]
    # The head drafts all of it here, so that there are steps to be seen; by default the model looks values up first.
    reply = model.respond(
        messages, tools=tools, tokenizer=tokenizer, drafter="head", output_trace=True, max_new_tokens=40
    )
    show_trace(reply.trace, style)
    calls = reply.message.get("tool_calls")
    answer = json.dumps([item["function"] for item in calls], ensure_ascii=False) if calls else reply.message["content"]
    print(f"  {'call' if calls else 'answer'}{' ' * (6 if calls else 4)}{style.head(answer)}")
    cost = f"  cost      {reply.stats.base_forwards} base forwards, {reply.stats.head_forwards} of the head"
    if calls:
        reference = model.respond(messages, tools=tools, tokenizer=tokenizer, decoding="ar", max_new_tokens=40)
        same = "same tokens" if reference.token_ids == reply.token_ids else "other tokens"
        cost += f"; the autoregressive reference needs {reference.stats.base_forwards} ({same})"
    print(cost)
    for path in reply.stats.cut:
        print(f"  note      {path or 'the call'} reached the limit of its length and was ended there")


def read_tools(path: Path) -> list[Any]:
    """Tools of a JSON file: a list, or a single tool."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"The tools cannot be read: {error}.") from None
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is not JSON ({error}): give a list of OpenAI-style tools.") from None
    return tools if isinstance(tools, list) else [tools]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", help="your request; without it three prepared ones are asked")
    parser.add_argument("--tools", type=Path, help="JSON file with a list of tools; needs a text")
    parser.add_argument(
        "--model", default=str(ROOT), help="folder or repo of the model (default: the one shipped here)"
    )
    options = parser.parse_args()
    if options.tools and not options.text:
        parser.error('--tools needs a request: python demo.py "text" --tools file.json')
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    style = Style(sys.stdout.isatty())
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype=torch.float32).eval()
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"model with {size:.1f}M parameters loaded in {time.perf_counter() - start:.1f} s")
    requests = REQUESTS
    if options.text:
        requests = [("your request", options.text, read_tools(options.tools) if options.tools else [WEATHER, ALARM])]
    for title, text, tools in requests:
        print(f"\n{style.head(title)}: {text}")
        try:
            ask(model, tokenizer, text, tools, style)
        except ValueError as error:
            raise SystemExit(f"  refused   {error}") from None


if __name__ == "__main__":
    main()
