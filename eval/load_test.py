"""Many clients at once against serve.py and against `transformers serve`: `python -m eval.load_test`.

Sends the same made-up requests, calls and talk, from `--clients` clients that each wait for their answer before they
send the next, to one server after the other on this machine: `transformers serve`; serve.py with a batch of one, with
batches, with each number of `--replicas`; and with a replica killed in the middle. All hold the weights in float32, on
one thread a process. Or to a server that runs already, with `--server URL`.

Each answer is compared with what the model answers in this process to the same request alone: an answer that belongs to
another request is mixed up, a request without any answer is lost. Exits with 1 if there is one.
"""

import argparse
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil  # type: ignore[import-untyped]
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.devices import device_name
from eval.held_out_tables import markdown
from eval.resumable import RESULTS, PartialResults, versions
from repo_package import ROOT

RIVAL = "transformers serve"
REPLICA = "ray::ServeReplica:"
"""What the processes of replicas are called."""
ALONE = "alone"
"""Key of the expected answers in a partial result."""
KILL_AFTER = 1 / 3
"""Share of the requests that is answered when a replica is killed."""
START_SECONDS, REQUEST_SECONDS = 300, 120
MAX_TOKENS = 24
"""Of a text; calls are never cut."""


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = (
    _tool("get_weather", "Weather of a city", city="string"),
    _tool("set_timer", "Set a timer", minutes="integer"),
    _tool("send_message", "Send a message to somebody", recipient="string", text="string"),
)
CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito", "Bern", "Dakar", "Prague", "Madrid")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Karla", "Leon")


@dataclass(frozen=True)
class Request:
    """One request of a client.

    Args:
        text: what the user says; no two requests say the same.
        tools: whether tools are shown.
    """

    text: str
    tools: bool


