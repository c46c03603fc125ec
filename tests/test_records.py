"""Record files as data sets: what a line must hold, that nothing changes on the way, caches and processes."""

import gzip
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training import records
from training.records import Record, RecordError, RecordFile, as_record, load_file, load_records

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}


def tool(name: str = "get_weather", **fields: Any) -> Record:
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS, **fields}}


def record(index: int = 0, **fields: Any) -> Record:
    return {
        "id": f"r{index}",
        "source": "tiny",
        "messages": [{"role": "user", "content": f"Weather number {index}?"}],
        "tools": [tool()],
        "calls": [{"name": "get_weather", "arguments": {"city": "Oslo"}}],
        **fields,
    }


def write(path: Path, lines: list[Record | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path, **options: Any) -> list[Record]:
    return [as_record(row) for row in load_records(path, **options)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own; `load_file` keeps its files in the folder `records` of it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield tmp_path / "cache" / "records"
    records._logged.clear()


# ---- Lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (json.dumps(record()).replace('"Oslo"', "NaN"), "NaN is no JSON number"),
        (json.dumps(record()).replace("Oslo", "\\ud800"), "not JSON .*surrogates"),
        ("7", "text `id`"),
        (record(id=3), "text `id`"),
        (record(tools={}), "`tools` must be a list"),
        (record(messages=[]), "nothing to answer"),
        (record(messages=[{"role": "user", "content": 3}]), "`content`"),
        (record(messages=[{"role": "robot", "content": "a"}]), "`role` .*'robot'"),
        (record(messages=[{"role": "assistant", "tool_calls": 3}]), "`tool_calls`"),
        (record(messages=[{"role": "assistant", "tool_calls": [{"name": "f"}]}]), "`arguments`: 'f'"),
        (record(messages=[{"role": "assistant", "content": "a"}]), "must end before the turn"),
        (record(tools=[{}]), "`function` with a text `name`"),
        (record(tools=[tool(parameters=None)]), "`parameters` of tool 'get_weather'"),
        (record(tools=[tool(), tool()]), "two of `tools` have the name 'get_weather'"),
        (record(calls=[{"name": 1}]), "text `name`"),
        (record(calls=[{"name": "get_weather", "arguments": "{}"}]), "object of `arguments`: 'get_weather'"),
        (record(calls=[{"name": "other", "arguments": {}}]), "'other' is called but is not among `tools`"),
        (record(answer=["a"]), "`answer` must be text"),
    ],
)
def test_a_wrong_line_is_refused_by_file_and_line_or_left_out(
    tmp_path: Path, line: Record | str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", [record(0), "", line, record(1)])
    for load in (lambda: load_file(path), lambda: list(load_records(path, streaming=True))):
        with pytest.raises((RecordError, datasets.exceptions.DatasetGenerationError), match=message) as caught:
            load()
        assert str(caught.value).startswith(f"{path}:3: ")
    with pytest.raises(RecordError, match=message):
        list(RecordFile(path).records())
    file = RecordFile(path, skip_corrupt=True)
    assert [(number, item["id"]) for number, item in file.records()] == [(1, "r0"), (4, "r1")]
    assert file.skipped == 1
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loaded = load_file(path, "skip")
    assert [(row["line"], row["id"]) for row in loaded.dataset] == [(1, "r0"), (4, "r1")]
    assert [fault.line for fault in loaded.faults] == [3]
    assert [entry.message.startswith(f"{path}: 1 lines left out; line 3: ") for entry in caplog.records] == [True]
    assert [item["id"] for item in read(path, on_error="skip", streaming=True)] == ["r0", "r1"]


@pytest.mark.parametrize("damage", ["cut", "changed", "not gzip"])
def test_damaged_gzip_data_are_refused_even_when_lines_may_be_skipped(tmp_path: Path, cache: Path, damage: str) -> None:
    path = write(tmp_path / "a.jsonl.gz", [record(index) for index in range(50)])
    whole = path.read_bytes()
    middle = len(whole) // 2
    spoilt = {"cut": whole[:middle], "changed": whole[:middle] + b"\0" * 40 + whole[middle + 40 :], "not gzip": b"abc"}
    path.write_bytes(spoilt[damage])
    for load in (lambda: list(RecordFile(path, skip_corrupt=True).records()), lambda: load_file(path, "skip")):
        with pytest.raises(RecordError, match=r"a\.jsonl\.gz:\d+: the gzip data"):
            load()
    assert not list(cache.glob("*.arrow"))
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize("lines", [[], ["", "  "], ["{"]])
def test_a_file_without_records_is_refused(tmp_path: Path, lines: list[Record | str]) -> None:
    path = write(tmp_path / "a.jsonl.gz", lines)
    with pytest.raises(RecordError, match=r"a\.jsonl\.gz: there is no record in it"):
        load_file(path, "skip")


def test_a_path_without_record_files_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.jsonl", tmp_path / "a" / "b"):
        with pytest.raises(RecordError, match="no record file"):
            load_records(path)


def test_an_unknown_wish_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record()])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="on_error is 'ignore'"):
            load_records(path, on_error="ignore", streaming=streaming)  # type: ignore[arg-type]


