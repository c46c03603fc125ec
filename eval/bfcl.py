"""BFCL v4, single turn, scored by the official checker: `python -m eval.bfcl --categories simple_python multiple`.

Requests come from a folder of BFCL's files (`--bfcl`), else out of the package `bfcl-eval` that the checker is in, else
from `bfcl_open/original` in `--data`. The checker comes out of an installed `bfcl-eval`, or from `--checker-path`;
docs/bfcl.md says how to install it. Each request goes through each decoding, greedily, with
`tool_choice="auto"` and as many calls as the model allows.

Categories are weighed as BFCL does: non-live is the mean of simple (itself the mean of three languages), multiple,
parallel and parallel_multiple; live is the mean over its requests; irrelevance is the mean of its categories. BFCL's
overall score has several turns too, which are not measured here: `overall` is the mean of those three, for they have
equal weights in it, and names what it is made of. Intervals are percentiles of a bootstrap over the requests of each
category; one of no width (all or none right) says nothing about the error.

A request that cannot be asked (its prompt is too long, or a schema is unsupported) counts as wrong. Functions are shown
as the official runner shows them: with a hint on the language, and parameters of Java and JavaScript as strings that
hold source code. So the calls are those that it gets (`eval/bfcl_handler.py`). `--tools typed` shows them as BFCL has
them, with the types of JSON Schema, `any` as string; for Java and JavaScript, values are then decoded by their types
and written as source code. So some requests cannot be right: those whose answers name a variable where the type is a
number, a list or a map, and those of Java where the checker rejects right source code; `tests/test_bfcl.py` lists both.
"""

import argparse
import hashlib
import json
import logging
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from eval.bfcl_checker import CheckerMissingError, OfficialChecker, load_checker
from eval.bfcl_handler import Caller, as_tools
from eval.devices import check_device, device_name
from eval.resumable import PartialResults, evaluation_parser, versions
from repo_package import load_repo_module

generation = load_repo_module("generation_smollm_diffusion")

