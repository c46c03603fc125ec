"""Whatever a client sends to serve.py ends in an answer or in a readable error: no 500, no hang, nothing of the inside.

The application runs in this process, in front of a tiny random model: as in serve.py, without Ray.
"""

import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import schemas
from test_generation import WEATHER, shared_model
from tiny_tokenizer import tiny_tokenizer

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
testclient = pytest.importorskip("starlette.testclient")

from serving.app import Settings, create_app  # noqa: E402 (they import what may be missing)
from serving.engine import ModelEngine  # noqa: E402
from serving.protocol import Limits  # noqa: E402

PATH, MODEL = "/v1/chat/completions", "tiny"
LIMITS = Limits(max_body_bytes=200_000, max_messages=20, max_tools=8)
SECONDS = 60
"""After which a request is taken for one that hangs."""
FUZZ = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
BODY: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "weather in Paris"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"},
        {"role": "user", "content": "and tomorrow?"},
    ],
    "tools": [WEATHER, schemas.tool({"type": "object", "properties": {"a": {"type": "integer"}}}, "other")],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "max_tokens": 3,
    "temperature": 0.0,
    "stop": ["end"],
    "chat_template_kwargs": {"enable_thinking": False},
}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    engine = ModelEngine(shared_model(), tiny_tokenizer(), max_batch_size=4, batch_wait_ms=0)
    app = create_app(engine, Settings(MODEL, LIMITS, request_timeout_s=SECONDS))
    with testclient.TestClient(app, raise_server_exceptions=False) as client:
        yield client
    engine.close()


def check(answer: Any, statuses: tuple[int, ...] = (200, 400, 404, 413, 415)) -> None:
    """An answer, or an error in the API's form that shows nothing of the inside."""
    assert answer.status_code in statuses, (answer.status_code, answer.text[:500])
    for inner in ("Traceback", 'File "', ".py", "site-packages", "object at 0x", "internal_error"):
        assert inner not in answer.text
    if answer.status_code != 200:
        assert set(answer.json()) == {"error"}
        assert answer.json()["error"]["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        assert all("choices" in json.loads(event) for event in events[:-1])
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")


def post(client: Any, body: bytes | Iterator[bytes], kind: str | None = "application/json") -> Any:
    """Send a body; fails where the answer takes too long."""
    started = time.monotonic()
    answer = client.post(PATH, content=body, headers={} if kind is None else {"content-type": kind})
    assert time.monotonic() - started < SECONDS
    return answer


def alive(client: Any) -> None:
    """The server still answers an ordinary request."""
    answer = post(client, json.dumps(BODY).encode())
    assert answer.status_code == 200, answer.text
    check(answer)


# ---- Bodies near a good one

DEEP, DIGITS = "@deep@", "@digits@"
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), "", " ", "x" * 5000, "\ud800", "a\udfffb", "\0", "\ufdd0", "\ufdd01", "🙂" * 50),
    *("<|im_end|>\n<|im_start|>system\n", "</tools>", "<tool_call>", "auto", "required", "none", "user", "tool"),
    *([], {}, [[]], [None], [{}], {"": None}, {"a": {}}, {"type": "text"}, {"type": "image_url"}, ["x"] * 40),
    *(DEEP, DIGITS, CALL, [CALL] * 3, WEATHER, [WEATHER] * 9, {"role": "user", "content": "hi"}),
    {"type": "function", "function": {"name": "get_weather"}},
]
ENUMS: list[Any] = [[], [[]], [None, {}, "x", 1.5], ["x"] * 2, list(range(3000)), "abc"]
SCHEMAS: list[Any] = [
    *({"type": "string", "pattern": text} for text in ("(a+)+$", "((((", "(?<=a)b", "a{1,100000}", "\\p{L}+", "^")),
    *({"type": "string", "format": name} for name in ("date-time", "uuid", "regex", "no-such")),
    *({"type": "array", "items": {"type": "integer"}, "minItems": number} for number in (-1, 3, 10**9)),
    *({"type": "string", "minLength": low, "maxLength": high} for low, high in ((5, 2), (10**9, 10**9), (-1, 3))),
    *({"type": kind} for kind in ("strnig", None, [], ["string", "null"], ["array", 3])),
    *({"enum": values} for values in ENUMS),
    *({key: []} for key in ("anyOf", "oneOf", "allOf", "required", "properties", "items", "enum")),
    *({"$ref": ref} for ref in ("#", "#/properties/city", "#/nowhere", "https://example.com/s.json", 7)),
    {"type": "number", "minimum": 5, "maximum": 1},
    {"type": "integer", "multipleOf": 0},
    {"not": {}},
    {"if": {}, "then": {"minimum": 1}},
    {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(200)}, "required": ["p199"]},
    {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 4},
    {"const": {"a": "\ud800"}},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
]  # fmt: skip
KEYS = ["", "x", "n", "stream", "logprobs", "role", "content", "\ud800", "type", "$ref", "enum", "additionalProperties"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value but the value itself."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A good body with one to three faults, as bytes."""
    body = copy.deepcopy(BODY)
    body["stream"] = draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(body))
        path = draw(st.sampled_from(paths)) if paths else ()
        holder = body
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "schema", "add", "drop", "nest"]))
        if how == "schema":
            schema = copy.deepcopy(draw(st.sampled_from(SCHEMAS)))
            body["tools"] = [
                schemas.tool({"type": "object", "properties": {"city": schema}, "required": ["city"]}, "f")
            ]
            body["tool_choice"] = draw(st.sampled_from(["auto", "required"]))
        elif not path:
            continue
        elif how == "replace":
            holder[path[-1]] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif how == "add" and isinstance(holder[path[-1]], dict):
            holder[path[-1]][draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif how == "drop":
            del holder[path[-1]]
        else:
            holder[path[-1]] = [holder[path[-1]]]
    # Texts outside of UTF-8 can only be written as escapes.
    text = json.dumps(body)
    text = text.replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).replace(f'"{DIGITS}"', "9" * 20_000)
    if draw(st.integers(0, 9)) == 0:
        text = f'{{"model": 1, "max_tokens": -1, {text[1:]}'  # keys twice
    return text.encode()


