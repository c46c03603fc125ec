"""The load test counts right, mixed-up, refused and lost answers as they are; a real run kills a replica (slow)."""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("psutil")

from eval import load_test
from eval.load_test import Answer, Outcome, Request
from repo_package import ROOT


@contextmanager
def fake_server(reply: Callable[[str, int], str | int | None]) -> Iterator[str]:
    """A server that answers the text and the number of a request with a text, a status, or nothing at all."""
    lock, seen = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = {"object": "list", "data": [{"id": "fake"}]}
            self.answer(200 if self.path == "/v1/models" else 404, listed)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["model"] == "fake"
            with lock:
                number, seen[0] = seen[0], seen[0] + 1
            text = reply(asked["messages"][0]["content"], number)
            if text is None:
                self.close_connection = True
                return
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer(text if isinstance(text, int) else 200, {"id": "x", "choices": [choice]})

        def answer(self, status: int, data: Any) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(text: str) -> Answer:
    return Answer.of(text, [])


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model says what the user says."""

    def answers(_: str, requests: list[Request]) -> list[Answer]:
        return [said(request.text) for request in requests]

    monkeypatch.setattr(load_test, "expected_answers", answers)


def measure(url: str, out: Path, *arguments: str) -> dict[str, Any]:
    """The row of one server."""
    options = load_test.parse(["--server", url, "--requests", "30", "--clients", "5", "--out", str(out), *arguments])
    report = load_test.run(options, "the command")
    assert json.loads(out.read_text()) == report
    assert not out.with_suffix(".partial.jsonl").exists()
    (row,) = report["servers"]
    assert row["name"] in load_test.body(report)[1]
    return row


def test_right_answers_are_counted_and_timed(echo: None, tmp_path: Path) -> None:
    with fake_server(lambda text, _: text) as url:
        row = measure(url, tmp_path / "result.json")
    assert (row["right"], row["mixed_up"], row["other"], row["errors"], row["lost"]) == (30, 0, 0, {}, 0)
    assert row["answers_per_second"] == pytest.approx(30 / row["seconds"])
    assert 0 < row["p50_ms"] <= row["p95_ms"]


def test_a_command_with_nothing_lost_ends_well_and_shows_its_table(
    echo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(lambda text, _: text) as url:
        load_test.main(["--server", url, "--requests", "5", "--out", str(tmp_path / "result.json")])
    assert "| 5 of 5 | 0 | 0 | 0 |" in capsys.readouterr().out


def test_answers_of_other_requests_are_mixed_up(echo: None, tmp_path: Path) -> None:
    """A server that gives a request the answer of the one before."""
    last = ["nothing"]

    def late(text: str, _: int) -> str:
        last.append(text)
        return last[-2]

    with fake_server(late) as url:
        row = measure(url, tmp_path / "result.json", "--clients", "1")
        # All but the first, which gets the last of the warm-up.
        assert (row["right"], row["mixed_up"], row["other"]) == (0, 29, 1)
        with pytest.raises(SystemExit) as end:
            load_test.main(["--server", url, "--requests", "5", "--out", str(tmp_path / "again.json")])
    assert end.value.code == 1


def test_errors_and_losses_are_told_apart(echo: None, tmp_path: Path) -> None:
    warm_up = 5
    replies: dict[int, str | int | None] = {warm_up + 3: 503, warm_up + 8: 503, warm_up + 9: 429, warm_up + 20: None}
    with fake_server(lambda text, number: replies.get(number, text)) as url:
        row = measure(url, tmp_path / "result.json")
    assert row["errors"] == {"503": 2, "429": 1}
    assert (row["right"], row["lost"]) == (26, 1)


def test_calls_are_part_of_the_answer() -> None:
    expected = [Answer.of(None, [("f", {"a": 1, "b": 2})]), Answer.of(None, [("f", {"a": 2, "b": 2})])]
    outcomes = [Outcome(Answer.of("", [("f", {"b": 2, "a": 1})]), None, 1.0), Outcome(expected[0], None, 1.0)]
    judged = load_test.judged(outcomes, expected)
    assert (judged["right"], judged["mixed_up"]) == (1, 1)


def test_requests_differ_and_are_the_same_each_time() -> None:
    requests = load_test.made_requests(300, seed=3)
    assert requests == load_test.made_requests(300, seed=3)
    assert len({request.text for request in requests}) == 300
    assert 100 < sum(request.tools for request in requests) < 290


def test_servers_are_the_rival_and_ours_with_one_killed() -> None:
    names = [server.name for server in load_test.servers("model", [1, 3], 4)]
    assert names[0] == "transformers serve"
    assert [name.removeprefix("serve.py, ") for name in names[1:]] == [
        "batches of 1, no prompt cache",
        "batches of 1",
        "batches of 4, 1 replica",
        "batches of 4, 3 replicas",
        "batches of 4, 3 replicas, one killed",
    ]
    assert [server.kill for server in load_test.servers("model", [1], 4)] == [False] * 4


def test_a_server_that_does_not_start_says_why() -> None:
    command = ("/bin/sh", "-c", "echo no such model; exit 3")
    with pytest.raises(RuntimeError, match=r"broken does not start: no such model"):  # noqa: SIM117
        with load_test.running(load_test.Server("broken", command, "m")):
            pass


def test_only_replicas_are_killed() -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    other = subprocess.Popen([sleep, "60"])
    replica = subprocess.Popen([f"{load_test.REPLICA}smollm:Model", "60"], executable=sleep)
    try:
        assert load_test.kill_a_replica(os.getpid()) == replica.pid
        assert replica.wait(timeout=10) == -9
        assert other.poll() is None
        with pytest.raises(RuntimeError, match="no replica"):
            load_test.kill_a_replica(os.getpid())
    finally:
        other.kill()
        replica.kill()
        other.wait()


@pytest.mark.parametrize("arguments", [["--clients", "0"], ["--requests", "10000"], ["--replicas", "1", "0"]])
def test_impossible_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_test.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_replica_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    options = load_test.parse(
        ["--requests", "40", "--clients", "6", "--replicas", "2", "--out", str(tmp_path / "r.json")]
    )
    rows = {row["name"]: row for row in load_test.run(options, "the command")["servers"]}
    for row in rows.values():
        assert (row["lost"], row["mixed_up"], row["errors"]) == (0, 0, {}), row
        assert row["right"] == 40, row
    killed = rows["serve.py, batches of 8, 2 replicas, one killed"]
    assert killed["killed"]
    assert rows["serve.py, batches of 8, 2 replicas"]["batch_of_an_answer"] > 1


def test_the_docs_say_what_was_measured() -> None:
    result = json.loads((ROOT / "eval" / "results" / "load_test.json").read_text(encoding="utf-8"))
    speed = {row["name"]: row["answers_per_second"] for row in result["servers"]}
    page = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())

    def times(name: str) -> str:
        return f"{speed[f'serve.py, {name}'] / speed[load_test.RIVAL]:.1f} times"

    ours = ("batches of 8, 1 replica", "batches of 8, 2 replicas", "batches of 8, 2 replicas, one killed")
    section = page.partition("## Under load")[2].partition("## ")[0]
    assert re.findall(r"[\d.]+ times", section) == [*map(times, (*ours, "batches of 1, no prompt cache"))]
    assert all(row["right"] == result["requests"] for row in result["servers"])