NON_LIVE = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
)
LIVE = (
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
DRAWS = 20_000
"""Of the bootstrap."""
TOOLS = ("official", "typed")
"""How functions are shown."""


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


class DataMissingError(RuntimeError):
    """BFCL's files were not found."""


@dataclass(frozen=True)
class Entry:
    """One request of BFCL.

    Args:
        id: its id.
        category: its category.
        messages: the conversation.
        functions: as BFCL has them.
        answers: `{name: {argument: [accepted values]}}` of each call; empty where the category only asks whether to
            call.
    """

    id: str
    category: str
    messages: list[dict[str, Any]]
    functions: list[dict[str, Any]]
    answers: list[dict[str, Any]]


def find_data(path: Path | None, checker: OfficialChecker, data: Path) -> tuple[Traversable, str]:
    """The folder of BFCL's files.

    Args:
        path: what the user named; None looks into the checker's package, then into `data`.
        checker: the official checker.
        data: folder with `bfcl_open/`.

    Returns:
        The folder, and how the results call it.

    Raises:
        DataMissingError: there is none.
    """
    if path is not None:
        if not path.is_dir():
            raise DataMissingError(f"--bfcl: there is no folder {path}.")
        return path, str(path)
    if checker.data.is_dir():
        return checker.data, f"bfcl-eval {checker.version}"
    beside = data / "bfcl_open" / "original"
    if beside.is_dir():
        return beside, "bfcl_open/original"
    raise DataMissingError(f"There is no data of BFCL: neither in the package nor in {beside}. Name it with --bfcl.")


def read_entries(folder: Traversable, category: str) -> list[Entry]:
    """All requests of a category.

    Args:
        folder: with `BFCL_v4_*.json` and `possible_answer/`.
        category: its name.

    Raises:
        DataMissingError: a file is not there or not as BFCL writes it.
    """
    name = f"BFCL_v4_{category}.json"
    questions = _lines(folder, name)
    answers = [] if "relevance" in category else _lines(folder / "possible_answer", name)
    try:
        by_id = {line["id"]: line["ground_truth"] for line in answers}
        return [
            Entry(line["id"], category, line["question"][0], line["function"], by_id[line["id"]] if answers else [])
            for line in questions
        ]
    except (KeyError, IndexError, TypeError) as error:
        raise DataMissingError(f"{folder / name} is not as BFCL v4 has it: {error!r} is missing.") from error


def _lines(folder: Traversable, name: str) -> list[Any]:
    file = folder / name
    if not file.is_file():
        there = sorted(one.name for one in folder.iterdir() if one.name.endswith(".json")) if folder.is_dir() else []
        raise DataMissingError(
            f"There is no {file}. The folder holds {', '.join(there) or 'no .json files'}; --bfcl names the one with "
            "BFCL_v4_simple_python.json and possible_answer/."
        )
    try:
        # Not `splitlines`: a string in JSON may hold other ends of lines.
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise DataMissingError(f"{file} is not JSON, one object a line: {error}.") from error


def chosen(entries: Sequence[Entry], limit: int, seed: int) -> list[Entry]:
    """Requests in an order of their own; a smaller limit takes the first of them.

    Args:
        entries: of a category.
        limit: most requests; 0 = all.
        seed: of the order.
    """
    ordered = sorted(entries, key=lambda entry: hashlib.sha256(f"{seed} {entry.id}".encode()).digest())
    return ordered[: limit or None]


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


def answer(
    caller: Caller, messages: Sequence[dict[str, Any]], functions: Sequence[dict[str, Any]], decoding: str
) -> dict[str, Any]:
    """The answer to one request as JSON: `calls` and what they cost, or `refused`, why it could not be asked."""
    try:
        # One token tells a text reply from a call, and nobody reads it.
        found = caller.ask(messages, as_tools(functions), decoding, text_tokens=1)
    except ValueError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    made = asdict(found)
    del made["text"]
    return made | {"seconds": round(found.seconds, 5)}


def ask_all(
    caller: Caller,
    entries: Sequence[Entry],
    functions: Sequence[Sequence[dict[str, Any]]],
    decodings: Sequence[str],
    kept: PartialResults,
) -> None:
    """Put all requests, with their functions as they are shown, through all decodings, but for those that are kept."""
    progress = tqdm(zip(entries, functions, strict=True), entries[0].category, len(entries), unit="request")
    for number, (entry, shown) in enumerate(progress):
        # Each decoding is first as often as the others, since the first one compiles the tools.
        place = number % len(decodings)
        for decoding in [*decodings[place:], *decodings[:place]]:
            if key(entry, decoding) not in kept:
                kept.put(key(entry, decoding), answer(caller, entry.messages, shown, decoding))


def key(entry: Entry, decoding: str) -> str:
    """Name of an answer among the partial results."""
    return f"{entry.id} {decoding}"


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def resampled(right: int, requests: int, seed: Sequence[int]) -> NDArray[np.float64]:
    """Shares of right answers in samples of the requests, drawn with replacement and as many.

    Args:
        right, requests: numbers of requests; at least one request.
        seed: of the draws.

    Returns:
        float64 [DRAWS].
    """
    # How many right ones such a sample holds is binomial.
    return np.random.default_rng(list(seed)).binomial(requests, right / requests, DRAWS) / requests


def interval(shares: NDArray[np.float64]) -> list[float]:
    """The middle 95% of the shares [draws]: lowest and highest."""
    return [round(float(end), 4) for end in np.percentile(shares, [2.5, 97.5])]


def summary(
    entries: Sequence[Entry],
    answers: Sequence[Mapping[str, Any]],
    reference: Sequence[Mapping[str, Any]] | None,
    checker: OfficialChecker,
    seed: Sequence[int],
) -> dict[str, Any]:
    """What one decoding did in one category.

    Args:
        entries: the requests.
        answers: of the decoding.
        reference: answers of `ar`, if it was asked.
        checker: the official checker.
        seed: of the bootstrap.

    Returns:
        Counts, shares with intervals, costs (means and a median over the requests that were asked) and the fault of
        each request that is wrong.
    """
    faults = {
        entry.id: "refused"
        if "refused" in made
        else checker.fault(entry.category, entry.functions, made["calls"], entry.answers)
        for entry, made in zip(entries, answers, strict=True)
    }
    right = [fault is None for fault in faults.values()]
    asked = [made for made in answers if "refused" not in made]
    called = [bool(made.get("calls")) for made in answers]
    calls = [made.get("calls") for made in answers]
    return {
        "requests": len(entries),
        "right": sum(right),
        "accuracy": round(mean(right), 4),
        "interval": interval(resampled(sum(right), len(right), seed)),
        "called": sum(called),
        "refused": len(answers) - len(asked),
        "cut": sum(made["cut"] > 0 for made in asked),
        "calls_of_ar": None
        if reference is None
        else sum(one == other.get("calls") for one, other in zip(calls, reference, strict=True)),
        "base_forwards": round(mean(made["base_forwards"] for made in asked), 2) if asked else None,
        "head_forwards": round(mean(made["head_forwards"] for made in asked), 2) if asked else None,
        "median_ms": round(1000 * median(made["seconds"] for made in asked), 1) if asked else None,
        "faults": dict(Counter(fault for fault in faults.values() if fault is not None).most_common()),
        "wrong": {name: fault for name, fault in faults.items() if fault is not None},
    }


def groups(sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """How BFCL weighs categories.

    Args:
        sizes: number of requests that each measured category has in BFCL.

    Returns:
        For each group that is measured in full its categories and their weights, which add up to 1. `overall` is the
        mean of several of them; `relevance` has no part in it.
    """
    simple = dict.fromkeys(("simple_python", "simple_java", "simple_javascript"), 1 / 12)
    non_live = simple | dict.fromkeys(("multiple", "parallel", "parallel_multiple"), 1 / 4)
    live = {name: float(sizes.get(name, 0)) for name in LIVE if "relevance" not in name}
    refusals = [name for name in ("irrelevance", "live_irrelevance") if name in sizes]
    found = {
        name: {category: weight / sum(weights.values()) for category, weight in weights.items()}
        for name, weights in (
            ("non-live AST", non_live),
            ("live AST", live),
            ("irrelevance", dict.fromkeys(refusals, 1.0)),
        )
        if weights and weights.keys() <= sizes.keys()
    }
    if len(found) > 1:
        parts = [(category, weight / len(found)) for weights in found.values() for category, weight in weights.items()]
        found["overall"] = dict(parts)
    if "live_relevance" in sizes:
        found["relevance"] = {"live_relevance": 1.0}
    return found


def combined(rows: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int], seed: int) -> dict[str, dict[str, Any]]:
    """Scores of the groups for one decoding.

    Args:
        rows: summaries by category.
        sizes: number of requests that each of these categories has in BFCL.
        seed: of the bootstrap.

    Returns:
        By group `accuracy`, `interval` and `of`, its categories.
    """
    draws = {name: resampled(row["right"], row["requests"], _seed(seed, name)) for name, row in rows.items()}
    return {
        group: {
            "accuracy": round(
                sum(weight * rows[name]["right"] / rows[name]["requests"] for name, weight in weights.items()), 4
            ),
            "interval": interval(sum((weight * draws[name] for name, weight in weights.items()), np.zeros(DRAWS))),
            "of": list(weights),
        }
        for group, weights in groups(sizes).items()
    }


def decisions(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int] | None]:
    """How often one decoding called where a call is wanted and did not where none is, over all requests measured.

    Args:
        rows: summaries by category.

    Returns:
        `[requests, of how many]` each, or None where nothing of the kind was measured.
    """
    wanted = [row for name, row in rows.items() if "irrelevance" not in name]
    others = [row for name, row in rows.items() if "irrelevance" in name]
    return {
        "called where wanted": [sum(row["called"] for row in wanted), sum(row["requests"] for row in wanted)]
        if wanted
        else None,
        "not called where unwanted": [
            sum(row["requests"] - row["called"] - row["refused"] for row in others),
            sum(row["requests"] for row in others),
        ]
        if others
        else None,
    }