@dataclass(frozen=True)
class Answer:
    """What a reply says.

    Args:
        content: its text.
        calls: names and arguments, as JSON with sorted keys.
    """

    content: str
    calls: str

    @classmethod
    def of(cls, content: str | None, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> "Answer":
        """The answer of a message's text and calls."""
        return cls((content or "").strip(), json.dumps(calls, sort_keys=True))


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Args:
        answer: what came; None where it was refused or lost.
        error: the HTTP status of an error, or the name of what went wrong on the way.
        seconds: until then.
    """

    answer: Answer | None
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Server:
    """A server to start.

    Args:
        name: in the tables.
        arguments: of the command, `{port}` for the port.
        model: the name that requests ask for.
        kill: whether a replica is killed in the middle.
    """

    name: str
    arguments: tuple[str, ...]
    model: str
    kill: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Requests and what is expected
# ---------------------------------------------------------------------------------------------------------------------


def made_requests(count: int, seed: int) -> list[Request]:
    """Made-up requests, two thirds with tools; each has a number of its own, so that answers can be told apart.

    Args:
        count: how many.
        seed: of what they say.
    """
    rng = random.Random(seed)
    numbers = rng.sample(range(1000, 10_000), count)
    texts = (
        lambda n: f"Set a timer for {n} minutes",
        lambda n: f"What is the weather in {rng.choice(CITIES)} at {n} meters?",
        lambda n: f"Tell {rng.choice(NAMES)} that the code is {n}",
        lambda n: f"Send {rng.choice(NAMES)} the message '{rng.choice(CITIES)} {n}'",
        lambda n: f"{rng.choice(NAMES)} and I bought {n} apples. What do you think?",
        lambda n: f"Do you know the number {n}?",
    )
    kinds = [rng.randrange(len(texts)) for _ in numbers]
    return [Request(texts[kind](number), tools=kind < 4) for kind, number in zip(kinds, numbers, strict=True)]


def expected_answers(folder: str, requests: Sequence[Request]) -> list[Answer]:
    """What the model of this process answers to each request alone.

    Args:
        folder: of the model.
        requests: the requests.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    answers = []
    for request in tqdm(requests, desc="alone", unit="request", disable=None):
        message = model.respond(
            [{"role": "user", "content": request.text}],
            tokenizer=tokenizer,
            tools=list(TOOLS) if request.tools else None,
            max_new_tokens=MAX_TOKENS,
        ).message
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
        answers.append(Answer.of(None if calls else message["content"], calls))
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Servers
# ---------------------------------------------------------------------------------------------------------------------


def servers(model: str, replicas: Sequence[int], batch: int) -> list[Server]:
    """The servers that are compared.

    Args:
        model: folder of the model.
        replicas: numbers of replicas.
        batch: most requests of a batch.
    """

    def ours(name: str, number: int, most: int, *more: str, kill: bool = False) -> Server:
        arguments = (str(ROOT / "serve.py"), "--model", model, "--port", "{port}", "--replicas", str(number))
        options = ("--threads", "1", "--dtype", "float32", "--max_batch_size", str(most), "--max_queued", "1000")
        return Server(f"serve.py, {name}", (sys.executable, *arguments, *options, *more), "smollm-diffusion", kill)

    command = (str(Path(sys.executable).with_name("transformers")), "serve", model, "--trust-remote-code")
    options = ("--dtype", "float32", "--device", "cpu", "--host", "127.0.0.1", "--port", "{port}")
    found = [
        Server(RIVAL, (*command, *options), model),
        ours("batches of 1, no prompt cache", 1, 1, "--prompt_cache_mb", "0"),
        ours("batches of 1", 1, 1),
    ]
    found += [ours(f"batches of {batch}, {number} replica{'s' * (number > 1)}", number, batch) for number in replicas]
    if (most := max(replicas)) > 1:
        found.append(ours(f"batches of {batch}, {most} replicas, one killed", most, batch, kill=True))
    return found


@contextmanager
def running(server: Server) -> Iterator[tuple[str, int]]:
    """Start a server, wait until it answers, and stop it behind the block.

    Args:
        server: which.

    Yields:
        Its address and the id of its process.

    Raises:
        RuntimeError: it does not start; with the end of what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        command = [argument.replace("{port}", str(port)) for argument in server.arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, Path(log.name), server.name)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path, name: str) -> None:
    """Wait until a server is healthy."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url, timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"{name} does not start: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def kill_a_replica(server_pid: int) -> int:
    """Kill one of a server's replicas at once, as if the machine had taken its memory back.

    Args:
        server_pid: process of the server.

    Returns:
        The process that was killed.

    Raises:
        RuntimeError: it has no replica.
    """
    for process in psutil.Process(server_pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(REPLICA):
                process.send_signal(signal.SIGKILL)
                return process.pid
        except psutil.NoSuchProcess:
            continue
    raise RuntimeError("The server has no replica to kill.")


# ---------------------------------------------------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------------------------------------------------


def send(client: openai.OpenAI, model: str, request: Request) -> Outcome:
    """Send one request and wait for its answer, without retries."""
    started = time.perf_counter()
    answer, error = None, None
    create: Any = client.chat.completions.create
    try:
        reply = create(
            model=model,
            messages=[{"role": "user", "content": request.text}],
            max_tokens=MAX_TOKENS,
            **({"tools": list(TOOLS)} if request.tools else {}),
        )
        message: Any = reply.choices[0].message
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]
        answer = Answer.of(None if calls else message.content, calls)
    except openai.APIStatusError as status:
        error = str(status.status_code)
    except (openai.APIError, ValueError) as fault:
        error = type(fault).__name__
    return Outcome(answer, error, time.perf_counter() - started)


def load(
    url: str, model: str, requests: Sequence[Request], clients: int, name: str, kill: int | None = None
) -> tuple[list[Outcome], float]:
    """Send all requests, `clients` at a time.

    Args:
        url: of the server.
        model: the name that requests ask for.
        requests: what is sent, in order.
        clients: requests under way at once.
        name: for the progress bar.
        kill: process of a server that loses a replica in the middle.

    Returns:
        What became of each request, and the seconds that all took.
    """
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS)
    with client, ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        futures = [pool.submit(send, client, model, request) for request in requests]
        bar = tqdm(as_completed(futures), desc=name, total=len(futures), unit="request", disable=None)
        for done, _ in enumerate(bar, 1):
            if kill is not None and done == max(1, int(len(futures) * KILL_AFTER)):
                kill_a_replica(kill)
        return [future.result() for future in futures], time.perf_counter() - started


