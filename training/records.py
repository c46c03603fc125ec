"""Record files -> data sets: checked line by line, cached as Arrow, memory-mapped or streamed.

A record is one decision of the assistant: `id`, `messages`, `tools` (OpenAI style), `calls` (expected; empty = no
call), optional `source`, `license`, `answer` and `think`. Files are JSONL, gzipped or not. What a wrong line is, and
that it is named by file and number, is decided here alone. No model, no tokenizer.

    python -m training.records DATA/train/sgd.jsonl.gz    # records, skipped lines, seconds
    python -m training.records DATA/train DATA/text --on-error skip
"""

import argparse
import gzip
import hashlib
import json
import logging
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow  # type: ignore[import-untyped]
from filelock import FileLock
from tqdm import tqdm

logger = logging.getLogger(__name__)

Record = dict[str, Any]
OnError = Literal["refuse", "skip"]

SUFFIXES = (".jsonl", ".jsonl.gz")
"""Names of record files end like this."""
STREAM_ABOVE = 1 << 30
"""Bytes of a file from which `load_records` streams it unless told otherwise."""
ROLES = ("system", "user", "assistant", "tool")

_FORMAT = 1  # part of the cache's key: raise it when the columns or what they hold change
_BATCH = 1000


class ExactJson(datasets.Json):
    """`datasets.Json`, read and written by the standard library.

    The original goes through ujson: it cuts numbers to ten decimals and fails on integers of more than 64 bits.
    """

    def encode_example(self, example_data: Any) -> str:
        """Value -> JSON text."""
        return json.dumps(example_data, ensure_ascii=False, separators=(",", ":"))

    def decode_example(self, example_data: str, token_per_repo_id: Any = None) -> Any:
        """JSON text -> value."""
        return json.loads(example_data)


TEXT_COLUMNS = ("source", "license", "answer", "think")
JSON_COLUMNS = ("messages", "tools", "calls")
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        **{name: datasets.Value("string") for name in TEXT_COLUMNS},
        **{name: ExactJson() for name in JSON_COLUMNS},
        "line": datasets.Value("int32"),
        "text_keys": datasets.List(datasets.Value("int64")),
        "tool_key": datasets.Value("string"),
    }
)
"""Columns of a loaded file: the record, its line (from 1), `text_key` of each message, and `tool_key` of the tool that
is called where one user turn asks for exactly one call. The last three are known without decoding any JSON."""


class RecordError(ValueError):
    """A file or a line that is not in the record form."""


# ---------------------------------------------------------------------------------------------------------------------
# One line
# ---------------------------------------------------------------------------------------------------------------------


def parse_record(line: bytes) -> Record:
    """Parse one line and check the shape of the record; arguments are not held against their schema.

    Raises:
        ValueError: it is not JSON, or a part of a record is missing or wrong; says which.
    """
    try:
        record = json.loads(line, parse_constant=_no_constant)
        if b"\\ud" in line.lower():  # half of a surrogate pair can be read, but not written again
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise ValueError("not a record: an object with a text `id` is needed")
    for name in JSON_COLUMNS:
        items = record.get(name)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"`{name}` must be a list of objects")
    for name in TEXT_COLUMNS:
        if not isinstance(record.get(name), str | None):
            raise ValueError(f"`{name}` must be text or null")
    if not record["messages"]:
        raise ValueError("`messages` is empty: there is nothing to answer")
    for message in record["messages"]:
        _check_message(message)
    last = record["messages"][-1]
    if last["role"] == "assistant" and (record["calls"] or last.get("tool_calls")):
        raise ValueError("`messages` must end before the turn of the assistant whose calls are in `calls`")
    _check_tools(record["tools"], record["calls"])
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check_message(message: Record) -> None:
    if message.get("role") not in ROLES:
        raise ValueError(f"the `role` of a message must be one of {', '.join(ROLES)}, not {message.get('role')!r}")
    if not isinstance(message.get("content"), str | None):
        raise ValueError("the `content` of a message must be text or null")
    earlier = message.get("tool_calls") or []
    if not isinstance(earlier, list) or not all(isinstance(call, dict) for call in earlier):
        raise ValueError("the `tool_calls` of a message must be a list of objects")
    for call in earlier:
        _check_call(bare_call(call), "each of `tool_calls`")