@FUZZ
@given(bodies())
def test_bodies_near_a_good_one(client: Any, body: bytes) -> None:
    check(post(client, body))


def test_the_server_still_answers(client: Any) -> None:
    """Behind all that."""
    alive(client)


# ---- Bodies that are none

NO_JSON = [
    *(b"", b" ", b"null", b"true", b"0", b'""', b"[]", b"{", b"{}", b"}", b"\0", b"\xff\xfe{}", b"\xef\xbb\xbf{}"),
    *(b"NaN", b"Infinity", b"{'model': 1}", b'{"model": "\xed\xa0\x80"}', b"[" * 90_000, b'{"a":' * 30_000),
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\xc3("}]}',
    b'{"model": "tiny", "messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    json.dumps(BODY).encode("utf-16"),
    json.dumps(BODY).encode()[:-2],
    json.dumps(BODY).encode() + b"{}",
]


@pytest.mark.parametrize("body", NO_JSON, ids=lambda body: repr(body[:14]))
def test_bodies_that_are_no_request(client: Any, body: bytes) -> None:
    check(post(client, body), (400,))


@FUZZ
@given(st.binary(max_size=60))
def test_bytes(client: Any, body: bytes) -> None:
    check(post(client, body), (400,))


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_are_too_large(client: Any, chunked: bool) -> None:
    body = json.dumps({**BODY, "messages": [{"role": "user", "content": "x" * LIMITS.max_body_bytes}]}).encode()
    pieces = (body[start : start + 4096] for start in range(0, len(body), 4096))
    check(post(client, pieces if chunked else body), (413,))


def test_the_largest_body_that_fits(client: Any) -> None:
    """It holds far more than the context."""
    rest = LIMITS.max_body_bytes - len(json.dumps(BODY)) - 200
    body = {**BODY, "messages": [{"role": "user", "content": "x" * rest}]}
    check(post(client, json.dumps(body).encode()), (400,))


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "🙂"]
)
def test_other_kinds_of_content(client: Any, kind: str | None) -> None:
    header = kind.encode() if kind is not None else None
    answer = client.post(PATH, content=json.dumps(BODY), headers={} if header is None else {b"content-type": header})
    check(answer, (400, 415))


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_and_paths(client: Any, method: str) -> None:
    check(client.request(method, PATH), (404, 405))
    check(client.request(method, "/v1/completions"), (404, 405))
    check(client.request(method, "/v1/%2e%2e/%00"), (404, 405))


def test_the_server_answers_behind_all_of_it(client: Any) -> None:
    alive(client)
    assert client.get("/health").status_code == 200
    assert 'status="500"' not in client.get("/metrics").text


# ---- By the OpenAPI description


def test_requests_made_from_the_description(client: Any) -> None:
    """schemathesis reads /openapi.json and makes bodies that fit it, and bodies that do not."""
    schemathesis = pytest.importorskip("schemathesis")
    operation = schemathesis.openapi.from_dict(client.get("/openapi.json").json())[PATH]["POST"]

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy())
    def send(case: Any) -> None:
        body = case.body if isinstance(case.body, dict) else {"model": case.body}
        # Few of its names would be the model's.
        check(post(client, json.dumps({**body, "model": MODEL, "max_tokens": 2}).encode()))

    send()
    alive(client)
