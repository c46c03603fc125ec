"""This model in the official runner of the Berkeley Function Calling Leaderboard, and how it is asked for calls.

In an environment of its own, since `bfcl-eval` pins an old numpy (and needs soundfile, which it does not ask for):

    pip install bfcl-eval soundfile "transformers>=5.17"
    python -m eval.bfcl_handler generate --decoding verified --test-category simple_python
    python -m eval.bfcl_handler evaluate --decoding verified --test-category simple_python

`generate` and `evaluate` are those of the official `bfcl` and take its options; `--model`, `--decoding`, `--device` and
`--dtype` are ours. The model is put into the table of models at run time. `Caller` and this module need no `bfcl-eval`.
docs/bfcl.md has a run from beginning to end, and how its scores compare with those of `python -m eval.bfcl`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_package import ROOT, load_repo_module

dialects = load_repo_module("schema_dialects")
generation = load_repo_module("generation_smollm_diffusion")

TEXT_TOKENS = 512
"""Most tokens of a text reply in the official runner."""

MISSING = """The official runner is missing. It pins old versions of numpy and others: make an environment of its own,
    python -m venv bfcl-env && bfcl-env/bin/pip install bfcl-eval soundfile "transformers>=5.17"
and run this command there: bfcl-env/bin/python -m eval.bfcl_handler ...
The checker alone, without the runner, is what `python -m eval.bfcl` uses."""


# ---------------------------------------------------------------------------------------------------------------------
# Asking the model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """What one decoding made of a request.

    Args:
        calls: `{"name", "arguments"}` each.
        text: of a reply that does not call.
        tokens: number of tokens of the reply.
        base_forwards, head_forwards: what it took.
        cut: number of values that reached their limit of length and were ended there.
        seconds: wall time from messages to calls.
    """

    calls: list[dict[str, Any]]
    text: str
    tokens: int
    base_forwards: int
    head_forwards: int
    cut: int
    seconds: float


class Caller:
    """A model that is asked for the calls of BFCL's requests, greedily and with `tool_choice="auto"`.

    Args:
        path: folder or repo of the model.
        device: where it runs.
        dtype: name of a torch dtype.
    """

    def __init__(self, path: str, device: str = "cpu", dtype: str = "float32") -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()

    def ask(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], decoding: str, text_tokens: int
    ) -> Answered:
        """Answer one request; as many calls as the model's generation config allows.

        Args:
            messages: the conversation.
            tools: of `as_tools`.
            decoding: as in `generate`.
            text_tokens: most tokens of a reply that does not call.

        Raises:
            ValueError: the prompt is too long, or a schema cannot be guaranteed.
        """
        start = time.perf_counter()
        reply = self.model.respond(
            list(messages),
            tools=list(tools),
            tokenizer=self.tokenizer,
            decoding=decoding,
            do_sample=False,
            max_new_tokens=text_tokens,
        )
        seconds = time.perf_counter() - start
        return Answered(
            [call["function"] for call in reply.message.get("tool_calls", [])],
            reply.message["content"],
            len(reply.token_ids),
            reply.stats.base_forwards,
            reply.stats.head_forwards,
            len(reply.stats.cut),
            seconds,
        )

    def prompt_tokens(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> int:
        """Number of tokens of the prompt."""
        ids = self.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, add_generation_prompt=True, return_dict=False
        )
        return len(ids)


def as_tools(functions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """BFCL's functions as tools, with the type names of JSON Schema in place of those of Python, Java or JavaScript.

    Args:
        functions: `{"name", "description", "parameters"}` each.

    Raises:
        ValueError: a schema cannot be guaranteed.
    """
    tools = []
    for function in functions:
        schema = dialects.normalise_schema(_any_is_string(function.get("parameters")), function["name"])[0]
        tools.append({"type": "function", "function": function | {"parameters": schema}})
    return tools


def _any_is_string(schema: Any) -> Any:
    """A schema whose `any` is a string, as BFCL means it: an expression in the words of its language."""
    if isinstance(schema, list):
        return [_any_is_string(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: _any_is_string(value) for name, value in schema.items()}
    return inner | {"type": "string"} if inner.get("type") == "any" else inner


# ---------------------------------------------------------------------------------------------------------------------
# The official runner
# ---------------------------------------------------------------------------------------------------------------------


def handler_class(caller: Callable[[], Caller], decoding: str) -> type[Any]:
    """The handler that the official runner asks.

    Args:
        caller: gives the model; asked only when a reply is generated, since `evaluate` makes handlers too.
        decoding: as in `generate`.

    Returns:
        A subclass of the official `BaseHandler`.

    Raises:
        ImportError: the official runner, or something that it needs, is not installed.
    """
    from bfcl_eval.model_handler.base_handler import BaseHandler

    class SmolLMDiffusionHandler(BaseHandler):
        """Function calling with one decoding; single turn and several turns."""

        def _pre_query_processing_FC(self, inference_data: dict[str, Any], test_entry: Any) -> dict[str, Any]:
            return inference_data | {"message": []}

        def _compile_tools(self, inference_data: dict[str, Any], test_entry: dict[str, Any]) -> dict[str, Any]:
            return inference_data | {"tools": as_tools(test_entry["function"])}

        def add_first_turn_message_FC(self, inference_data: dict[str, Any], messages: Any) -> dict[str, Any]:
            inference_data["message"].extend(messages)
            return inference_data

        def _add_next_turn_user_message_FC(self, inference_data: dict[str, Any], messages: Any) -> dict[str, Any]:
            inference_data["message"].extend(messages)
            return inference_data

        def _query_FC(self, inference_data: dict[str, Any]) -> tuple[tuple[Answered, int], float]:
            messages, tools = inference_data["message"], inference_data["tools"]
            inference_data["inference_input_log"] = {"message": repr(messages), "tools": tools}
            answered = caller().ask(messages, tools, decoding, TEXT_TOKENS)
            return (answered, caller().prompt_tokens(messages, tools)), answered.seconds

        def _parse_query_response_FC(self, api_response: tuple[Answered, int]) -> dict[str, Any]:
            answered, prompt_tokens = api_response
            return {
                "model_responses": [{call["name"]: call["arguments"]} for call in answered.calls] or answered.text,
                "input_token": prompt_tokens,
                "output_token": answered.tokens,
            }

        def _add_assistant_message_FC(
            self, inference_data: dict[str, Any], model_response_data: dict[str, Any]
        ) -> dict[str, Any]:
            made = model_response_data["model_responses"]
            if isinstance(made, str):
                message: dict[str, Any] = {"role": "assistant", "content": made}
            else:
                calls = [{"name": name, "arguments": arguments} for call in made for name, arguments in call.items()]
                message = {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": call} for call in calls],
                }
            inference_data["message"].append(message)
            return inference_data

        def _add_execution_results_FC(
            self, inference_data: dict[str, Any], execution_results: list[str], model_response_data: Any
        ) -> dict[str, Any]:
            inference_data["message"].extend({"role": "tool", "content": result} for result in execution_results)
            return inference_data

        def decode_ast(self, result: Any, language: Any, has_tool_call_tag: bool) -> list[dict[str, Any]]:
            return _calls_in(result)

        def decode_execute(self, result: Any, has_tool_call_tag: bool) -> list[str]:
            return [
                f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
                for call in _calls_in(result)
                for name, arguments in call.items()
            ]

    return SmolLMDiffusionHandler


def _calls_in(result: Any) -> list[dict[str, Any]]:
    """The calls of a result; the runner takes an exception as the sign that there are none."""
    if isinstance(result, str):
        raise ValueError("The reply is text and calls nothing.")
    return list(result)


def model_name(decoding: str) -> str:
    """The name in the official table of models; without a low line, since the runner turns those into slashes."""
    return f"smollm-diffusion-{decoding}-FC"


def register(caller: Callable[[], Caller], model: str, decoding: str) -> str:
    """Put the model into the official table of models.

    Args:
        caller: gives the model.
        model: where it is from; the table's link.
        decoding: as in `generate`.

    Returns:
        Its name there.

    Raises:
        ImportError: the official runner, or something that it needs, is not installed.
    """
    from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig

    name = model_name(decoding)
    MODEL_CONFIG_MAPPING[name] = ModelConfig(
        model_name=name,
        display_name=f"SmolLM diffusion, {decoding} (FC)",
        url=model,
        org="",
        license="apache-2.0",
        model_handler=handler_class(caller, decoding),
        is_fc_model=True,
        underscore_to_dot=False,
    )
    return name


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.bfcl_handler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the other options are the official command's
    )
    parser.add_argument("command", choices=["generate", "evaluate"])
    parser.add_argument("--model", default=str(ROOT), help="folder or repo of the model")
    parser.add_argument("--decoding", default="verified", choices=generation.DECODINGS)
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options, official = parser.parse_known_args(arguments)
    try:
        caller = cache(partial(Caller, options.model, options.device, options.dtype))
        # All of them, since `evaluate` reads every score in its folder and fails at a name that is not in the table.
        names = {decoding: register(caller, options.model, decoding) for decoding in generation.DECODINGS}
        from bfcl_eval.__main__ import cli
    except ImportError as error:
        raise SystemExit(f"{error}\n{MISSING}") from error
    cli([options.command, "--model", names[options.decoding], *official])


if __name__ == "__main__":
    main()