def _seed(seed: int, category: str) -> list[int]:
    """Seed of a category's bootstrap, which does not depend on what else is measured."""
    return [seed, (*NON_LIVE, *LIVE).index(category)]


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

LEGEND = (
    "called: replies that call; refused: requests that could not be asked; cut: replies with a value that was ended at "
    "its limit of length; as ar: replies with the calls of ar; base fw, head fw: forwards a request; median ms: from "
    "messages to calls, the compilation of new tools included"
)
_HEADS = ("right", "accuracy", "95% interval", "called", "refused", "cut", "as ar", "base fw", "head fw", "median ms")


def table(results: Mapping[str, Any]) -> str:
    """The results as text.

    Args:
        results: `categories`, `groups` and `decisions` of a report.
    """
    lines = [f"{'':24}{'decoding':>10}" + "".join(f"{head:>14}" for head in _HEADS)]
    for category, rows in results["categories"].items():
        for decoding, row in rows.items():
            cells = (
                f"{row['right']} of {row['requests']}",
                f"{row['accuracy']:.1%}",
                _range(row["interval"]),
                row["called"],
                row["refused"],
                row["cut"],
                row["calls_of_ar"],
                row["base_forwards"],
                row["head_forwards"],
                row["median_ms"],
            )
            lines.append(f"{category:24}{decoding:>10}" + "".join(f"{_shown(cell):>14}" for cell in cells))
    for decoding, found in results["groups"].items():
        for group, row in found.items():
            start = f"{group:24}{decoding:>10}{'':>14}{row['accuracy']:>14.1%}{_range(row['interval']):>14}"
            lines.append(f"{start}  of {', '.join(row['of'])}")
    for decoding, found in results["decisions"].items():
        said = [f"{name} {counts[0]} of {counts[1]}" for name, counts in found.items() if counts]
        lines.append(f"{'decision':24}{decoding:>10}  {'; '.join(said)}")
    return "\n".join(lines)