def _check_tools(tools: Sequence[Record], calls: Sequence[Record]) -> None:
    names = set()
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError("each of `tools` needs a `function` with a text `name`")
        if not isinstance(function.get("parameters"), dict):
            raise ValueError(f"the `parameters` of tool {function['name']!r} must be a JSON Schema object")
        if function["name"] in names:
            raise ValueError(f"two of `tools` have the name {function['name']!r}")
        names.add(function["name"])
    for call in calls:
        _check_call(call, "each call")
        if call["name"] not in names:
            raise ValueError(f"{call['name']!r} is called but is not among `tools`")


def _check_call(call: Any, which: str) -> None:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"{which} needs a text `name`")
    if not isinstance(call.get("arguments"), dict):
        raise ValueError(f"{which} needs an object of `arguments`: {call['name']!r} has none")


def bare_call(call: Record) -> Any:
    """The name and arguments of a call, out of OpenAI's `function` wrapper where it has one."""
    return call.get("function", call)


def is_simple(record: Mapping[str, Any]) -> bool:
    """Whether a record is one user turn that asks for exactly one call."""
    return len(record["messages"]) == 1 and len(record["calls"]) == 1


def text_key(text: str) -> int:
    """64-bit hash of a message; case, spaces and the last full stop or question mark do not count."""
    return int.from_bytes(hashlib.sha256(normal_text(text).encode()).digest()[:8], "big", signed=True)


def normal_text(text: str) -> str:
    """A message as `text_key` compares it."""
    return " ".join(text.lower().split()).rstrip(".?! ")


def tool_key(function: Record) -> str:
    """Hash of a function's name, description and schema, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(function, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# One file
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class RecordFile:
    """One file of records.

    Args:
        path: where it is.
        skip_corrupt: pass over lines that are not records, and count them; otherwise they are refused.
        skipped: how many lines the last reading passed over.
    """

    path: Path
    skip_corrupt: bool = False
    skipped: int = 0

    @property
    def label(self) -> str:
        """Folder and name without suffix, such as `train/snips`."""
        return f"{self.path.parent.name}/{self.path.name.removesuffix('.gz').removesuffix('.jsonl')}"

    def records(self) -> Iterator[tuple[int, Record]]:
        """Read the records with their line numbers, from 1.

        Raises:
            RecordError: a line is not a record, or the compressed data end early or are damaged.
        """
        self.skipped = 0
        for number, line in _lines(self.path):
            try:
                record = parse_record(line)
            except ValueError as error:
                if not self.skip_corrupt:
                    raise _refusal(self.path, number, str(error)) from None
                self.skipped += 1
                continue
            yield number, record


def record_files(paths: Sequence[Path], skip_corrupt: bool = False) -> list[RecordFile]:
    """The record files among and below the paths, without repetition.

    Args:
        paths: files, or folders that are searched with all they contain.
        skip_corrupt: see `RecordFile`.

    Raises:
        RecordError: a path does not exist, is no record file, or a folder holds none.
    """
    found: dict[Path, RecordFile] = {}
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files = [file for file in inside if file.is_file() and file.name.endswith(SUFFIXES)]
        if not files:
            raise RecordError(f"{path}: no record file here; name .jsonl or .jsonl.gz files, or a folder with some")
        found.update((file.resolve(), RecordFile(file, skip_corrupt)) for file in files)
    return list(found.values())


def read_records(path: Path) -> Iterator[Record]:
    """Read one file record by record, without a cache; a line that is no record is refused."""
    return (record for _, record in RecordFile(path).records())


def write_records(path: Path, found: Iterable[Record]) -> None:
    """Write records as gzipped JSONL; the file appears when it is complete.

    Args:
        path: the file, `.jsonl.gz`.
        found: the records.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    try:
        # Without name and time in its head, the same records are the same file.
        with partial_path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
            for record in found:
                file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; what cannot be decompressed is refused whatever was asked."""
    number = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        message = f"{path}:{number + 1}: the gzip data cannot be read on ({error}); copy the file again"
        raise RecordError(message) from error


def _refusal(path: Path, number: int, reason: str, others: int = 0) -> RecordError:
    more = f"; {others} more lines are wrong too" if others else ""
    return RecordError(f"{path}:{number}: {reason}{more}. Mend the line, or leave such lines out (--on-error skip)")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A line that is no record: its number, from 1, and what is wrong with it."""

    line: int
    reason: str


