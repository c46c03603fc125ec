"""serve.py: the API seen through the official client, batches, limits, time, shutdown, and replicas on Ray.

Most tests run the application in this process, in front of the engine of one replica or of a stand-in; only what is
about Ray starts the command.
"""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from repo_package import ROOT
from test_generation import CLOSED, TIME, WEATHER, shared_model
from tiny_tokenizer import tiny_tokenizer

for package in ("fastapi", "uvicorn", "openai", "prometheus_client"):
    pytest.importorskip(package)

import openai  # noqa: E402 (they may be missing)
import uvicorn  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

import openai_cases  # noqa: E402
import schemas  # noqa: E402
import serve  # noqa: E402
from serving.app import Settings, create_app  # noqa: E402
from serving.engine import ModelEngine, module_beside  # noqa: E402
from serving.interface import Answer, ChatRequest, Event, Options, Refusal, ReplicaLostError, TextDelta  # noqa: E402
from serving.protocol import Limits  # noqa: E402

MODEL = "smollm-diffusion"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "the secret word is xyzzy"}]}
ANSWER = Answer("fine", "", [], "stop", 3, 2, {"base_forwards": 2, "head_forwards": 1, "batch_size": 1})


# ---- The official client


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    """A client of the application in front of the shipped model, over a real connection."""
    from serving.replicas import ReplicaSettings, load_engine

    engine = load_engine(ReplicaSettings(str(ROOT), batch_wait_ms=20))
    server = uvicorn.Server(uvicorn.Config(create_app(engine), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    server.should_exit = True
    thread.join()
    engine.close()


@pytest.mark.parametrize("case", [*openai_cases.SHARED, *openai_cases.STRICT], ids=lambda case: case.__name__[5:])
def test_the_official_client_gets(case: openai_cases.Case, served: Any) -> None:
    pytest.importorskip("ray")
    case(served, MODEL)


# ---- The engine: batches


REQUESTS = [
    ChatRequest([{"role": "user", "content": text}], tools, Options(max_tokens=6))
    for text in ("weather in Paris", "what time is it?", "hello", "is it on?")
    for tools in ([WEATHER, TIME], [CLOSED], [])
]


@pytest.fixture
def engine() -> Iterator[ModelEngine]:
    engine = ModelEngine(shared_model(), tiny_tokenizer(), max_batch_size=16, batch_wait_ms=300)
    yield engine
    engine.close()


def answered(engine: Any, requests: list[ChatRequest], seconds: float = 60.0) -> list[Any]:
    """The last event of each request, all asked at once."""

    async def last(request: ChatRequest) -> Event:
        return [event async for event in engine.run(request, seconds)][-1]

    async def ask() -> list[Event]:
        return await asyncio.gather(*map(last, requests))

    return asyncio.run(ask())


def said(answer: Any) -> Any:
    assert isinstance(answer, Answer), answer
    return answer.content, answer.calls, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens


def test_requests_of_a_batch_get_what_they_would_get_alone(engine: ModelEngine) -> None:
    together = answered(engine, REQUESTS)
    assert {answer.stats["batch_size"] for answer in together} == {len(REQUESTS)}
    engine.batch_wait_s = 0
    alone = [answered(engine, [request])[0] for request in REQUESTS]
    assert {answer.stats["batch_size"] for answer in alone} == {1}
    assert [said(answer) for answer in together] == [said(answer) for answer in alone]
    assert len({str(said(answer)) for answer in alone}) > 6  # or a mix-up would not show


def test_only_requests_with_equal_options_share_a_batch(engine: ModelEngine) -> None:
    kinds = [Options(max_tokens=3), Options(max_tokens=4), Options(max_tokens=3, tool_choice="none")]
    message = [{"role": "user", "content": "hello"}]
    requests = [ChatRequest(message, [], options) for options in kinds for _ in range(2)]
    assert [answer.stats["batch_size"] for answer in answered(engine, requests)] == [2] * 6


def test_a_fault_spoils_no_neighbour(engine: ModelEngine) -> None:
    wrong = schemas.tool({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=a)b"}}}, "bad")
    long = [{"role": "user", "content": "x" * 20_000}]
    faulty = [ChatRequest(REQUESTS[0].messages, [wrong], Options(max_tokens=6)), ChatRequest(long, [], Options())]
    *answers, unsupported, too_long = answered(engine, [*REQUESTS[:3], *faulty])
    assert [said(answer) for answer in answers] == [said(answer) for answer in answered(engine, REQUESTS[:3])]
    assert (unsupported.status, unsupported.code, unsupported.param) == (400, "unsupported_schema", "tools")
    assert (too_long.status, too_long.code) == (400, "context_length_exceeded")


def test_where_a_batch_fails_its_requests_run_alone(engine: ModelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    respond = engine.model.respond_batch

    def failing(conversations: list[Any], **kwargs: Any) -> Any:
        if any("what time" in conversation[0]["content"] for conversation in conversations):
            raise RuntimeError("the secret word is xyzzy")
        return respond(conversations, **kwargs)

    monkeypatch.setattr(engine.model, "respond_batch", failing)
    answers = answered(engine, REQUESTS[:6])
    assert [isinstance(answer, Answer) for answer in answers] == [True] * 3 + [False] * 3
    for refusal in answers[3:]:
        assert refusal.status == 500
        assert "RuntimeError" in refusal.where
        assert "xyzzy" not in refusal.message + refusal.where
        assert refusal.message.split()[2].rstrip(":") in refusal.where  # the same id


def test_a_stream_gives_the_answer_in_pieces(engine: ModelEngine) -> None:
    async def events(request: ChatRequest) -> list[Event]:
        return [event async for event in engine.run(request, 60)]

    for request in (REQUESTS[2], ChatRequest(REQUESTS[1].messages, [CLOSED], Options(tool_choice="required"))):
        *deltas, answer = asyncio.run(
            events(ChatRequest(request.messages, request.tools, request.options, stream=True))
        )
        assert len(deltas) > 2
        assert isinstance(answer, Answer)
        texts = [delta.text for delta in deltas if isinstance(delta, TextDelta)]
        assert "".join(texts) == answer.content
        arguments = [delta.text for delta in deltas if getattr(delta, "index", None) == 0 and hasattr(delta, "text")]
        assert "".join(arguments) == (answer.calls[0][1] if answer.calls else "")
        assert said(answer) == said(answered(engine, [request])[0])


def test_generation_ends_when_its_time_is_over_or_its_reader_has_left(engine: ModelEngine) -> None:
    endless = ChatRequest([{"role": "user", "content": "hello"}], [], Options(max_tokens=1500))
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        time.sleep(0.01)

    hook = engine.model.base.register_forward_hook(count)
    try:
        engine.batch_wait_s = 0
        (refusal,) = answered(engine, [endless], seconds=0.3)
        assert (refusal.status, refusal.code) == (504, "timeout")

        async def leave() -> None:
            events = engine.run(ChatRequest(endless.messages, [], endless.options, stream=True), 60)
            await anext(events)
            await events.aclose()

        asyncio.run(leave())
        answered(engine, [ChatRequest(endless.messages, [], Options(max_tokens=2))])
        assert forwards < 200  # out of 3000
    finally:
        hook.remove()


def test_a_prompt_cache_changes_no_answer(engine: ModelEngine) -> None:
    plain = answered(engine, REQUESTS)
    engine.prompt_cache = module_beside(engine.model, "prompt_cache").PromptCache()
    for _ in range(2):
        assert [said(answer) for answer in answered(engine, REQUESTS)] == [said(answer) for answer in plain]
    assert engine.prompt_cache.stats.hits


# ---- The application: limits, errors, metrics, logs


class StandIn:
    """An engine that does what a test says."""

    def __init__(self, *events: Event | Exception, seconds: float = 0.0) -> None:
        self.events, self.seconds, self.is_ready, self.closed = events, seconds, True, 0

    async def run(self, request: ChatRequest, seconds: float) -> AsyncGenerator[Event]:
        try:
            for event in self.events:
                await asyncio.sleep(self.seconds)
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed += 1

    async def ready(self) -> bool:
        return self.is_ready


def client_of(engine: Any, **settings: Any) -> TestClient:
    return TestClient(create_app(engine, Settings(**settings)), raise_server_exceptions=False)


def metric(client: TestClient, name: str) -> float:
    """The value of a line of /metrics; 0 where there is none."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def error_of(response: Any) -> Any:
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_limits_of_a_body() -> None:
    client = client_of(StandIn(ANSWER), limits=Limits(max_body_bytes=200))
    assert client.post(CHAT, json=BODY).status_code == 200
    large = client.post(CHAT, json={**BODY, "user": "x" * 300})
    assert (large.status_code, error_of(large)["code"]) == (413, "body_too_large")
    chunked = client.post(CHAT, content=iter([b"x" * 150] * 3), headers={"content-type": "application/json"})
    assert chunked.status_code == 413
    # A page of another site can send plain text without asking, JSON only after asking, which is not answered.
    assert client.post(CHAT, content=json.dumps(BODY), headers={"content-type": "text/plain"}).status_code == 415


def test_unknown_paths_methods_and_models_are_errors_of_the_api() -> None:
    client = client_of(StandIn(ANSWER))
    assert error_of(client.get("/v1/nothing"))["type"] == "invalid_request_error"
    assert client.get(CHAT).status_code == 405
    unknown = client.post(CHAT, json={**BODY, "model": "gpt"})
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "model_not_found")


def test_a_key_keeps_others_out() -> None:
    client = client_of(StandIn(ANSWER), api_key="schlüssel")
    assert client.post(CHAT, json=BODY).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    right = {b"Authorization": "Bearer schlüssel".encode()}
    assert client.post(CHAT, json=BODY, headers=right).status_code == 200
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_is_given_up(stream: bool) -> None:
    engine = StandIn(TextDelta("a"), ANSWER, seconds=0.3) if stream else StandIn(ANSWER, seconds=5)
    client = client_of(engine, request_timeout_s=0.45 if stream else 0.2)
    late = client.post(CHAT, json={**BODY, "stream": stream})
    if stream:
        assert late.text.rstrip().endswith('"code": "timeout"}}')
        assert "[DONE]" not in late.text
    else:
        assert (late.status_code, error_of(late)["code"]) == (504, "timeout")
    assert engine.closed == 1
    assert metric(client, 'smollm_requests_total{status="504"}') == 1
    assert metric(client, "smollm_queued_requests") == 0


def test_more_requests_than_may_wait_are_sent_away() -> None:
    engine = StandIn(ANSWER, seconds=1.0)
    with client_of(engine, max_queued=2) as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: client.post(CHAT, json=BODY), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)


def test_a_server_that_shuts_down_answers_what_it_accepted_and_nothing_else() -> None:
    engine = StandIn(TextDelta("a"), ANSWER, seconds=0.3)
    app = create_app(engine)
    with TestClient(app) as client, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(client.post, CHAT, json={**BODY, "stream": True}) for _ in range(2)]
        while app.state.gate.inside < 2:
            time.sleep(0.01)
        assert client.portal is not None
        draining = client.portal.start_task_soon(app.state.gate.drain)
        while not app.state.gate.closed:
            time.sleep(0.01)
        refused = client.post(CHAT, json=BODY)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"]
        assert client.get("/health").status_code == 503
        assert all(answer.result().text.rstrip().endswith("[DONE]") for answer in accepted)
        draining.result(timeout=10)


def test_health_says_whether_a_replica_can_answer() -> None:
    engine = StandIn()
    client = client_of(engine)
    assert client.get("/health").json() == {"status": "ok"}
    engine.is_ready = False
    assert client.get("/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("events", "status", "code"),
    [
        ((ReplicaLostError("The replica that wrote this answer was lost."),), 503, "replica_lost"),
        ((RuntimeError("the secret word is xyzzy"),), 500, "internal_error"),
        ((Refusal(400, "no", "tools", "unsupported_schema"),), 400, "unsupported_schema"),
    ],
)
def test_an_error_shows_nothing_of_the_inside(
    events: tuple[Any, ...], status: int, code: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for before in ((), (TextDelta("a"),)) if stream else ((),):
        answer = client_of(StandIn(*before, *events)).post(CHAT, json={**BODY, "stream": stream})
        assert answer.status_code == (200 if before else status)
        body = json.loads(answer.text.strip().rpartition("data: ")[2])["error"]
        assert body["code"] == code
        assert "xyzzy" not in answer.text + caplog.text
        assert "Traceback" not in answer.text
        if status == 500:
            incident = re.findall(r"Internal error (\w+)", body["message"])[0]
            assert incident in caplog.text


def test_logs_and_metrics_count_and_quote_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = client_of(StandIn(Answer(**{**vars(ANSWER), "attempts": 3})))
    for stream in (False, True):
        assert client.post(CHAT, json={**BODY, "stream": stream, "tools": [WEATHER]}).status_code == 200
    client.post(CHAT, json={**BODY, "xyzzy": 1})
    assert metric(client, 'smollm_requests_total{status="200"}') == 2
    assert metric(client, 'smollm_requests_total{status="400"}') == 1
    assert metric(client, 'smollm_tokens_total{kind="completion"}') == 4
    assert metric(client, 'smollm_forwards_total{part="base"}') == 4
    assert metric(client, "smollm_retries_total") == 4
    assert metric(client, "smollm_request_seconds_count") == 3
    assert "3 + 2 tokens, stop" in caplog.text
    for word in ("xyzzy", "get_weather", "fine"):
        assert word not in caplog.text


def test_the_description_of_the_api_names_the_body_and_every_error() -> None:
    spec = client_of(StandIn(ANSWER)).get("/openapi.json").json()
    chat = spec["paths"][CHAT]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert {"messages", "tools", "tool_choice", "stream"} <= set(spec["components"]["schemas"][schema]["properties"])
    assert {"200", "400", "401", "404", "413", "415", "429", "500", "503", "504"} <= set(chat["responses"])


# ---- The command


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "serve.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_says_what_is_wrong_with_its_options(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert "--port" in run_command("--help").stdout
    missing = run_command("--model", str(tmp_path))
    assert missing.returncode == 1
    assert "no config.json" in missing.stderr
    assert "Traceback" not in missing.stderr
    wrong = run_command("--replicas", "0")
    assert "whole number from 1" in wrong.stderr


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit, match="another --host or --port"):
        serve.bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(SystemExit, match="no-such-host"):
        serve.bind("no-such-host.invalid", 1)
    with serve.bind("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0


@pytest.mark.parametrize(("address", "only"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False)])
def test_addresses_that_others_can_reach_are_known(address: str, only: bool) -> None:
    assert serve.is_loopback(address) is only


class Replica:
    """Stands in for a handle of Ray: the responses of the attempts, one after the other."""

    def __init__(self, *attempts: list[Any]) -> None:
        self.attempts, self.asked, self.cancelled, self.run = list(attempts), 0, 0, self

    def options(self, **_: Any) -> "Replica":
        return self

    def remote(self, *_: Any) -> "Replica":
        self.asked += 1
        return self

    async def __aiter__(self) -> AsyncGenerator[Any]:
        for event in self.attempts[self.asked - 1]:
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        self.cancelled += 1


def test_a_request_goes_to_another_replica_until_its_answer_has_begun() -> None:
    pytest.importorskip("ray")
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    from serving.replicas import MAX_ATTEMPTS, RayEngine

    lost = ActorDiedError()
    handle = Replica([lost], [ActorUnavailableError("gone", None)], [ANSWER])
    (answer,) = answered(RayEngine(handle), [REQUESTS[0]])  # type: ignore[arg-type]
    assert answer.attempts == handle.asked == handle.cancelled == 3
    for attempts, asked in (([[TextDelta("a"), lost], [ANSWER]], 1), ([[lost]] * 9, MAX_ATTEMPTS)):
        handle = Replica(*attempts)
        with pytest.raises(ReplicaLostError):
            answered(RayEngine(handle), [REQUESTS[0]])  # type: ignore[arg-type]
        assert handle.asked == asked


@pytest.fixture(scope="module")
def command() -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """serve.py with two replicas, its address and its log."""
    pytest.importorskip("ray")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), "--port", "0", "--replicas", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    log: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: log.extend(iter(process.stderr.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    until(lambda: process.poll() is not None or any("ready:" in line for line in log), 250)
    assert process.poll() is None, "".join(log)
    yield process, re.findall(r"http://\S+/v1", "".join(log))[0], log
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    reader.join()


def until(holds: Callable[[], bool], seconds: float) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.1)


def processes(root: int) -> list[Any]:
    """A process and those that it has started."""
    psutil = pytest.importorskip("psutil")

    return [psutil.Process(root), *psutil.Process(root).children(recursive=True)]


@pytest.mark.slow
def test_replicas_share_the_load_and_nothing_is_lost_when_one_dies(command: Any) -> None:
    process, address, _ = command
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)

    def ask(minutes: int) -> list[Any]:
        reply = openai_cases.ask(client, MODEL, f"Set a timer for {minutes} minutes", tools=[openai_cases.TIMER])
        return openai_cases.calls_of(reply.choices[0].message)

    wanted = {minutes: ask(minutes) for minutes in range(2, 22)}
    assert len({str(calls) for calls in wanted.values()}) > 10
    replicas = [child for child in processes(process.pid) if "ServeReplica" in " ".join(child.cmdline())]
    assert len(replicas) == 2
    with ThreadPoolExecutor(8) as pool:
        asked = [(minutes, pool.submit(ask, minutes)) for minutes in [*wanted] * 4]
        time.sleep(0.5)
        replicas[0].kill()
        assert all(answer.result() == wanted[minutes] for minutes, answer in asked)
    import httpx

    health = address.removesuffix("/v1") + "/health"
    until(lambda: httpx.get(health).status_code == 200, 60)


@pytest.mark.slow
def test_every_port_is_for_this_machine_only(command: Any) -> None:
    process, _, _ = command
    listening = [
        connection.laddr.ip
        for child in processes(process.pid)
        for connection in child.net_connections(kind="tcp")
        if connection.status == "LISTEN"
    ]
    assert len(listening) > 5
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}


@pytest.mark.slow
def test_told_to_stop_it_answers_what_it_accepted_and_leaves_nothing_behind(command: Any) -> None:
    process, address, log = command
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)
    started = processes(process.pid)
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(openai_cases.ask, client, MODEL, "Tell me a long story.", max_tokens=150, stream=index % 2 == 0)
            for index in range(4)
        ]
        streams = [answer.result() for answer in asked[::2]]  # they have begun
        process.send_signal(signal.SIGTERM)
        until(lambda: any("shutting down" in line for line in log), 20)
        assert all(openai_cases.gather(stream).finish_reasons for stream in streams)
        assert all(answer.result().choices[0].finish_reason for answer in asked[1::2])
    assert process.wait(60) == 0
    until(lambda: not any(child.is_running() and child.status() != "zombie" for child in started), 30)
    assert "Traceback" not in "".join(log)
    assert "long story" not in "".join(log)
