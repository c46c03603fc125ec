"""Answers for a whole data set, resumable and exactly once: `python -m eval.generate_dataset INPUT --out OUT.jsonl`.

INPUT is a JSONL or Parquet file, several of one kind, a folder, or the id of a data set on the Hub. A row holds
`messages` (or a `prompt` or `text`) and may hold `tools`, `tool_choice` and `id`; lists and objects may also be JSON
texts. OUT (`.jsonl` or `.parquet`) gets one row for each row of the input, in its order: `id`, `message`, `mode` and
`stats`, or `id` and `error`. What was run is in `OUT.run.json`.

Answers are kept in a partial file beside OUT as soon as they are known, so that the same command goes on after any end.
With `--workers 2` or more they are made by processes of Ray Data, on a cluster where RAY_ADDRESS names one.

Ends with status 3 where rows could not be answered, which their `error` explains; the other rows are answered.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file, logging

from eval.devices import check_device, device_name
from eval.resumable import PartialResults, versions
from repo_package import ROOT
from serve import ray_environment

COLUMNS = ("id", "messages", "prompt", "text", "tools", "tool_choice")
"""Columns that are read; others are left alone."""
WINDOW_BATCHES = 8
"""Batches of so many are sorted by length together, so that a batch pads little."""
DECIDES = ("dtype", "decoding", "max_new_tokens", "tool_choice", "limit")
"""Options that decide the answers: a run goes on with the same ones only. Batches, workers and devices may change."""
STARTS = 3
"""How often Ray may try to start: it gives its own processes 15 seconds, which a busy machine may need longer for."""
SOME_FAILED = 3
"""Exit status where rows could not be answered."""
FEATURES = datasets.Features(
    {
        "id": datasets.Json(),
        "message": datasets.Json(),
        "mode": datasets.Value("string"),
        "stats": datasets.Json(),
        "error": datasets.Value("string"),
    }
)
"""Columns of an output in Parquet; other programs than `datasets` see JSON texts."""

# ---------------------------------------------------------------------------------------------------------------------
# Input
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of the input, each as a JSON text; memory-mapped.

    Args:
        dataset: one column `line` of JSON texts, or some of `COLUMNS`.
    """

    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def texts(self, indices: Sequence[int]) -> list[str]:
        """JSON texts of some rows."""
        found = self.dataset.with_format("arrow")[list(indices)].to_pylist()
        if "line" in self.dataset.column_names:
            return [row["line"] for row in found]
        features = dict(self.dataset.features)
        return [json.dumps(without_padding(row, features), default=str) for row in found]

    def digest(self) -> str:
        """SHA-256 of all rows in their order."""
        digest = hashlib.sha256()
        for start in tqdm(range(0, len(self), 1000), "reading", unit="k rows", leave=False, disable=None):
            for text in self.texts(range(start, min(start + 1000, len(self)))):
                digest.update(text.encode() + b"\n")
        return digest.hexdigest()