def judged(outcomes: Sequence[Outcome], expected: Sequence[Answer]) -> dict[str, Any]:
    """Count what became of the requests.

    Args:
        outcomes: of each request.
        expected: what the model answers to each alone.

    Returns:
        `right`; `mixed_up`, answers that another request should have had and not this one; `other`, answers that no
        request should have had; `errors` by HTTP status, and `lost`, those without any answer.
    """
    others = Counter(expected)
    right = sum(outcome.answer == own for outcome, own in zip(outcomes, expected, strict=True))
    mixed = sum(
        outcome.answer is not None and outcome.answer != own and outcome.answer in others
        for outcome, own in zip(outcomes, expected, strict=True)
    )
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    return {
        "right": right,
        "mixed_up": mixed,
        "other": sum(outcome.answer is not None for outcome in outcomes) - right - mixed,
        "errors": {error: number for error, number in errors.items() if error.isdecimal()},
        "lost": sum(number for error, number in errors.items() if not error.isdecimal()),
    }


def speed(outcomes: Sequence[Outcome], seconds: float) -> dict[str, float | None]:
    """Answers a second, and the latency of answers in milliseconds."""
    answered = [outcome.seconds * 1000 for outcome in outcomes if outcome.answer is not None]
    p50, p95 = np.percentile(answered, [50, 95]).tolist() if answered else (None, None)
    return {"seconds": seconds, "answers_per_second": len(answered) / seconds, "p50_ms": p50, "p95_ms": p95}


def counters(url: str) -> dict[str, float]:
    """What serve.py counts, by the name of the metric; nothing where there is no such endpoint."""
    answer = httpx.get(f"{url}/metrics", timeout=30)
    lines = answer.text.splitlines() if answer.status_code == 200 else []
    return {key: float(value) for key, value in (line.split(" ") for line in lines if line[:7] == "smollm_")}


