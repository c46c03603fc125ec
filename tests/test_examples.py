"""The examples, run as they are against a server of the shipped model: they call tools, and nobody else does."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_package import ROOT

pytest.importorskip("fastapi", reason="the serving extra is not installed")
pytest.importorskip("uvicorn", reason="the serving extra is not installed")

import uvicorn

from serving.app import create_app
from serving.engine import ModelEngine
from serving.interface import ChatRequest

MODULES = {
    "openai_client": ["openai"],
    "smolagents_agent": ["smolagents", "openai"],
    "langchain_agent": ["langchain", "langchain_openai"],
}
"""What each example needs."""


class NotedEngine(ModelEngine):
    """An engine that keeps the requests it got."""

    def __init__(self, *args: Any) -> None:
        self.requests: list[ChatRequest] = []
        super().__init__(*args)

    def run(self, request: ChatRequest, seconds: float) -> Any:
        """As in `ModelEngine`."""
        self.requests.append(request)
        return super().run(request, seconds)


@pytest.fixture(scope="module")
def engine() -> Iterator[NotedEngine]:
    """The shipped model."""
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32).eval()
    engine = NotedEngine(model, AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(engine: NotedEngine) -> Iterator[str]:
    """Where it is served."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(engine), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@dataclass(frozen=True)
class Done:
    """What came of an example: what it printed, and the requests that the server got."""

    printed: str
    requests: list[ChatRequest]


@pytest.fixture(scope="module", params=list(MODULES))
def done(request: pytest.FixtureRequest, engine: NotedEngine, address: str, tmp_path_factory: Any) -> tuple[str, Done]:
    """An example and what came of it."""
    for module in MODULES[request.param]:
        pytest.importorskip(module)
    engine.requests.clear()
    folder = tmp_path_factory.mktemp("elsewhere")
    # Nothing but the server can be reached, and what the user has set does not matter.
    nowhere = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
    here = {"PATH": os.environ["PATH"], "HOME": str(folder), "no_proxy": "127.0.0.1", "OPENAI_BASE_URL": address}
    command = [sys.executable, str(ROOT / "examples" / f"{request.param}.py")]
    ended = subprocess.run(
        command, env={**nowhere, **here}, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return request.param, Done(ended.stdout, list(engine.requests))


def test_an_example_calls_its_own_function_with_what_the_model_wrote(done: tuple[str, Done]) -> None:
    name, found = done
    city, date = ("Berlin", "tomorrow") if name == "openai_client" else ("Lisbon", "today")
    assert found.printed.splitlines()[0] == f"get_weather(city={city!r}, date={date!r})"
    first, *others = found.requests
    assert "get_weather" in [tool["function"]["name"] for tool in first.tools]
    assert not any("sunny" in str(message["content"]) for message in first.messages)
    # The server gets the result as what it is told, if at all.
    assert all(any(f"{city}, {date}: sunny" in str(m["content"]) for m in other.messages) for other in others)
    assert len(others) == {"openai_client": 1, "smolagents_agent": 1, "langchain_agent": 0}[name]


def test_the_docs_show_what_an_example_prints(done: tuple[str, Done]) -> None:
    name, found = done
    shown = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
    assert f"```console\n$ python examples/{name}.py\n{found.printed}```" in shown