@dataclass(frozen=True)
class LoadedFile:
    """A record file as a data set.

    Args:
        dataset: `datasets.Dataset` with `FEATURES`, memory-mapped.
        faults: the lines left out.
    """

    dataset: Any
    faults: list[Fault]


def load_records(
    source: Path | str, on_error: OnError = "refuse", streaming: bool | None = None, cache_dir: Path | None = None
) -> Any:
    """Load records as a data set; `as_record` makes a record of one of its rows.

    Args:
        source: a record file, a folder of some, or the Hub id of a data set that holds record files.
        on_error: `"refuse"` stops at lines that are no records, `"skip"` leaves them out and logs their count.
        streaming: read while iterating, without a cache; None decides by the size of the largest file.
        cache_dir: where the Arrow files are kept; None is `datasets`' own cache. They are found again by the content
            of the record file, by any number of processes at once.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` when streamed, with `FEATURES`.

    Raises:
        ValueError: `on_error` is unknown.
        RecordError: there is no record file or no record, or a line is wrong.
        OSError: the data set cannot be fetched, or the cache not be written.
    """
    paths = [file.path for file in record_files([_local(source)])]
    if streaming is None:
        streaming = max(path.stat().st_size for path in paths) > STREAM_ABOVE
    if not streaming:
        loaded = [load_file(path, on_error, cache_dir).dataset for path in paths]
        return datasets.concatenate_datasets(loaded) if len(loaded) > 1 else loaded[0]
    _check_on_error(on_error)
    keywords = {"paths": [str(path) for path in paths], "on_error": on_error}
    return datasets.IterableDataset.from_generator(_streamed, features=FEATURES, gen_kwargs=keywords)


def load_file(path: Path, on_error: OnError = "refuse", cache_dir: Path | None = None) -> LoadedFile:
    """Load one record file through the cache; see `load_records`."""
    _check_on_error(on_error)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "records"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    table = folder / f"{digest[:32]}-{path.name.endswith('.gz'):d}{_FORMAT}.arrow"
    if not table.exists():
        _fill_cache(path, table)
    faults = [Fault(*fault) for fault in json.loads(table.with_suffix(".faults.json").read_text(encoding="utf-8"))]
    if faults and on_error == "refuse":
        raise _refusal(path, faults[0].line, faults[0].reason, len(faults) - 1)
    dataset = datasets.Dataset.from_file(str(table), info=datasets.DatasetInfo(features=FEATURES))
    if not len(dataset):
        raise RecordError(f"{path}: there is no record in it; name another file, or remove it from the mixture")
    _log_faults(path, faults)
    return LoadedFile(dataset, faults)


def as_record(row: Record) -> Record:
    """A row of a loaded data set without the columns that are no part of a record, and without empty texts."""
    names = ("id", *TEXT_COLUMNS, *JSON_COLUMNS)
    return {name: row[name] for name in names if row[name] is not None}


class StoredRecord(Mapping[str, Any]):
    """A record in a data set whose parts are decoded when they are asked for.

    Args:
        columns: name -> encoded values of all rows, as `encoded_columns` gives them.
        index: the row.
    """

    def __init__(self, columns: Mapping[str, Any], index: int) -> None:
        self.columns, self.index = columns, index

    def __getitem__(self, name: str) -> Any:
        value = self.columns[name][self.index].as_py()
        return json.loads(value) if name in JSON_COLUMNS else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


def encoded_columns(dataset: Any) -> dict[str, Any]:
    """The Arrow columns of a data set that is not a selection, JSON undecoded; nothing is copied."""
    return {name: dataset.data.column(name) for name in FEATURES}


def _check_on_error(on_error: str) -> None:
    if on_error not in ("refuse", "skip"):
        raise ValueError(f'on_error is {on_error!r}: pass "refuse" or "skip".')


def _local(source: Path | str) -> Path:
    """A path on this machine; a Hub id is fetched."""
    path = Path(source)
    if isinstance(source, Path) or path.exists() or source.count("/") != 1 or source.endswith(SUFFIXES):
        return path
    from huggingface_hub import snapshot_download

    from .sources import ADAPTERS

    if source in ADAPTERS:
        advice = f"python -m training.sources {source} --out DATA/train/NAME.jsonl.gz"
        raise RecordError(f"{source}: its rows are no records yet; convert them with `{advice}` and load the file")
    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=[f"*{end}" for end in SUFFIXES]))
    except OSError as error:
        raise OSError(f"{source}: neither a path here nor a data set that could be fetched ({error})") from error


