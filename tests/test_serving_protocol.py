"""Request bodies are checked to the last field; tokens of replies become the same pieces in whatever portions."""

import json
from typing import Any

import pytest

from repo_package import load_repo_module
from tiny_tokenizer import tiny_tokenizer

pytest.importorskip("pydantic")

from serving.interface import Answer, ArgumentsDelta, CallStart, TextDelta
from serving.protocol import ApiError, Envelope, Limits, completion, read_request
from serving.reply_parser import ReplyParser

tokens = load_repo_module("tokenization_utils")
Vocabulary = load_repo_module("slot_grammar").Vocabulary

TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def read(**fields: Any) -> Any:
    model, request = read_request(json.dumps({**BODY, **fields}).encode(), Limits(max_tools=2, max_messages=4))
    assert model == "m"
    return request


# ---- Requests


def test_a_plain_request_is_greedy_and_leaves_the_rest_to_the_model() -> None:
    request = read()
    assert request.messages == [{"role": "user", "content": "hi"}]
    options = request.options
    assert (options.temperature, options.tool_choice, options.max_tokens, options.stop) == (0.0, "auto", None, ())
    assert options.decoding is options.drafter is options.enable_thinking is options.max_tool_calls is None
    assert not request.stream


def test_options_are_read() -> None:
    request = read(
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get"}},
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop="end",
        stream=True,
        stream_options={"include_usage": True},
        chat_template_kwargs={"enable_thinking": True},
        decoding="ar",
        drafter="lookup",
        stats=True,
        user="somebody",
    )
    options = request.options
    assert (options.tool_choice, options.tool_name, options.max_tool_calls) == ("required", "get", 1)
    assert (options.max_tokens, options.temperature, options.top_p, options.seed) == (7, 0.5, 0.9, 3)
    assert (options.stop, options.enable_thinking) == (("end",), True)
    assert (options.decoding, options.drafter) == ("ar", "lookup")
    assert request.stream
    assert request.include_usage
    assert request.stats
    assert read(parallel_tool_calls=False).options.max_tool_calls == 1


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 2}, "n", "several times"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "a tool with that schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "a tool with that schema"),
        ({"functions": [{}]}, "functions", "use tools"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "enable_thinking"),
        ({"tool_choice": "sometimes"}, "tool_choice", "required"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "one of them"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "1 to 64"),
        ({"beams": 3}, "beams", "leave it out"),
        ({"tools": [TOOL] * 3}, "tools", "more than 2"),
        ({"messages": [BODY["messages"][0]] * 5}, "messages", "more than 4"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages[0].content[0].type",
            "'text'",
        ),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id", "call"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "function"),
    ],
)
def test_what_is_wrong_or_not_supported_is_refused_by_name(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as error:
        read(**fields)
    assert error.value.status == 400
    assert (error.value.param or "").startswith(param)
    assert words in error.value.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"model": NaN}', b"\xff", b'{"model": "\\ud800"}', b"[" * 100_000]
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as error:
        read_request(body, Limits())
    assert error.value.status == 400


def test_results_of_tools_stand_in_the_order_of_their_calls() -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": f'{{"x":{place}}}'}}
        for place, name in enumerate(["a", "b"])
    ]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("b", "a")]
    history = [{"role": "assistant", "content": None, "tool_calls": calls, "refusal": None}, *results]
    messages = read(messages=[*BODY["messages"], *history]).messages
    assert [message["content"] for message in messages] == ["hi", "", "of a", "of b"]
    assert messages[1]["tool_calls"][1] == {"type": "function", "function": {"name": "b", "arguments": {"x": 1}}}


@pytest.mark.parametrize("arguments", ["[1]", "{", "NaN", '"x"'])
def test_arguments_of_the_history_are_objects(arguments: str) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "a", "arguments": arguments}}
    with pytest.raises(ApiError, match="not the JSON text of an object"):
        read(messages=[{"role": "assistant", "tool_calls": [call]}])


def test_a_reply_can_be_sent_back_as_it_came() -> None:
    answer = Answer("", "thought", [("get", '{"a": 1}')], "tool_calls", 1, 1, {})
    message = completion(Envelope("chatcmpl-1", 0, "m"), answer, stats=False)["choices"][0]["message"]
    assert read(messages=[message]).messages[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


# ---- Replies


def pieces(ids: list[int], portion: int, may_call: bool = True, stops: tuple[str, ...] = ()) -> tuple[Any, Any]:
    vocabulary = Vocabulary(tiny_tokenizer(), len(tiny_tokenizer()))
    parser, deltas = ReplyParser(vocabulary, may_call, stops), []
    for start in range(0, len(ids), portion):
        deltas += parser.feed(ids[start : start + portion])
    deltas += parser.finish()
    return deltas, parser.answer(True, 1, len(ids), {})


def encoded(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


CALLS = [("get_weather", {"city": 'Zür"ich 🙂', "tags": ["}", "a\n"], "in": {"x": {}}}), ("b", {})]


@pytest.mark.parametrize("portion", [1, 2, 3, 7, 1000])
def test_pieces_add_up_whatever_the_portions(portion: int) -> None:
    tokenizer = tiny_tokenizer()
    ids = encoded("<think>\n hm, hm \n</think>\n") + encoded("Let me see:  \n")
    ids += [*tokens.calls_token_ids(tokenizer, CALLS), tokenizer.eos_token_id]
    deltas, answer = pieces(ids, portion)
    texts = [delta for delta in deltas if isinstance(delta, TextDelta)]
    assert "".join(delta.text for delta in texts if delta.reasoning) == answer.reasoning == "hm, hm"
    assert "".join(delta.text for delta in texts if not delta.reasoning) == answer.content == "Let me see:"
    assert [delta.name for delta in deltas if isinstance(delta, CallStart)] == ["get_weather", "b"]
    for index, (name, arguments) in enumerate(CALLS):
        streamed = [delta.text for delta in deltas if isinstance(delta, ArgumentsDelta) and delta.index == index]
        assert "".join(streamed) == answer.calls[index][1] == json.dumps(arguments, ensure_ascii=False)
        assert answer.calls[index][0] == name
    assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize("portion", [1, 5, 1000])
def test_a_stop_ends_the_text_and_is_no_part_of_it(portion: int) -> None:
    deltas, answer = pieces(encoded("one two three two"), portion, stops=("ee", "two", "never"))
    assert "".join(delta.text for delta in deltas) == answer.content == "one"
    assert answer.finish_reason == "stop"


def test_what_only_begins_a_stop_is_written() -> None:
    assert pieces(encoded("a tw"), 1, stops=("two",))[1].content == "a tw"


def test_without_tools_the_markup_of_a_call_is_text() -> None:
    ids = tokens.calls_token_ids(tiny_tokenizer(), [("b", {})])
    deltas, answer = pieces(ids, 1, may_call=False)
    assert answer.calls == []
    assert answer.content.startswith("<tool_call>")
    assert "".join(delta.text for delta in deltas) == answer.content