def _range(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f}-{100 * ends[1]:.1f}"


def _shown(cell: Any) -> str:
    return "-" if cell is None else str(cell)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def measure(
    caller: Caller,
    entries: Mapping[str, Sequence[Entry]],
    checker: OfficialChecker,
    kept: PartialResults,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """All categories through all decodings.

    Args:
        caller: the model.
        entries: all requests by category; `options.limit` of each are asked.
        checker: the official checker.
        kept: partial results.
        options: of the command.

    Returns:
        `categories` by category and decoding, `groups` and `decisions` by decoding.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {decoding: {} for decoding in options.decodings}
    for category, all_of_it in entries.items():
        todo = chosen(all_of_it, options.limit, options.seed)
        functions = [
            checker.shown_functions(entry.id, entry.functions) if options.tools == "official" else entry.functions
            for entry in todo
        ]
        ask_all(caller, todo, functions, options.decodings, kept)
        answers = {decoding: [kept[key(entry, decoding)] for entry in todo] for decoding in options.decodings}
        for decoding, made in answers.items():
            seed = _seed(options.seed, category)
            rows[decoding][category] = summary(todo, made, answers.get("ar"), checker, seed)
    sizes = {category: len(all_of_it) for category, all_of_it in entries.items()}
    combinations = {decoding: combined(found, sizes, options.seed) for decoding, found in rows.items()}
    return {
        "categories": {
            category: {decoding: rows[decoding][category] for decoding in options.decodings} for category in entries
        },
        "groups": combinations,
        "decisions": {decoding: decisions(found) for decoding, found in rows.items()},
    }


def described(options: argparse.Namespace, checker: OfficialChecker, source: str, caller: Caller) -> dict[str, Any]:
    """What the results were made with."""
    return {
        "versions": versions() | {"numpy": np.__version__, "bfcl-eval": checker.version},
        "threads": torch.get_num_threads(),
        "device": device_name(torch.device(options.device)),
        "dtype": options.dtype,
        "data": source,
        "tools": options.tools,
        "limit": options.limit,
        "seed": options.seed,
        "drafter": getattr(caller.model.generation_config, "drafter", None) or "head",
        "bootstrap_draws": DRAWS,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = evaluation_parser("bfcl", __doc__, limit=50)
    parser.add_argument(
        "--categories", nargs="+", default=list(NON_LIVE), choices=[*NON_LIVE, *LIVE], metavar="CATEGORY",
        help=f"of {', '.join((*NON_LIVE, *LIVE))}; by default those that are not live",
    )  # fmt: skip
    parser.add_argument("--decodings", nargs="+", default=["verified"], choices=generation.DECODINGS)
    parser.add_argument(
        "--tools", default="official", choices=TOOLS,
        help="show functions as the official runner does, or as BFCL has them, with the types of parameters",
    )  # fmt: skip
    parser.add_argument("--bfcl", type=Path, default=None, help="folder with BFCL_v4_*.json and possible_answer/")
    parser.add_argument("--checker-path", type=Path, default=None, help="folder that holds bfcl_eval, or its wheel")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    if options.limit < 0:
        parser.error(f"argument --limit: {options.limit} is negative; 0 takes all requests")
    return options


def load_caller(options: argparse.Namespace) -> Caller:
    """The model that the options name.

    Raises:
        ValueError: it cannot be loaded, or torch cannot use the device.
    """
    check_device(options.device)
    try:
        return Caller(options.model, options.device, options.dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"--model {options.model} on --device {options.device} cannot be loaded: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        checker = load_checker(options.checker_path)
        folder, source = find_data(options.bfcl, checker, options.data)
        entries = {category: read_entries(folder, category) for category in dict.fromkeys(options.categories)}
        caller = load_caller(options)
        deciding = {name: value for name, value in vars(options).items() if name not in ("out", "checker_path", "data")}
        kept = PartialResults(options.out, deciding | {"source": source})
    except (CheckerMissingError, DataMissingError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    # Values that are cut have a column of their own; a warning of each would tear the progress bars.
    logging.getLogger(TRANSFORMERS_DYNAMIC_MODULE_NAME).setLevel(logging.ERROR)
    with kept.kept_when_interrupted("answers"):
        results = measure(caller, entries, checker, kept, options)
    given = sys.argv[1:] if arguments is None else arguments
    report = {"command": shlex.join(["python", "-m", "eval.bfcl", *given])}
    report |= described(options, checker, source, caller) | results
    print(f"{table(report)}\n{LEGEND}")
    kept.finish(report)


if __name__ == "__main__":
    main()
