"""The model in the official BFCL runner: tools, the handler's methods, registration, and the command.

The official `BaseHandler` is used where `bfcl-eval` and all that it needs are installed; else one of the same form.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import bfcl_handler
from eval.bfcl_handler import Answered, Caller, as_tools
from repo_package import ROOT, load_repo_module

scaffolds = load_repo_module("schema_scaffold")

WEATHER = {
    "name": "weather.get",
    "description": "Weather of a city.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string", "description": "The city"},
            "days": {"type": "integer"},
            "limits": {"type": "tuple", "items": {"type": "float"}},
            "extra": {"type": "any"},
            "type": {"type": "ArrayList", "items": {"type": "any"}},
        },
        "required": ["city"],
    },
}


def test_tools_have_types_of_json_schema_and_keep_all_else() -> None:
    (tool,) = as_tools([WEATHER])
    assert tool["type"] == "function"
    function = tool["function"]
    assert (function["name"], function["description"]) == ("weather.get", "Weather of a city.")
    properties = function["parameters"]["properties"]
    assert function["parameters"]["type"] == "object"
    assert properties["city"] == {"type": "string", "description": "The city"}
    assert properties["limits"]["type"] == "array"
    assert properties["limits"]["items"]["type"] == "number"
    assert properties["extra"]["type"] == "string"
    assert properties["type"]["items"]["type"] == "string"
    assert WEATHER["parameters"]["properties"]["extra"] == {"type": "any"}  # type: ignore[index]
    scaffolds.compile_scaffold(tool)


# --------------------------------------------------------------- a runner that is not the official one

BASE_HANDLER = """
class BaseHandler:
    def __init__(self, model_name, temperature, registry_name, is_fc_model, **kwargs):
        self.model_name, self.registry_name, self.is_fc_model = model_name, registry_name, is_fc_model

    def inference(self, test_entry, include_input_log, exclude_state_log):
        data = self._compile_tools(self._pre_query_processing_FC({}, test_entry), test_entry)
        response, latency = self._query_FC(self.add_first_turn_message_FC(data, test_entry["question"][0]))
        parsed = self._parse_query_response_FC(response)
        counts = {"input_token_count": parsed["input_token"], "output_token_count": parsed["output_token"]}
        return parsed["model_responses"], counts | {"latency": latency}
"""
MODEL_CONFIG = """
from dataclasses import dataclass
from typing import Any

MODEL_CONFIG_MAPPING = {}


@dataclass
class ModelConfig:
    model_name: str
    display_name: str
    url: str
    org: str
    license: str
    model_handler: Any
    is_fc_model: bool = True
    underscore_to_dot: bool = False
"""
CLI = """
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING

def cli(arguments):
    print(arguments, sorted(MODEL_CONFIG_MAPPING))
"""


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bfcl_eval"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the official names on the path."""
    for name, text in {
        "__init__": "",
        "__main__": CLI,
        "constants/__init__": "",
        "constants/model_config": MODEL_CONFIG,
        "model_handler/__init__": "",
        "model_handler/base_handler": BASE_HANDLER,
    }.items():
        file = tmp_path / "bfcl_eval" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    replaced = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "bfcl_eval"}
    for name in replaced:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    forget()


@pytest.fixture
def official() -> None:
    """The official runner, or a skip."""
    for name in ("bfcl_eval.constants.model_config", "bfcl_eval.model_handler.base_handler"):
        pytest.importorskip(name, reason="bfcl-eval with all that it needs is not installed", exc_type=ImportError)


# --------------------------------------------------------------- the handler


class Parrot:
    """Stands for a model that calls for Oslo, or says hello where there are no tools."""

    def ask(self, messages: Any, tools: Any, decoding: str, text_tokens: int) -> Answered:
        calls = [{"name": tools[0]["function"]["name"], "arguments": {"city": "Oslo", "days": 3}}] if tools else []
        return Answered(calls, "" if calls else "Hello.", 7, 2, 4, 0, 0.25)

    def prompt_tokens(self, messages: Any, tools: Any) -> int:
        return 100


ENTRY = {
    "id": "simple_python_0",
    "question": [[{"role": "user", "content": "Weather in Oslo for three days?"}]],
    "function": [WEATHER],
}