def without_padding(value: Any, feature: Any) -> Any:
    """A value as it was before Arrow gave all objects of a column the same keys.

    Args:
        value: out of Arrow; columns of JSON are still texts.
        feature: its type. In an object of fixed keys a key without a value was not there; in JSON every null is meant.
    """
    if value is None:
        return None
    if isinstance(feature, datasets.Json):
        return json.loads(value)
    if isinstance(feature, dict):
        return {key: without_padding(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return [without_padding(item, feature.feature) for item in value]
    return value


def open_rows(inputs: Sequence[str], split: str | None, limit: int) -> Rows:
    """Open the input by `datasets`.

    Args:
        inputs: JSONL or Parquet files, or one folder or data set of the Hub.
        split: of a folder or a data set of the Hub; None = train.
        limit: most rows; 0 = all.

    Raises:
        ValueError: it cannot be read, or has none of the columns.
    """
    kinds = {_kind(name) for name in inputs}
    if len(kinds) > 1 or (kinds == {"data set"} and len(inputs) > 1):
        raise ValueError("INPUT must be JSONL files, Parquet files, or one folder or data set: give one kind a run.")
    kind = kinds.pop()
    if split and kind != "data set":
        raise ValueError("--split is for folders and data sets of the Hub: a file has no splits.")
    datasets.disable_progress_bars()
    try:
        dataset = _load(kind, inputs, split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        lines = str(error.__cause__ or error).strip().splitlines()
        reason = (lines[0] if lines else type(error).__name__).rstrip(".") + "."
        advice = "Give a .jsonl or .parquet file, a folder with such files, or the id of a data set on the Hub."
        raise ValueError(f"{', '.join(inputs)} cannot be read: {reason} {advice}") from error
    if limit:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return Rows(dataset)


def _kind(name: str) -> str:
    for kind, endings in (("lines", (".jsonl", ".jsonl.gz")), ("parquet", (".parquet",))):
        if name.lower().endswith(endings):
            return kind
    return "data set"


def _load(kind: str, inputs: Sequence[str], split: str) -> datasets.Dataset:
    if kind == "lines":
        # As lines of text, each parsed when its turn comes: no types are guessed across rows, and what is no JSON
        # costs one row only. A byte that is no UTF-8 becomes an escape that JSON does not know.
        features = datasets.Features({"line": datasets.Value("large_string")})
        files = {"train": list(inputs)}
        dataset = datasets.load_dataset(
            "text", data_files=files, split="train", features=features, encoding_errors="backslashreplace"
        )
        blank = pa.compute.equal(pa.compute.utf8_trim_whitespace(dataset.data.column("line")), "").to_numpy()
        return dataset.select((~blank).nonzero()[0]) if blank.any() else dataset
    if kind == "parquet":
        dataset = datasets.load_dataset("parquet", data_files={"train": list(inputs)}, split="train")
    else:
        dataset = datasets.load_dataset(inputs[0], split=split)
    columns = [name for name in dataset.column_names if name in COLUMNS]
    if not {"messages", "prompt", "text"}.intersection(columns):
        raise ValueError(
            f"its columns are {', '.join(dataset.column_names)}; one named messages, prompt or text is needed."
        )
    return dataset.select_columns(columns)


# ---------------------------------------------------------------------------------------------------------------------
# One row
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One row that can be asked.

    Args:
        index: of the row.
        id: what the row calls itself; its index where it does not.
        messages: the conversation.
        tools: what may be called.
        tool_choice: as in the OpenAI API.
        size: characters of the row.
    """

    index: int
    id: Any
    messages: list[dict[str, Any]]
    tools: list[Any]
    tool_choice: Any
    size: int


def read_request(index: int, text: str, tool_choice: Any) -> Request | str:
    """Read one row.

    Args:
        index: of the row.
        text: the row as JSON.
        tool_choice: where the row has none of its own.

    Returns:
        The request, or the line of the output that says why there is none.
    """
    name: Any = index
    try:
        row = _object(text)
        name = index if row.get("id") is None else row["id"]
        tools = [_parsed(tool, "tools") for tool in _list(row.get("tools") or [], "tools")]
        own = row.get("tool_choice")
        choice = tool_choice if own is None else parse_tool_choice(own)
        return Request(index, name, _messages(row), tools, choice, len(text))
    except (ValueError, RecursionError) as error:
        return failed(name, error)


def parse_tool_choice(value: Any) -> Any:
    """A `tool_choice` of the OpenAI API out of what was given: one of its words, an object, or a tool's name.

    >>> parse_tool_choice("get_weather")
    {'type': 'function', 'function': {'name': 'get_weather'}}
    """
    if not isinstance(value, str) or value in ("auto", "none", "required"):
        return value
    if value.lstrip().startswith("{"):
        return _parsed(value, "tool_choice")
    return {"type": "function", "function": {"name": value}}


def _object(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text, parse_constant=_no_constant)
        if "\\ud" in text.lower():  # half of a surrogate pair can be read, but not written again
            json.dumps(row, ensure_ascii=False).encode()
    except ValueError as error:
        raise ValueError(f"the row is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"the row must be a JSON object, not {type(row).__name__}")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row: `messages`, a `prompt` that is a conversation or a text, or a `text`."""
    column = next((name for name in ("messages", "prompt", "text") if row.get(name) is not None), None)
    if column is None:
        raise ValueError("the row has no messages, prompt or text")
    value = row[column]
    if column != "messages" and isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages = _list(value, column)
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{column} must be a list of at least one message, each an object with role and content")
    return messages


def _list(value: Any, column: str) -> list[Any]:
    value = _parsed(value, column)
    if not isinstance(value, list):
        raise ValueError(f"{column} must be a list, or its JSON text, not {type(value).__name__}")
    return value


def _parsed(value: Any, column: str) -> Any:
    """A value, out of its JSON text where it is one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"{column} is a text that is no JSON ({error})") from None


def failed(name: Any, error: Exception) -> str:
    """The line of the output for a row without an answer."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return _line({"id": name, "error": f"{kind}{error}"})


def answered(name: Any, reply: Any) -> str:
    """The line of the output for a row with an answer."""
    stats = {
        "base_forwards": reply.stats.base_forwards,
        "head_forwards": reply.stats.head_forwards,
        "calls": reply.stats.calls,
        "drafted_slots": reply.stats.drafted_slots,
        "accepted_slots": reply.stats.accepted_slots,
        "cut": list(reply.stats.cut),
    }
    return _line({"id": name, "message": reply.message, "mode": reply.mode, "stats": stats})


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # an error message may quote half of a surrogate pair
        text = json.dumps(row)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answerer:
    """The model with all that its answers depend on.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tool_choice: of rows without one of their own.
        batch_size: most rows of a batch.
        settings: further keyword arguments of `respond_batch`.
    """

    model: Any
    tokenizer: PreTrainedTokenizerFast
    tool_choice: Any
    batch_size: int
    settings: Mapping[str, Any]

    def window(self, rows: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Answer some rows, in batches of similar length.

        Args:
            rows: index and JSON text of each.

        Yields:
            Index and output line of each, in the order in which they are known.
        """
        requests: list[Request] = []
        for index, text in rows:
            request = read_request(index, text, self.tool_choice)
            if isinstance(request, Request):
                requests.append(request)
            else:
                yield index, request
        # All rows of a batch share their options.
        key = {request.index: json.dumps(request.tool_choice, sort_keys=True) for request in requests}
        requests.sort(key=lambda request: (key[request.index], request.size))
        for _, alike in groupby(requests, lambda request: key[request.index]):
            group = list(alike)
            for start in range(0, len(group), self.batch_size):
                yield from self.batch(group[start : start + self.batch_size])

    def batch(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        """Answer rows in one batch; where that fails, each by itself, so that only those fail that must."""
        try:
            replies = self.model.respond_batch(
                [request.messages for request in requests],
                tools=[request.tools for request in requests],
                tokenizer=self.tokenizer,
                tool_choice=requests[0].tool_choice,
                **self.settings,
            )
        # Any error at all: data sets hold everything, and one row is no reason to lose the others.
        except Exception as error:
            if len(requests) == 1:
                yield requests[0].index, failed(requests[0].id, error)
                return
            for request in requests:
                yield from self.batch([request])
            return
        for request, reply in zip(requests, replies, strict=True):
            yield request.index, answered(request.id, reply)


def load_answerer(options: argparse.Namespace) -> Answerer:
    """Load the model that the options name.

    Raises:
        ValueError: there is none, or it has no schema diffusion head.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(_no_model(options.model, error)) from error
    if not hasattr(model, "respond_batch"):
        name = type(model).__name__
        raise ValueError(f"{options.model} is a {name}: --model takes one with a schema diffusion head.")
    settings = {"decoding": options.decoding, "max_new_tokens": options.max_new_tokens, "do_sample": False}
    choice = parse_tool_choice(options.tool_choice)
    return Answerer(model.to(options.device).eval(), tokenizer, choice, options.batch_size, settings)


def _no_model(name: str, error: Exception) -> str:
    return (
        f"--model {name}: no model could be loaded from there ({str(error).splitlines()[0]}). Give the folder of a "
        "model (config.json, model.safetensors, tokenizer.json) or the name of a Hub repo."
    )


def model_identity(name: str) -> str:
    """What tells a model from what else may stand in its place: the commit on the Hub, or a hash of the folder's files.

    Args:
        name: folder or repo of the model.

    Raises:
        ValueError: there is no model.
    """
    try:
        folder = Path(cached_file(name, "config.json")).parent
    except OSError as error:
        raise ValueError(_no_model(name, error)) from error
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# All rows
# ---------------------------------------------------------------------------------------------------------------------


def in_windows(pending: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut the rows that are left into windows."""
    size = WINDOW_BATCHES * batch_size
    return [list(pending[start : start + size]) for start in range(0, len(pending), size)]


def answers(options: argparse.Namespace, rows: Rows, pending: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Index and output line of every row that is left, in the order in which they are known."""
    windows = in_windows(pending, options.batch_size)
    if options.workers > 1 and windows:
        yield from scaled_out(options, windows)
    elif windows:
        answerer = load_answerer(options)
        for window in windows:
            yield from answerer.window(zip(window, rows.texts(window), strict=True))


class Worker:
    """One process of several, which opens input and model by itself.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.rows = open_rows(options.input, options.split, options.limit)
        self.answerer = load_answerer(options)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Answer windows; Ray Data runs a window again where a process is lost with it."""
        for window in batch["window"]:
            indices = [int(index) for index in window]
            for index, line in self.answerer.window(zip(indices, self.rows.texts(indices), strict=True)):
                yield {"index": [index], "line": [line]}


def start_ray(workers: int) -> Any:
    """Start Ray for this machine alone, or join the cluster that RAY_ADDRESS names.

    Args:
        workers: processes that will be asked for.

    Returns:
        The module.

    Raises:
        ValueError: Ray is not installed or does not start.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    own: dict[str, Any] = {}  # a cluster knows by itself what it has
    if address == "local":
        # One task more than the workers, for Ray Data's own.
        own = {"num_cpus": workers + 1, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        for name, value in ray_environment().items():
            os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError:
        raise ValueError('--workers needs Ray Data: pip install -e ".[batch]", or leave --workers out.') from None
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(address, log_to_driver=False, logging_level=ERROR, **own)
            break
        except Exception as error:  # a start that Ray finds too slow has no type of its own
            ray.shutdown()
            if attempt == STARTS:
                raise ValueError(f"Ray did not start: {str(error).strip().splitlines()[0]}") from error
    getLogger("ray.data").setLevel(ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    return ray


def scaled_out(options: argparse.Namespace, windows: Sequence[Sequence[int]]) -> Iterator[tuple[int, str]]:
    """Answer windows by several processes of Ray Data.

    Args:
        options: of the command.
        windows: indices of rows.

    Yields:
        Index and output line of each row; of a window that was run again, some may come twice.

    Raises:
        ValueError: Ray is not installed or does not start, or the processes failed.
    """
    ray = start_ray(options.workers)
    try:
        found = ray.data.from_items(
            [{"window": list(window)} for window in windows], override_num_blocks=len(windows)
        ).map_batches(
            Worker,
            fn_constructor_args=(options,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=options.workers),
            num_cpus=1,
            num_gpus=1 if options.device.startswith("cuda") else 0,
        )
        for row in found.iter_rows():
            yield int(row["index"]), row["line"]
    except ray.exceptions.RayError as error:
        raise ValueError(f"the workers failed: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def run_path(out: Path) -> Path:
    """The file beside an output that says what it was made of."""
    return out.with_name(f"{out.name}.run.json")


def check_finished(out: Path, decided: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is there already.

    Args:
        out: the output.
        decided: what decides the answers.

    Returns:
        The report of a finished run of the same; None where there is no output yet.

    Raises:
        ValueError: the output is of something else.
    """
    if not out.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(run_path(out).read_text(encoding="utf-8"))
        before = report["decided"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out} exists and was not made by this command: name another --out, or remove it.") from None
    changed = sorted(name for name in before.keys() | decided.keys() if before.get(name) != decided.get(name))
    if changed:
        raise ValueError(f"{out} was made with another {', '.join(changed)}: name another --out, or remove it.")
    return report


def write(out: Path, lines: Iterable[str]) -> None:
    """Write the output, at once or not at all.

    Args:
        out: the file, `.jsonl` or `.parquet`.
        lines: its rows as JSON texts.
    """
    whole = out.with_name(f"{out.name}.writing")
    if out.suffix == ".parquet":
        _write_parquet(whole, lines)
    else:
        with whole.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    os.replace(whole, out)


def _write_parquet(path: Path, lines: Iterable[str]) -> None:
    schema, part = FEATURES.arrow_schema, list[dict[str, Any]]()
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            for name in ("id", "message", "stats"):
                row[name] = json.dumps(row[name], ensure_ascii=False) if name in row else None
            part.append(row)
            if number % 1000 == 0:
                writer.write_table(pa.Table.from_pylist(part, schema=schema))
                part.clear()
        writer.write_table(pa.Table.from_pylist(part, schema=schema))


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Refuse a second run on the same output while the block runs."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f"{out.name}.lock")
    try:
        with FileLock(path, timeout=0):
            yield
            path.unlink(missing_ok=True)
    except Timeout:
        raise ValueError(f"another run is writing {out}: wait for its end, or name another --out.") from None


def run(options: argparse.Namespace, command: str) -> int:
    """Answer all rows, write the output and say how it went.

    Args:
        options: of the command.
        command: as it was typed, for the report.

    Returns:
        How many rows could not be answered.

    Raises:
        ValueError: input, model or options are faulty, or the output is of another run.
    """
    check_device(options.device)
    rows = open_rows(options.input, options.split, options.limit)
    decided = {name: getattr(options, name) for name in DECIDES}
    decided |= {"input": rows.digest(), "rows": len(rows), "weights": model_identity(options.model)}
    with only_run(options.out):
        unfinished = options.out.with_suffix(".partial.jsonl").exists()
        before = None if unfinished else check_finished(options.out, decided)
        report = before or finish(options, PartialResults(options.out, decided), rows, decided, command)
    done = "answered already" if before else "answered"
    print(f"{options.out}: {report['rows'] - report['failed']} of {report['rows']} rows {done}")
    return int(report["failed"])


def finish(
    options: argparse.Namespace, store: PartialResults, rows: Rows, decided: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """Answer what is left and write the output.

    Args:
        options: of the command.
        store: keeps what is known already.
        rows: the input.
        decided: what decides the answers.
        command: as it was typed.

    Returns:
        The report, which is in the file beside the output too.
    """
    pending = [index for index in range(len(rows)) if str(index) not in store]
    with (
        store.kept_when_interrupted("answers"),
        tqdm(desc="answers", total=len(rows), initial=len(rows) - len(pending), unit="row") as bar,
    ):
        start, first, work = time.perf_counter(), 0.0, time.process_time()
        for index, line in answers(options, rows, pending):
            first = first or time.perf_counter() - start
            if str(index) not in store:
                store.put(str(index), line)
                bar.update()
    lines = [store[str(index)] for index in range(len(rows))]
    report = {
        "command": command,
        "versions": versions() | {"datasets": datasets.__version__},
        "device": device_name(torch.device(options.device)),
        "model": options.model,
        "rows": len(rows),
        "failed": sum("error" in json.loads(line) for line in lines),
        "answered_by_this_part": len(pending),
        "seconds": {
            "to_first_answer": round(first, 2),
            "all": round(time.perf_counter() - start, 2),
            "cpu_of_this_process": round(time.process_time() - work, 2),
        },
        "decided": decided,
    }
    # First the report: without it the output would belong to nobody, and with it alone nothing is lost.
    run_path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write(options.out, lines)
    store.path.unlink()
    return report


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.generate_dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="files, a folder, or a data set of the Hub")
    parser.add_argument("--out", type=Path, required=True, help="the output, .jsonl or .parquet")
    parser.add_argument("--model", default=str(ROOT), help="folder or repo of the model")
    parser.add_argument("--split", help="of a folder or a data set of the Hub (default: train)")
    parser.add_argument("--limit", type=int, default=0, help="first rows only; 0 = all")
    parser.add_argument("--batch-size", type=int, default=8, help="most rows of a batch")
    parser.add_argument("--decoding", default="verified", choices=("verified", "diffusion", "ar"), help="who decides")
    parser.add_argument("--tool-choice", default="auto", help="auto, none, required, or the name of a tool")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens of a text reply")
    parser.add_argument("--workers", type=int, default=1, help="processes with a model each; from 2 on by Ray Data")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--device", default="cpu", help="where the model runs; of each worker on CUDA its own GPU")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each process; 0 = torch's choice")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    typed = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.out.suffix not in (".jsonl", ".parquet"):
        parser.error(f"--out {options.out} must end in .jsonl or .parquet.")
    for name, least in (("limit", 0), ("batch_size", 1), ("max_new_tokens", 1), ("workers", 1), ("threads", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more.")
    try:
        missing = run(options, shlex.join(["python", "-m", "eval.generate_dataset", *typed]))
    except (OSError, ValueError) as error:
        sys.exit(f"eval.generate_dataset: {error}")
    if missing:
        print(f"{missing} rows could not be answered: see their `error`.", file=sys.stderr)
        sys.exit(SOME_FAILED)


if __name__ == "__main__":
    main()