def measured(
    url: str, model: str, options: argparse.Namespace, expected: Sequence[Answer], name: str, kill: int | None
) -> dict[str, Any]:
    """Put a server under load.

    Args:
        url, model, name, kill: as in `load`.
        options: of the command.
        expected: as in `judged`.

    Returns:
        What is written into the result.
    """
    warm_up = made_requests(max(4, options.clients), options.seed + 1)
    load(url, model, warm_up, options.clients, f"{name}, warm-up")
    before = counters(url)
    requests = made_requests(options.requests, options.seed)
    outcomes, seconds = load(url, model, requests, options.clients, name, kill)
    counted = {key: value - before.get(key, 0) for key, value in counters(url).items()}
    batches = counted.get("smollm_batch_size_count", 0)
    return {
        "name": name,
        **judged(outcomes, expected),
        **speed(outcomes, seconds),
        "load_average": os.getloadavg()[0],
        "killed": kill is not None,
        "asked_again": counted.get("smollm_retries_total"),
        "batch_of_an_answer": counted["smollm_batch_size_sum"] / batches if batches else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `arguments` None takes those of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.load_test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT), help="folder of the model")
    parser.add_argument("--server", help="URL of a server that runs already, instead of starting some")
    parser.add_argument("--clients", type=int, default=8, help="requests under way at once")
    parser.add_argument("--requests", type=int, default=200, help="requests to each server")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2], help="numbers of replicas of serve.py")
    parser.add_argument("--batch", type=int, default=8, help="most requests of a batch of serve.py")
    parser.add_argument("--seed", type=int, default=0, help="of what the requests say")
    parser.add_argument("--out", type=Path, default=RESULTS / "load_test.json", help="the result file")
    options = parser.parse_args(arguments)
    if min(options.clients, options.requests, options.batch, *options.replicas) < 1:
        parser.error("--clients, --requests, --batch and --replicas start from 1.")
    if options.requests > 9000:
        parser.error("--requests: at most 9000, since each has a number of its own.")
    return options


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure.

    Args:
        options: of the command.
        command: as it was typed, for the result.

    Returns:
        The result, which is also in `options.out`.
    """
    torch.set_num_threads(1)
    decides = {key: value for key, value in vars(options).items() if key != "out"}
    partial = PartialResults(options.out, decides)
    with partial.kept_when_interrupted():
        if ALONE not in partial:
            alone = expected_answers(options.model, made_requests(options.requests, options.seed))
            partial.put(ALONE, [asdict(answer) for answer in alone])
        expected = [Answer(**answer) for answer in partial[ALONE]]
        if options.server is not None:
            model = httpx.get(f"{options.server}/v1/models", timeout=30).raise_for_status().json()["data"][0]["id"]
            rows = [measured(options.server, model, options, expected, options.server, None)]
        else:
            chosen = servers(options.model, options.replicas, options.batch)
            for server in chosen:
                if server.name not in partial:
                    with running(server) as (url, pid):
                        killed = pid if server.kill else None
                        partial.put(server.name, measured(url, server.model, options, expected, server.name, killed))
            rows = [partial[server.name] for server in chosen]
    report = {
        "command": command,
        "versions": {**versions(), **{name: version(name) for name in ("ray", "openai")}},
        "threads": 1,
        "cores": os.cpu_count(),
        "device": device_name(torch.device("cpu")),
        **{key: value for key, value in decides.items() if key != "model"},
        "different_answers": len({*expected}),
        "with_calls": sum(answer.calls != "[]" for answer in expected),
        "example": asdict(expected[0]),
        "servers": rows,
    }
    partial.finish(report)
    return report


def body(results: Mapping[str, Any]) -> list[str]:
    """Markdown of a result: what was sent, and a table of the servers.

    Args:
        results: as `run` gives them.
    """
    rows, count = results["servers"], results["requests"]
    rival = next((row["answers_per_second"] for row in rows if row["name"] == RIVAL), None)
    table = [
        [
            row["name"],
            f"{row['answers_per_second']:.1f}",
            f"{row['answers_per_second'] / rival:.2f}" if rival else "",
            *("" if row[key] is None else f"{row[key]:.0f}" for key in ("p50_ms", "p95_ms")),
            "" if row["batch_of_an_answer"] is None else f"{row['batch_of_an_answer']:.1f}",
            f"{row['right']} of {count}",
            *(str(row[key]) for key in ("mixed_up", "lost")),
            ", ".join(f"{status}: {number}" for status, number in row["errors"].items()) or "0",
            "" if row["asked_again"] is None else f"{row['asked_again']:.0f}",
            f"{row['load_average']:.1f}",
        ]
        for row in rows
    ]
    header = ["server", "answers/s", f"of {RIVAL}", "p50 ms", "p95 ms", "batch", "as alone", "mixed up", "lost"]
    return [
        f"{count} requests ({results['with_calls']} end in calls) from {results['clients']} clients to each server, "
        f"{results['different_answers']} different answers; float32, {results['threads']} thread a process on "
        f"{results['cores']} cores, which the clients share. *as alone*: the answer is the one that `respond` gives to "
        "the request alone; *lost*: no answer of any kind; *asked again*: requests given to a further replica; *load*: "
        "the machine's load average at the end, where other work shows.",
        markdown([*header, "errors by status", "asked again", "load"], table),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        report = run(parse(arguments), shlex.join(["python", "-m", "eval.load_test", *typed]))
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        sys.exit(f"eval.load_test: {error}")
    print("\n\n".join(body(report)))
    if any(row["mixed_up"] or row["lost"] for row in report["servers"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