def check_handler() -> None:
    """A registered handler through the runner's own way of asking it."""
    from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING

    name = bfcl_handler.register(Parrot, "owner/parrot", "verified")  # type: ignore[arg-type]
    assert "_" not in name
    config = MODEL_CONFIG_MAPPING[name]
    assert config.url == "owner/parrot"
    assert config.is_fc_model
    assert not config.underscore_to_dot
    handler = config.model_handler(
        model_name=config.model_name, temperature=0.001, registry_name=name, is_fc_model=config.is_fc_model
    )
    result, counts = handler.inference(json.loads(json.dumps(ENTRY)), False, False)
    assert json.loads(json.dumps(result)) == [{"weather.get": {"city": "Oslo", "days": 3}}]
    assert (counts["input_token_count"], counts["output_token_count"], counts["latency"]) == (100, 7, 0.25)
    assert handler.decode_ast(result, None, False) == [{"weather.get": {"city": "Oslo", "days": 3}}]
    assert handler.decode_execute(result, False) == ["weather.get(city='Oslo', days=3)"]
    text, _ = handler.inference(json.loads(json.dumps(ENTRY | {"function": []})), False, False)
    assert text == "Hello."
    with pytest.raises(ValueError, match="calls nothing"):
        handler.decode_ast(text, None, False)


@pytest.mark.usefixtures("stand_in")
def test_the_runner_can_ask_the_registered_model() -> None:
    check_handler()


@pytest.mark.usefixtures("official")
def test_the_official_runner_can_ask_the_registered_model() -> None:
    check_handler()


@pytest.mark.usefixtures("stand_in")
def test_further_turns_hold_calls_and_their_results() -> None:
    handler = bfcl_handler.handler_class(Parrot, "ar")("m", 0, "m", True)  # type: ignore[arg-type]
    data = handler.add_first_turn_message_FC({"message": []}, ENTRY["question"][0])
    data = handler._add_assistant_message_FC(data, {"model_responses": [{"weather.get": {"city": "Oslo"}}]})
    data = handler._add_execution_results_FC(data, ["rain"], {})
    data = handler._add_assistant_message_FC(data, {"model_responses": "It rains."})
    data = handler._add_next_turn_user_message_FC(data, [{"role": "user", "content": "And now?"}])
    called, told, said, asked = data["message"][1:]
    assert called["tool_calls"] == [
        {"type": "function", "function": {"name": "weather.get", "arguments": {"city": "Oslo"}}}
    ]
    assert (told, said["content"], asked["role"]) == ({"role": "tool", "content": "rain"}, "It rains.", "user")


@pytest.mark.usefixtures("stand_in")
def test_a_model_is_loaded_when_it_is_first_asked() -> None:
    def unloaded() -> Any:
        raise AssertionError("loaded too early")

    bfcl_handler.handler_class(unloaded, "ar")("m", 0, "m", True)


# --------------------------------------------------------------- the command


@pytest.mark.usefixtures("stand_in")
def test_options_of_the_official_command_are_passed_on_and_all_decodings_are_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bfcl_handler.main(["evaluate", "--test-category", "multiple", "--decoding", "ar", "--partial-eval"])
    given = ["evaluate", "--model", "smollm-diffusion-ar-FC", "--test-category", "multiple", "--partial-eval"]
    known = [f"smollm-diffusion-{decoding}-FC" for decoding in ("ar", "diffusion", "verified")]
    assert capsys.readouterr().out == f"{given} {known}\n"


def test_a_missing_runner_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bfcl_eval", None)
    monkeypatch.setitem(sys.modules, "bfcl_eval.constants.model_config", None)
    with pytest.raises(SystemExit, match=r"pip install bfcl-eval soundfile"):
        bfcl_handler.main(["generate"])
    with pytest.raises(SystemExit, match="2"):
        bfcl_handler.main(["compare"])


# --------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def caller() -> Caller:
    torch.set_num_threads(1)
    return Caller(str(ROOT))


def test_verified_makes_the_calls_of_ar_and_as_many_as_are_wanted(caller: Caller) -> None:
    tools = as_tools([WEATHER | {"parameters": {"type": "dict", "properties": {"city": {"type": "string"}}}}])
    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    verified, ar = (caller.ask(messages, tools, decoding, 1) for decoding in ("verified", "ar"))
    assert verified.calls == ar.calls
    assert verified.tokens == ar.tokens
    assert all(found["name"] == "weather.get" for found in verified.calls)
    assert ar.head_forwards == 0
    assert verified.seconds > 0


def test_prompt_tokens_are_those_of_the_template(caller: Caller) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    bare, with_tools = (caller.prompt_tokens(messages, tools) for tools in ([], as_tools([WEATHER])))
    text = caller.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert bare == len(caller.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert with_tools > bare
    assert caller.ask(messages, [], "verified", 3).tokens <= 3