def _fill_cache(path: Path, table: Path) -> None:
    """Write a file's table; of several processes one does it, and the others wait."""
    partial_path = table.with_suffix(".partial")
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(table.with_suffix(".lock")):
            if table.exists():
                return
            try:
                faults = _write_table(path, partial_path)
                table.with_suffix(".faults.json").write_text(json.dumps(faults), encoding="utf-8")
                partial_path.replace(table)  # last: where the table is, all of it is there
            finally:
                partial_path.unlink(missing_ok=True)
    except OSError as error:
        advice = "free some space, or set HF_DATASETS_CACHE (or cache_dir) to another folder"
        raise OSError(f"{table.parent}: the cache of {path} cannot be written ({error}); {advice}") from error


def _write_table(path: Path, table: Path) -> list[Fault]:
    faults: list[Fault] = []
    schema = FEATURES.arrow_schema
    with datasets.arrow_writer.ArrowWriter(features=FEATURES, path=str(table)) as writer:
        batch: list[Record] = []
        for item in tqdm(_rows(path), desc=f"caching {path.name}", unit="line", disable=None, leave=False):
            if isinstance(item, Fault):
                faults.append(item)
                continue
            batch.append(item)
            if len(batch) == _BATCH:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                batch = []
        writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
        writer.finalize()
    return faults


def _rows(path: Path) -> Iterator[Record | Fault]:
    """The lines of a file as rows whose JSON is text, or as what is wrong with them."""
    encode = FEATURES["messages"].encode_example
    for number, line in _lines(path):
        try:
            record = parse_record(line)
        except ValueError as error:
            yield Fault(number, str(error))
            continue
        row = {name: record.get(name) for name in ("id", *TEXT_COLUMNS)}
        row |= {name: encode(record[name]) for name in JSON_COLUMNS}
        keys = [text_key(message.get("content") or "") for message in record["messages"]]
        yield row | {"line": number, "text_keys": keys, "tool_key": _called_tool(record)}


def _called_tool(record: Record) -> str | None:
    if not is_simple(record):
        return None
    name = record["calls"][0]["name"]
    return tool_key(next(tool["function"] for tool in record["tools"] if tool["function"]["name"] == name))


def _streamed(paths: list[str], on_error: OnError) -> Iterator[Record]:
    for path in map(Path, paths):
        faults: list[Fault] = []
        for row in _rows(path):
            if not isinstance(row, Fault):
                # `datasets` encodes what a generator gives.
                yield row | {name: json.loads(row[name]) for name in JSON_COLUMNS}
            elif on_error == "refuse":
                raise _refusal(path, row.line, row.reason)
            else:
                faults.append(row)
        _log_faults(path, faults)


_logged: set[tuple[Path, int]] = set()


def _log_faults(path: Path, faults: Sequence[Fault]) -> None:
    if faults and (path, len(faults)) not in _logged:
        _logged.add((path, len(faults)))
        logger.warning("%s: %d lines left out; line %d: %s", path, len(faults), faults[0].line, faults[0].reason)


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit status: 0; 2 where a file or a line is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.records", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", help="record files, or folders of them")
    parser.add_argument("--on-error", choices=["refuse", "skip"], default="refuse", help="what to do with wrong lines")
    parser.add_argument("--cache-dir", type=Path, help="where the Arrow files go; default: the cache of `datasets`")
    options = parser.parse_args(arguments)
    start, total, left_out = time.perf_counter(), 0, 0
    try:
        for file in record_files(options.paths):
            begin = time.perf_counter()
            loaded = load_file(file.path, options.on_error, options.cache_dir)
            total, left_out = total + len(loaded.dataset), left_out + len(loaded.faults)
            seconds = time.perf_counter() - begin
            print(f"{file.label:32} {len(loaded.dataset):8} records {len(loaded.faults):6} skipped {seconds:7.2f} s")
            for fault in loaded.faults[:3]:
                print(f"  line {fault.line}: {fault.reason}")
    except (RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'all':32} {total:8} records {left_out:6} skipped {time.perf_counter() - start:7.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
