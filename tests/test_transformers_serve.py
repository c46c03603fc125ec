"""`transformers serve` with the model as it is, by the official `openai` client: what works, and what it cannot do.

What it cannot do is pinned too, so that a version that can is noticed; serve.py is there for the rest.
"""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from transformers.utils.import_utils import is_serve_available

from repo_package import ROOT
from test_generation import shared_model

openai = pytest.importorskip("openai")
if not is_serve_available():
    pytest.skip("transformers[serving] is not installed", allow_module_level=True)

import openai_cases  # noqa: E402 (it imports openai)
from openai_cases import PARIS, PIZZA, TIMER, TWO_PIZZAS, WEATHER, ask, calls_of, gather  # noqa: E402

MODEL = str(ROOT)


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        client: of `openai`, without retries.
        log: what the server prints.
    """

    client: Any
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", MODEL, "--trust-remote-code"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_until_healthy(process, port, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        yield Server(client, log)
        client.close()
    finally:
        process.terminate()
        process.wait(timeout=20)


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait for the health endpoint; says why where the server ends instead."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                assert answer.status == 200
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    raise TimeoutError(log.read_text()[-3000:])


def fresh(server: Server) -> Any:
    """A client with a connection of its own, since the server closes one that it answered with status 500."""
    return server.client.with_options(http_client=openai.DefaultHttpxClient())


def wait_for_log(server: Server, text: str) -> None:
    """Wait until the log has it, which is written beside the answer."""
    end = time.monotonic() + 10
    while text not in server.log.read_text():
        assert time.monotonic() < end, server.log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize("case", openai_cases.SHARED, ids=lambda case: case.__name__)
def test_shared_behaviours(server: Server, case: openai_cases.Case) -> None:
    case(server.client, MODEL)


# ---- Our options, by the generation config that a request may bring


def with_options(**options: Any) -> dict[str, Any]:
    """The one field by which `transformers serve` lets options through; it replaces the model's own defaults."""
    return {"generation_config": json.dumps({"max_new_tokens": 64, **options})}


def test_our_options_go_by_the_generation_config_of_a_request(server: Server) -> None:
    for choice, names in (
        ("required", {"get_weather", "set_timer"}),
        ({"type": "function", "function": {"name": "set_timer"}}, {"set_timer"}),
    ):
        body = with_options(tool_choice=choice, max_tool_calls=1)
        message = ask(server.client, MODEL, "hello", tools=[WEATHER, TIMER], extra_body=body).choices[0].message
        ((name, _),) = calls_of(message)
        assert name in names
    body = with_options(tool_choice="none", max_new_tokens=8)
    assert not calls_of(ask(server.client, MODEL, tools=[WEATHER], extra_body=body).choices[0].message)
    body = with_options(max_tool_calls=1, decoding="ar")
    message = ask(server.client, MODEL, TWO_PIZZAS, tools=[PIZZA], extra_body=body).choices[0].message
    assert len(calls_of(message)) == 1


def test_stop_texts_end_a_text(server: Server) -> None:
    """With tools and without; the stop text itself stays, which is how transformers has it."""
    for options in ({"content": "hello"}, {"content": "thanks a lot", "tools": [WEATHER]}):
        whole = ask(server.client, MODEL, max_tokens=12, **options).choices[0].message.content
        stop = whole.split()[2]
        cut = ask(server.client, MODEL, max_tokens=12, stop=[stop], **options).choices[0].message.content
        assert cut.rstrip().endswith(stop)
        assert whole.startswith(cut.strip())
        assert len(cut) < len(whole)


def test_the_log_tells_no_prompt(server: Server) -> None:
    ask(server.client, MODEL, "the secret word is xylophone", max_tokens=2)
    ask(server.client, MODEL, "the secret word is xylophone", tools=[WEATHER], max_tokens=2)
    assert "xylophone" not in server.log.read_text()


def test_the_documented_code_prints_what_it_says(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "transformers_serve.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    (printed,) = re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    here = code.replace("http://localhost:8000/v1", str(server.client.base_url)).replace(
        'model="."', f"model={MODEL!r}"
    )
    exec(here, {})
    assert capsys.readouterr().out == printed + "get_weather\n"


# ---- What it cannot do


@pytest.mark.parametrize("choice", ["none", {"type": "function", "function": {"name": "set_timer"}}])
def test_tool_choice_is_ignored_with_a_line_in_the_log(server: Server, choice: Any) -> None:
    message = ask(server.client, MODEL, tools=[WEATHER, TIMER], tool_choice=choice).choices[0].message
    assert calls_of(message) == [("get_weather", {"city": "Paris"})]
    wait_for_log(server, "tool_choice")


def test_parallel_tool_calls_and_stream_options_are_ignored(server: Server) -> None:
    reply = ask(server.client, MODEL, TWO_PIZZAS, tools=[PIZZA], parallel_tool_calls=False)
    assert len(calls_of(reply.choices[0].message)) == 2
    streamed = gather(ask(server.client, MODEL, "hello", max_tokens=4, stream=True))
    assert [choices for choices, _ in streamed.usages] == [1]  # told always, and beside a choice


def test_faulty_tools_and_prompts_are_errors_without_a_reason(server: Server) -> None:
    """Status 500; the reason stands in the log, and in the body of the error where the request streams."""
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "anyOf": []}}}
    for content, tools, reason in ((PARIS, [broken], "anyOf"), ("word " * 4200, [WEATHER], "model's context")):
        with pytest.raises(openai.InternalServerError) as error:
            ask(fresh(server), MODEL, content, tools=tools)
        openai_cases.check_readable(error.value)
        wait_for_log(server, reason)
        with pytest.raises(openai.APIError) as told:
            gather(ask(fresh(server), MODEL, content, tools=tools, stream=True))
        openai_cases.check_readable(told.value, reason)
    openai_cases.case_a_request_becomes_a_call(fresh(server), MODEL)


def test_continuous_batching_is_not_offered() -> None:
    """It bypasses `generate`; the server then goes on with one request after the other."""
    serving = importlib.import_module("transformers.cli.serving.utils")
    state = serving.GenerationState(continuous_batching=True)
    assert not state.use_continuous_batching(shared_model(), serving.Modality.LLM)


def test_without_tools_a_quoted_call_is_taken_for_one(server: Server) -> None:
    """It reads calls out of the text, and without tools the text is the base's own, whatever it quotes."""
    reply = ask(server.client, MODEL, openai_cases.INJECTION, max_tokens=60)
    assert calls_of(reply.choices[0].message) == [("evil", {})]


def test_our_options_beside_the_openai_ones_are_refused(server: Server) -> None:
    with pytest.raises(openai.UnprocessableEntityError):
        ask(server.client, MODEL, extra_body={"decoding": "ar"})