# ---- Content

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=4), min_size=1, max_size=4))
def test_records_come_back_exactly_as_they_were_written(tmp_path: Path, arguments: list[Record]) -> None:
    # Integers of any size and all digits of a float: what ujson, on which `datasets` relies, does not keep.
    given = [record(i, calls=[{"name": "get_weather", "arguments": one}]) for i, one in enumerate(arguments)]
    path = write(tmp_path / "a.jsonl", list(given))
    assert json.dumps(read(path)) == json.dumps([*(as_written(item) for item in given)])
    assert json.dumps(read(path, streaming=True)) == json.dumps([as_written(item) for item in given])


def as_written(item: Record) -> Record:
    """The record with its keys in the order of the columns."""
    return {name: item[name] for name in records.FEATURES if name in item}


def test_columns_tell_what_is_asked_without_decoding(tmp_path: Path) -> None:
    two_turns = record(1, messages=[{"role": "system", "content": "Be  BRIEF."}, record(1)["messages"][0]])
    path = write(tmp_path / "a.jsonl.gz", [record(0), "", two_turns])
    dataset = load_file(path).dataset
    assert isinstance(dataset, datasets.Dataset)
    assert dataset.features == records.FEATURES
    assert dataset["line"][:] == [1, 3]
    assert dataset["text_keys"][1] == [records.text_key("be brief"), records.text_key("weather number 1")]
    assert dataset["tool_key"][:] == [records.tool_key(tool()["function"]), None]
    stored = records.StoredRecord(records.encoded_columns(dataset), 1)
    assert stored["messages"] == two_turns["messages"]
    assert (stored.get("answer"), stored.get("nothing", 7)) == (None, 7)
    assert [records.is_simple(item) for item in (record(0), stored)] == [True, False]


def test_written_records_are_read_and_the_same_file_each_time(tmp_path: Path) -> None:
    given = [record(index, answer="é\n") for index in range(3)]
    paths = [tmp_path / name / "a.jsonl.gz" for name in ("one", "two")]
    for path in paths:
        records.write_records(path, given)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert list(records.read_records(paths[0])) == given == read(paths[0])


def test_nothing_is_left_of_records_that_could_not_be_written(tmp_path: Path) -> None:
    def broken() -> Iterator[Record]:
        yield record()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        records.write_records(tmp_path / "a.jsonl.gz", broken())
    assert list(tmp_path.glob("a*")) == []


# ---- Caches, folders, streams


def test_a_loaded_file_is_found_again_by_its_content(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", [record(0)])
    load_file(path)
    (table,) = cache.glob("*.arrow")
    written = table.stat().st_mtime_ns
    load_file(write(tmp_path / "copy.jsonl.gz", [record(0)]))
    assert [one.stat().st_mtime_ns for one in cache.glob("*.arrow")] == [written]
    time = path.stat().st_mtime_ns
    write(path, [record(7)])
    os.utime(path, ns=(time, time))  # same size, same time, other content
    assert [row["id"] for row in load_file(path).dataset] == ["r7"]


def test_a_folder_is_one_data_set(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.jsonl.gz", [record(0), record(1)])
    write(tmp_path / "data" / "deep" / "b.jsonl", [record(2)])
    for streaming in (False, True):
        assert [item["id"] for item in read(tmp_path / "data", streaming=streaming)] == ["r0", "r1", "r2"]


def test_large_files_are_streamed_unless_told_otherwise(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [record(0)])
    assert isinstance(load_records(path), datasets.Dataset)
    monkeypatch.setattr(records, "STREAM_ABOVE", 10)
    assert isinstance(load_records(path), datasets.IterableDataset)
    assert isinstance(load_records(path, streaming=False), datasets.Dataset)


def test_a_data_set_of_the_hub_is_its_record_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    write(tmp_path / "hub" / "data" / "a.jsonl.gz", [record(3)])
    asked: list[Any] = []

    def fetched(repo: str, **options: Any) -> str:
        asked.append((repo, options["repo_type"]))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    (row,) = load_records("someone/calls")
    assert as_record(row) == record(3)
    assert asked == [("someone/calls", "dataset")]
    with pytest.raises(RecordError, match=r"python -m training\.sources Team-ACE/ToolACE --out"):
        load_records("Team-ACE/ToolACE")


def load_at_once(path: Path, cache: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    dataset = load_file(path, cache_dir=cache).dataset
    results.put((len(dataset), dataset[len(dataset) - 1]["id"]))


def test_two_processes_load_a_file_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", [record(index) for index in range(3000)])
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=load_at_once, args=(path, tmp_path / "both", barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [(3000, "r2999")] * 2
    for worker in workers:
        worker.join(timeout=60)
    assert len(list((tmp_path / "both" / "records").glob("*.arrow"))) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record()])
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match=r"taken/records: the cache of .*a\.jsonl cannot be written .*HF_DATASETS_CACHE"):
        load_file(path, cache_dir=tmp_path / "taken")


# ---- Command


def test_the_command_prints_counts_and_skipped_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train" / "a.jsonl.gz", [record(0), "{", record(1)])
    command = [str(tmp_path / "train"), "--cache-dir", str(tmp_path / "mine")]
    assert records.main(command) == 2
    assert "a.jsonl.gz:2: not JSON" in capsys.readouterr().err
    assert records.main([*command, "--on-error", "skip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["train/a", "2", "records", "1", "skipped"]
    assert lines[1].startswith("  line 2: not JSON")
    assert lines[-1].split()[:5] == ["all", "2", "records", "1", "skipped"]
