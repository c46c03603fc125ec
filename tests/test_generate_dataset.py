"""Answers for a data set: every row once and in order, whatever the rows hold and whenever the run ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from filelock import FileLock

from eval import generate_dataset
from eval.generate_dataset import Request, main, open_rows, read_request
from repo_package import ROOT
from tiny_models import SmolLMDiffusionForCausalLM

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"], "default": None}},
            "required": ["city"],
        },
    },
}
ALARM = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "parameters": {"type": "object", "properties": {"time": {"type": "string", "enum": ["7 am", "8 am"]}}},
    },
}
IMPOSSIBLE = {"name": "impossible", "parameters": {"type": "object", "properties": {"a": {"$ref": "https://x/y"}}}}


def asked(text: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **columns}


MIXED = [
    asked("Will it rain in Berlin tomorrow?", id="rain", tools=[WEATHER, ALARM]),
    asked("hello"),
    asked("wake me up at 7 am", tools=[ALARM], tool_choice="required"),
    asked("What is the weather in Lisbon, where I am going to go next week with all of my friends?", tools=[WEATHER]),
    asked("weather in Rome", tools=[WEATHER, ALARM], tool_choice="set_alarm"),
    asked("what can you do", tools=[WEATHER]),
]


class Echo:
    """Stands in for a model: answers what was asked last.

    Args:
        stop_after: so many rows, then it is interrupted.
    """

    def __init__(self, stop_after: int = 10**6) -> None:
        self.left, self.batches = stop_after, list[list[str]]()

    def to(self, device: str) -> "Echo":
        return self

    def eval(self) -> "Echo":
        return self

    def respond_batch(self, conversations: Sequence[Any], **options: Any) -> list[Any]:
        texts = [messages[-1]["content"] for messages in conversations]
        if self.left < len(texts):
            raise KeyboardInterrupt
        if len(set(texts)) < len(texts) or "fail" in texts:
            raise RuntimeError("no such luck")
        self.left -= len(texts)
        self.batches.append(texts)
        stats = SimpleNamespace(base_forwards=1, head_forwards=0, calls=0, drafted_slots=0, accepted_slots=0, cut=())
        return [SimpleNamespace(message={"content": text}, mode="chat", stats=stats) for text in texts]


@pytest.fixture(scope="module")
def shipped() -> Any:
    """The shipped model."""
    return SmolLMDiffusionForCausalLM.from_pretrained(ROOT).eval()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Puts a model in the place of the one that would be loaded."""

    def put(model: Any) -> Any:
        monkeypatch.setattr(generate_dataset.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
        return model

    return put


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def run(*arguments: Any) -> int:
    """The command's exit status."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        return int(end.code or 0)
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts_of(path: Path) -> list[Any]:
    return [row["message"]["content"] if "message" in row else row["error"] for row in read(path)]


# ------------------------------------------------------------------------------------------------------------- answers


def test_every_row_gets_the_answer_that_it_gets_alone(tmp_path: Path, shipped: Any, use: Callable[[Any], Any]) -> None:
    use(shipped)
    source, out = write_lines(tmp_path / "in.jsonl", MIXED), tmp_path / "out.jsonl"
    assert run(source, "--out", out, "--batch-size", 4, "--max-new-tokens", 8) == 0
    rows = read(out)
    assert [row["id"] for row in rows] == ["rain", 1, 2, 3, 4, 5]
    tokenizer = generate_dataset.AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    for row, given in zip(rows, MIXED, strict=True):
        reply = shipped.respond(
            given["messages"],
            tools=given.get("tools"),
            tokenizer=tokenizer,
            tool_choice=generate_dataset.parse_tool_choice(given.get("tool_choice", "auto")),
            max_new_tokens=8,
            decoding="verified",
        )
        assert (row["message"], row["mode"]) == (reply.message, reply.mode)
    assert rows[0]["mode"] == "tool"
    assert rows[4]["message"]["tool_calls"][0]["function"]["name"] == "set_alarm"
    assert rows[0]["stats"]["calls"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.run.json"]


def test_options_reach_the_model(tmp_path: Path, shipped: Any, use: Callable[[Any], Any]) -> None:
    use(shipped)
    source = write_lines(tmp_path / "in.jsonl", [asked("hello", tools=[WEATHER])] * 2)
    run(source, "--out", tmp_path / "a.jsonl", "--tool-choice", "get_weather", "--decoding", "ar", "--limit", 1)
    (row,) = read(tmp_path / "a.jsonl")
    assert row["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert row["stats"]["head_forwards"] == 0
    run(source, "--out", tmp_path / "b.jsonl", "--tool-choice", "none", "--max-new-tokens", 3, "--limit", 1)
    (row,) = read(tmp_path / "b.jsonl")
    assert row["mode"] == "chat"
    assert row["stats"]["base_forwards"] <= 4


def test_rows_of_like_length_and_the_same_options_share_a_batch(tmp_path: Path, use: Callable[[Any], Any]) -> None:
    rows = [asked("x" * size, tool_choice="none" if size % 2 else "auto") for size in (9, 1, 8, 3, 2, 5, 4, 7)]
    model = use(Echo())
    run(write_lines(tmp_path / "in.jsonl", rows), "--out", tmp_path / "out.jsonl", "--batch-size", 3)
    assert [sorted(map(len, batch)) for batch in model.batches] == [[2, 4, 8], [1, 3, 5], [7, 9]]
    assert list(map(len, texts_of(tmp_path / "out.jsonl"))) == [9, 1, 8, 3, 2, 5, 4, 7]


def test_bad_rows_say_why_and_cost_no_other_row(tmp_path: Path, shipped: Any, use: Callable[[Any], Any]) -> None:
    use(shipped)
    rows: list[tuple[Any, str]] = [
        (b'{"id": "cut", "messages": [{"ro', "the row is no JSON"),
        (b'{"messages": "\xff"}', "the row is no JSON"),
        (b'{"id": NaN}', "NaN is no JSON number"),
        (rb'{"text": "\ud800"}', "surrogates not allowed"),
        ([1], "must be a JSON object, not list"),
        ({"id": "n"}, "no messages, prompt or text"),
        ({"messages": []}, "a list of at least one message"),
        ({"messages": "hello"}, "messages is a text that is no JSON"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "Unknown role"),
        (asked("x", tools={"a": 1}), "tools must be a list"),
        (asked("x", tools=[WEATHER, WEATHER]), "both named 'get_weather'"),
        (asked("x", tools=[IMPOSSIBLE]), "impossible"),
        (asked("x", tools=[WEATHER], tool_choice="other"), "names 'other'"),
        (asked("x", tool_choice="required"), "needs at least one tool"),
        (asked("hello"), ""),
    ]
    out = tmp_path / "out.jsonl"
    status = run(write_lines(tmp_path / "in.jsonl", [row for row, _ in rows]), "--out", out, "--max-new-tokens", 2)
    assert status == generate_dataset.SOME_FAILED
    found = read(out)
    assert [row.get("error") for row in found if "message" in row] == [None]
    for row, (_, why) in zip(found[:-1], rows, strict=False):
        assert why in row["error"]
        assert "message" not in row
    assert found[5]["id"] == "n"
    assert json.loads((tmp_path / "out.jsonl.run.json").read_text())["failed"] == 14


def test_what_breaks_a_batch_breaks_its_own_row_only(tmp_path: Path, use: Callable[[Any], Any]) -> None:
    use(Echo())
    source = write_lines(tmp_path / "in.jsonl", [asked("a"), asked("fail"), asked("b"), asked("b")])
    assert run(source, "--out", tmp_path / "out.jsonl") == generate_dataset.SOME_FAILED
    assert texts_of(tmp_path / "out.jsonl") == ["a", "RuntimeError: no such luck", "b", "b"]


# --------------------------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize(
    "row",
    [
        asked("hi", tools=[WEATHER, ALARM]),
        {"prompt": "hi", "tools": json.dumps([WEATHER, ALARM])},
        {"text": "hi", "tools": [json.dumps(WEATHER), json.dumps(ALARM)]},
        {"prompt": asked("hi")["messages"], "text": "not this", "tools": [WEATHER, ALARM]},
        {"messages": json.dumps(asked("hi")["messages"]), "tools": [WEATHER, ALARM]},
    ],
)
def test_a_row_may_be_written_in_several_ways(row: dict[str, Any]) -> None:
    request = read_request(3, json.dumps(row), "auto")
    assert isinstance(request, Request)
    assert (request.id, request.messages, request.tools) == (3, asked("hi")["messages"], [WEATHER, ALARM])


def test_a_choice_of_tool_may_be_written_in_several_ways() -> None:
    named = {"type": "function", "function": {"name": "a"}}
    for given, meant in (("a", named), (named, named), (json.dumps(named), named), ("none", "none"), (None, "auto")):
        request = read_request(0, json.dumps(asked("hi", tool_choice=given)), "auto")
        assert isinstance(request, Request)
        assert request.tool_choice == meant


def test_what_arrow_adds_to_objects_of_unlike_keys_never_reaches_a_schema(tmp_path: Path) -> None:
    """`Dataset.from_list` gives every object of a column the keys of all."""
    plain = [{"name": "a", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}]
    other = [{"name": "b", "parameters": {"type": "object", "properties": {"y": {"enum": ["u", "v"]}}}}]
    rows = [asked("1", tools=plain), asked("2", tools=other)]
    rows[1]["messages"].insert(0, {"role": "system", "content": None})
    dataset = datasets.Dataset.from_list(rows)
    assert "'y': None" in str(dataset[0])  # the trap is there
    dataset.to_parquet(tmp_path / "in.parquet")
    found = list(map(json.loads, open_rows([str(tmp_path / "in.parquet")], None, 0).texts([0, 1])))
    assert [row["tools"] for row in found] == [plain, other]
    assert found[1]["messages"][0] == {"role": "system"}


def test_columns_of_json_are_taken_as_they_are(tmp_path: Path) -> None:
    exact = [{"name": "a", "parameters": {"properties": {"x": {"default": None, "maximum": 2**70, "const": 1e-12}}}}]
    features = datasets.Features({"prompt": datasets.Value("string"), "tools": datasets.Json()})
    rows = {"prompt": ["hi"], "tools": [json.dumps(exact)]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(tmp_path / "in.parquet")
    request = read_request(0, open_rows([str(tmp_path / "in.parquet")], None, 0).texts([0])[0], "auto")
    assert isinstance(request, Request)
    assert request.tools == exact


def test_lines_of_several_files_are_rows_and_blank_ones_are_not(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [asked("1"), b"", asked("2"), b"   "])
    second = write_lines(tmp_path / "b.jsonl", [asked("3 \u2028 3")])
    rows = open_rows([str(first), str(second)], None, 0)
    assert [json.loads(text)["messages"][0]["content"] for text in rows.texts(range(len(rows)))] == [
        "1",
        "2",
        "3 \u2028 3",
    ]
    assert len(open_rows([str(first), str(second)], None, 2)) == 2


def test_a_folder_as_the_hub_has_it_is_read_by_split(tmp_path: Path, use: Callable[[Any], Any]) -> None:
    use(Echo())
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [asked("t", picture=0)])
    write_lines(folder / "test.jsonl", [asked("e1", picture=1), asked("e2", picture=2)])
    assert run(folder, "--split", "test", "--out", tmp_path / "out.jsonl") == 0
    assert texts_of(tmp_path / "out.jsonl") == ["e1", "e2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such.jsonl"], r"no-such\.jsonl cannot be read"),
        (["a.jsonl", "b.parquet"], "one kind a run"),
        (["a.jsonl", "--split", "test"], "a file has no splits"),
        (["columns.parquet"], "its columns are other; one named messages"),
        (["a.jsonl", "--model", "no-such-folder"], "no model could be loaded"),
        (["a.jsonl", "--device", "no-such"], "torch cannot use it here"),
    ],
)
def test_what_cannot_be_run_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [asked("a")])
    datasets.Dataset.from_dict({"other": [1]}).to_parquet(tmp_path / "columns.parquet")
    with pytest.raises(SystemExit, match=message):
        run(*arguments, "--out", "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("arguments", [["--out", "a.csv"], ["--out", "a.jsonl", "--batch-size", "0"]])
def test_wrong_options_are_a_usage_error(arguments: list[str]) -> None:
    assert run("in.jsonl", *arguments) == 2


# -------------------------------------------------------------------------------------------------------------- output


def test_parquet_holds_what_jsonl_holds(tmp_path: Path, use: Callable[[Any], Any]) -> None:
    use(Echo())
    source = write_lines(tmp_path / "in.jsonl", [asked("a", id="x"), asked("b", id=2), b"{"])
    run(source, "--out", tmp_path / "out.jsonl")
    run(source, "--out", tmp_path / "out.parquet")
    found = datasets.load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train")
    plain = [{name: value for name, value in row.items() if value is not None} for row in found]
    assert plain == read(tmp_path / "out.jsonl")


@pytest.mark.parametrize("stop_after", [0, 3, 8, 20])
def test_an_interrupted_run_goes_on_and_answers_every_row_once(
    stop_after: int, tmp_path: Path, use: Callable[[Any], Any]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [asked(f"question {number}") for number in range(21)])
    out = tmp_path / "out.jsonl"
    first = use(Echo(stop_after))
    with pytest.raises(SystemExit, match="the same command goes on"):
        run(source, "--out", out, "--batch-size", 1)
    assert not out.exists()
    second = use(Echo())
    run(source, "--out", out, "--batch-size", 4)  # batches may change
    assert texts_of(out) == [f"question {number}" for number in range(21)]
    assert sorted(chain(*first.batches, *second.batches)) == sorted(texts_of(out))


@pytest.mark.parametrize("cut", [1, 40, 170, 1000])
def test_a_partial_file_cut_anywhere_loses_no_row_and_doubles_none(
    cut: int, tmp_path: Path, use: Callable[[Any], Any]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [asked(f"question {number}") for number in range(21)])
    use(Echo(20))
    with pytest.raises(SystemExit):
        run(source, "--out", tmp_path / "out.jsonl", "--batch-size", 1)
    partial = tmp_path / "out.partial.jsonl"
    os.truncate(partial, partial.stat().st_size - cut)
    use(Echo())
    run(source, "--out", tmp_path / "out.jsonl")
    assert texts_of(tmp_path / "out.jsonl") == [f"question {number}" for number in range(21)]


def test_a_finished_run_is_not_run_again(tmp_path: Path, use: Callable[[Any], Any], capsys: Any) -> None:
    source = write_lines(tmp_path / "in.jsonl", [asked("a"), asked("fail")])
    use(Echo())
    first = run(source, "--out", tmp_path / "out.jsonl")
    model = use(Echo(0))
    assert run(source, "--out", tmp_path / "out.jsonl", "--batch-size", 3) == first == generate_dataset.SOME_FAILED
    assert "1 of 2 rows answered already" in capsys.readouterr().out
    assert model.batches == []


def test_an_output_of_something_else_is_refused_and_kept(tmp_path: Path, use: Callable[[Any], Any]) -> None:
    use(Echo())
    source, out = write_lines(tmp_path / "in.jsonl", [asked("a")]), tmp_path / "out.jsonl"
    run(source, "--out", out)
    before = out.read_bytes()
    with pytest.raises(SystemExit, match="made with another decoding, max_new_tokens: name another --out"):
        run(source, "--out", out, "--decoding", "ar", "--max-new-tokens", 3)
    write_lines(source, [asked("b")])
    with pytest.raises(SystemExit, match="made with another input"):
        run(source, "--out", out)
    (tmp_path / "out.jsonl.run.json").unlink()
    with pytest.raises(SystemExit, match="was not made by this command"):
        run(source, "--out", out)
    assert out.read_bytes() == before


def test_an_unfinished_output_of_something_else_is_refused(tmp_path: Path, use: Callable[[Any], Any]) -> None:
    source = write_lines(tmp_path / "in.jsonl", [asked("a"), asked("b")])
    use(Echo(1))
    with pytest.raises(SystemExit, match="Interrupted"):
        run(source, "--out", tmp_path / "out.jsonl", "--batch-size", 1)
    with pytest.raises(SystemExit, match="unfinished run with another tool_choice"):
        run(source, "--out", tmp_path / "out.jsonl", "--tool-choice", "none")


def test_another_model_in_the_same_place_is_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = generate_dataset.model_identity(str(tmp_path))
    assert generate_dataset.model_identity(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert generate_dataset.model_identity(str(tmp_path)) != first


def test_two_runs_on_one_output_are_refused(tmp_path: Path, use: Callable[[Any], Any]) -> None:
    use(Echo())
    source = write_lines(tmp_path / "in.jsonl", [asked("a")])
    with FileLock(tmp_path / "out.jsonl.lock"), pytest.raises(SystemExit, match="another run is writing"):
        run(source, "--out", tmp_path / "out.jsonl")
    assert run(source, "--out", tmp_path / "out.jsonl") == 0


def test_several_workers_without_ray_are_one_message(
    tmp_path: Path, use: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    source = write_lines(tmp_path / "in.jsonl", [asked("a")])
    with pytest.raises(SystemExit, match="needs Ray Data"):
        run(source, "--out", tmp_path / "out.jsonl", "--workers", 2)


# ----------------------------------------------------------------------------------------------------------- processes


def start(source: Path, out: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """The command as a process of its own."""
    command = [sys.executable, "-m", "eval.generate_dataset", str(source), "--out", str(out), "--max-new-tokens", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stderr=log)


def wait_for_rows(process: "subprocess.Popen[bytes]", partial: Path, count: int) -> None:
    """Wait until so many answers are kept."""
    end = time.monotonic() + 500
    while not partial.exists() or partial.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, partial.with_name("out.log").read_text()
        assert time.monotonic() < end, "no answers"
        time.sleep(0.02)


def many(path: Path) -> tuple[Path, list[str]]:
    """A file of requests that call, and the ids of its rows."""
    rows = [asked(f"weather in city number {number}", id=f"r{number}", tools=[WEATHER]) for number in range(120)]
    return write_lines(path, rows), [row["id"] for row in rows]


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    source, ids = many(tmp_path / "in.jsonl")
    out = tmp_path / "out.jsonl"
    for kept in (5, 40):
        process = start(source, out, "--batch-size", "2")
        wait_for_rows(process, tmp_path / "out.partial.jsonl", kept)
        process.kill()
        process.wait()
        assert not out.exists()
    assert start(source, out).wait(200) == 0
    rows = read(out)
    assert [row["id"] for row in rows] == ids
    assert {row["mode"] for row in rows} == {"tool"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_of_two_loses_no_row_and_doubles_none(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    source, ids = many(tmp_path / "in.jsonl")
    process = start(source, tmp_path / "out.jsonl", "--workers", "2", "--batch-size", "1")
    wait_for_rows(process, tmp_path / "out.partial.jsonl", 5)
    workers = [
        child.pid
        for child in psutil.Process(process.pid).children(recursive=True)
        if "MapWorker" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert process.wait(300) == 0
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == ids
    assert run(source, "--out", tmp_path / "alone.jsonl", "--max-new-tokens", 8) == 0
    assert [row["message"] for row in read(tmp_path / "out.jsonl")] == [
        row["message"] for row in read(tmp_path / "alone.jsonl")
    ]
