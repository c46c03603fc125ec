"""How long a call takes, and where the time goes: `python -m eval.latency`.

One factor at a time is varied around a centre: the prompt's length, the number of slots, the length of values, the
batch, the denoising steps, how many slots are drafted right, and the mode (warm, tools never seen before, prefix reuse,
compiled forwards, CUDA graphs), each for `verified` and for `ar`, the reference. Requests are made in code, so `--data`
is not read, and the base is made to choose the call that a cell asks for: this measures costs, not quality.

Cells are measured in rounds of one request each, in an order drawn anew for each round: `--limit` rounds, or as many as
end within `--minutes`, but at least one. The first request of a cell is not counted but reported apart.
`--shape smollm3-3b` takes random weights of SmolLM3-3B's shape instead of `--model`; on a CPU it is cut to 9 of its 36
layers and measured in few cells around a shorter prompt, unless `--layers` and `--cells` say otherwise. An interrupted
run goes on from what it has.
"""

import argparse
import gc
import itertools
import random
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from eval.bench_decoding import load, threads
from eval.devices import check_device, device_name
from eval.gold_choices import Shape, smollm3_shape
from eval.latency_measure import MODES, PHASES, REUSED, TOOLS, Cell, LeftOut, Maker, Runner
from eval.resumable import PartialResults, evaluation_parser, versions


@dataclass(frozen=True)
class Grid:
    """What is varied around a centre.

    Args:
        centre: the cell that all others differ from in one field.
        factors: fields of `Cell` and their values.
    """

    centre: Cell
    factors: Mapping[str, tuple[Any, ...]]


GRIDS = {
    "all": Grid(
        Cell(),
        {
            "prompt": (128, 256, 512, 1024, 2048, 4096, 8192),
            "slots": (1, 2, 4, 8, 16),
            "value": (1, 2, 4, 8, 16),
            "batch": (1, 2, 4, 8, 16, 32),
            "steps": (1, 2, 4, 8),
            "accuracy": (1.0, 0.75, 0.5, 0.25, 0.0),
            "mode": tuple(MODES),
        },
    ),
    "few": Grid(
        Cell(prompt=128),
        {
            "prompt": (128, 256),
            "slots": (1, 4, 8),
            "value": (1, 4, 8),
            "batch": (1, 4),
            "steps": (1, 4),
            "accuracy": (1.0, 0.5, 0.0),
            "mode": ("warm", "new tools", "prefix reuse"),
        },
    ),
}
"""By the names of `--cells`."""
TITLES = {
    "prompt": "tokens of the prompt",
    "slots": "slots of the call",
    "value": "tokens of a value",
    "batch": "rows of a request",
    "steps": "denoising steps of a draft",
    "accuracy": "slots drafted right",
    "mode": "mode",
}
ONLY_DRAFTS = ("steps", "accuracy")
"""Factors that make no difference to `ar`, which is measured once beside them."""
FIRST = 999999
"""Number of the request that a cell begins with and that is not counted."""
CPU_LAYERS = 9
"""Layers of SmolLM3-3B's shape on a CPU: the shallowest base whose head has its due share of the time."""

METHOD = (
    f"Requests are made up: random words as prompt, {len(TOOLS)} tools of string parameters, one call. The base "
    "computes as it does and is made to choose the call; a draft costs what the head's costs, takes all of its steps "
    "and is wrong in as many slots as the cell says; the rest of a corrected value is then drafted right. What that "
    "simulation takes is not counted. Rows of a batch are alike and end together. With prefix reuse, earlier requests "
    f"began with the first {REUSED:.0%} of the prompt. Phases are means and add up to the mean latency; on an "
    "accelerator each border of a phase waits for the device; the mode 'warm, not split' has only the borders of the "
    "simulation and tells what the others cost."
)


@dataclass
class Plan:
    """What is measured.

    Args:
        grid: the cells that are wanted.
        cells: those that can be measured, each once.
        factors: of each factor, the cells of its table.
        left_out: why cells are not measured, by factor and value.
    """

    grid: Grid
    cells: list[Cell] = field(default_factory=list)
    factors: dict[str, list[Cell]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def reference(self, cell: Cell) -> Cell:
        """The cell of `ar` that a cell is compared with."""
        centre = self.grid.centre
        return replace(cell, decoding="ar", **{name: getattr(centre, name) for name in ONLY_DRAFTS})

    def leave_out(self, cells: Mapping[Cell, str]) -> None:
        """Drop cells that turned out not to be measurable.

        Args:
            cells: which, and why.
        """
        for name, found in self.factors.items():
            for cell in found:
                if cell in cells:
                    self.left_out[f"{name} {getattr(cell, name)}, {cell.decoding}"] = cells[cell]
            self.factors[name] = [cell for cell in found if cell not in cells]
        self.cells = [cell for cell in self.cells if cell not in cells]


def plan(maker: Maker, grid: Grid, factors: Sequence[str]) -> Plan:
    """Choose the cells that the model allows.

    Args:
        maker: makes the requests.
        grid: the cells that are wanted.
        factors: those that are varied.
    """
    made = Plan(grid)
    for name in factors:
        found = made.factors[name] = []
        for value in grid.factors[name]:
            cell = replace(grid.centre, **{name: value})
            reason = _reason(maker, cell)
            if reason is None:
                found += [cell] if name in ONLY_DRAFTS else [cell, made.reference(cell)]
            else:
                made.left_out[f"{name} {value}"] = reason
        if name in ONLY_DRAFTS:
            found.append(made.reference(grid.centre))
    made.cells = list(dict.fromkeys(itertools.chain.from_iterable(made.factors.values())))
    return made


def _reason(maker: Maker, cell: Cell) -> str | None:
    """Why a cell cannot be measured; None where it can."""
    graphs = MODES[cell.mode].compiled == "reduce-overhead"
    if graphs and maker.shape.model.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    try:
        maker.make(cell, 0, 0)
    except LeftOut as reason:
        return str(reason)
    return None


@dataclass
class Measurement:
    """Measures cells and keeps what they take.

    Args:
        runner: runs the requests.
        maker: makes them.
        plan: what is measured; the places of its cells name their tools.
        found: where results are kept.
    """

    runner: Runner
    maker: Maker
    plan: Plan
    found: PartialResults

    def __post_init__(self) -> None:
        self._numbers = {cell: number for number, cell in enumerate(self.plan.cells)}

    def first_requests(self) -> None:
        """Run the first request of each cell, of an earlier run's cells too, so that all are warm.

        Leaves out cells that cannot be measured: those that the device's memory does not hold, and those of compiled
        modes of which nothing could be compiled.
        """
        lost = {}
        for cell in tqdm(self.plan.cells, "first requests", unit="request"):
            request = self.maker.make(cell, self._numbers[cell], FIRST)
            try:
                first = self.runner.run(cell, request)
            except torch.OutOfMemoryError:
                lost[cell] = "the device has too little memory"
                gc.collect()
                torch.accelerator.empty_cache()
                continue
            used, reasons = ("base",) if cell.decoding == "ar" else ("base", "head"), first["uncompiled"]
            if all(part in reasons for part in used):
                lost[cell] = "; ".join(dict.fromkeys(reasons[part] for part in used))
                continue
            # Compiled forwards may be compiled once more, or recorded, when they are run the second time.
            if MODES[cell.mode].compiled is not None:
                self.runner.run(cell, request)
            if _key(cell, FIRST) not in self.found:
                self.found.put(_key(cell, FIRST), first)
        gc.collect()
        self.plan.leave_out(lost)

    def rounds(self, limit: int, end: float) -> int:
        """Run rounds of one request a cell.

        Args:
            limit: most rounds; 0 = as many as fit.
            end: when no round may run any more, on `time.monotonic`'s clock; the first one is run in any case.

        Returns:
            How many rounds are complete.
        """
        number, expected = 0, 0.0
        while not number or number != limit:
            wanted = [cell for cell in self.plan.cells if _key(cell, number) not in self.found]
            start = time.monotonic()
            if number and wanted and start + expected > end:
                break
            for cell in tqdm(self.order(wanted, number), f"round {number + 1}", unit="request", leave=False):
                request = self.maker.make(cell, self._numbers[cell], number)
                self.found.put(_key(cell, number), self.runner.run(cell, request))
            if wanted:
                expected = (time.monotonic() - start) / len(wanted) * len(self.plan.cells)
            number += 1
        return number

    def order(self, cells: Sequence[Cell], number: int) -> list[Cell]:
        """Cells in the order of a round: by chance, but what is compared stands together, for load that comes and goes.

        Args:
            cells: which.
            number: of the round.
        """
        drawn = random.Random(f"order {self.maker.seed} {number}").sample(cells, len(cells))
        rank: dict[Cell, int] = {}
        for cell in drawn:
            rank.setdefault(self.plan.reference(cell), len(rank))
        return sorted(drawn, key=lambda cell: rank[self.plan.reference(cell)])


def _key(cell: Cell, repeat: int) -> str:
    return f"{cell} {repeat}"


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def summary(
    cell: Cell,
    runs: Sequence[Mapping[str, Any]],
    first: Mapping[str, Any],
    reference: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What a cell cost.

    Args:
        cell: the cell.
        runs: of its requests, from `Runner.run`.
        first: of the request in front of them.
        reference: of the requests of `ar` in the same rounds; empty for `ar` itself and where it was left out.

    Returns:
        The cell's fields; milliseconds of a whole request: percentiles, range and mean, and mean ones by phase; the
        median of its ratio to `ar` in the same round; calls and reply tokens per second at the median; a row's prompt
        tokens that a cache held; mean forwards; the share of drafted slots accepted (None for `ar`); milliseconds of
        the first request and of the simulation (mean), which are not in the others.
    """
    times = [_total(run) for run in runs]
    p50, p95 = np.percentile(times, (50, 95), method="inverted_cdf").tolist()
    drafted = sum(run["drafted"] or 0 for run in runs)
    ratios = [ours / _total(theirs) for ours, theirs in zip(times, reference, strict=bool(reference))]
    return {
        **asdict(cell),
        "requests": len(runs),
        "ms": {"p50": p50, "p95": p95, "min": min(times), "max": max(times), "mean": _mean(times)},
        "phases_ms": {phase: _mean([run["ms"][phase] for run in runs]) for phase in PHASES},
        "of_ar": median(ratios) if ratios else None,
        "calls_per_second": 1000 * cell.batch / p50,
        "reply_tokens": runs[0]["tokens"],
        "reused_tokens": _mean([run["reused_tokens"] for run in runs]),
        "tokens_per_second": 1000 * cell.batch * runs[0]["tokens"] / p50,
        "base_forwards": _mean([run["base_forwards"] for run in runs]),
        "head_forwards": _mean([run["head_forwards"] for run in runs]),
        "accepted": sum(run["accepted"] for run in runs) / drafted if drafted else None,
        "first_ms": _total(first),
        "simulation_ms": _mean([run["simulation_ms"] for run in runs]),
    }


def _total(run: Mapping[str, Any]) -> float:
    """Milliseconds of a request."""
    return float(sum(run["ms"].values()))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def rows_of(made: Plan, rounds: int, found: PartialResults) -> dict[str, list[dict[str, Any]]]:
    """Summaries by factor, in the order of its values."""

    def runs(cell: Cell) -> list[Mapping[str, Any]]:
        return [found[_key(cell, number)] for number in range(rounds)]

    def row(cell: Cell) -> dict[str, Any]:
        compared = cell.decoding != "ar" and made.reference(cell) in made.cells
        reference = runs(made.reference(cell)) if compared else []
        return summary(cell, runs(cell), found[_key(cell, FIRST)], reference)

    return {name: [row(cell) for cell in cells] for name, cells in made.factors.items()}


COLUMNS = ("p50", "p95", "of ar", "first", "calls/s", "tok/s", "base", "head", "accept")
LEGEND = (
    "p50, p95: ms of a request, whatever its batch (p95 of few requests is their longest); of ar: its ratio to ar in "
    "the same round, median; first: ms of the first request, its tools unknown, not counted (of a compiled mode with "
    "compiling, as far as an earlier cell, or torch's cache on disk, has not done it); base, head: forwards; accept: "
    "drafted slots that the base let stand."
)


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What a factor's cells took, one a line.

    Args:
        name: of the factor.
        rows: from `summary`.
    """
    lines = [_line((TITLES[name], "decoding", *COLUMNS))]
    for row in rows:
        cells = [f"{row['ms'][column]:.1f}" for column in ("p50", "p95")]
        cells += ["" if row["of_ar"] is None else f"{row['of_ar']:.2f}", f"{row['first_ms']:.0f}"]
        columns = ("calls_per_second", "tokens_per_second", "base_forwards", "head_forwards")
        cells += [f"{row[column]:.1f}" for column in columns]
        cells.append("" if row["accepted"] is None else f"{row['accepted']:.0%}")
        lines.append(_line((label(name, row), row["decoding"], *cells)))
    return "\n".join(lines)


def phase_table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the time of a factor's cells went, one a line; mean milliseconds.

    Args:
        name: of the factor.
        rows: from `summary`.
    """
    lines = [_line((TITLES[name], "decoding", "mean ms", *PHASES))]
    for row in _split(rows):
        cells = [row["ms"]["mean"], *(row["phases_ms"][phase] for phase in PHASES)]
        lines.append(_line((label(name, row), row["decoding"], *(f"{cell:.1f}" for cell in cells))))
    return "\n".join(lines)


def _split(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows whose phases were timed."""
    return [row for row in rows if MODES[row["mode"]].split]


def label(name: str, row: Mapping[str, Any]) -> str:
    """The value of a factor in a row, in words."""
    if name in ONLY_DRAFTS and row["decoding"] == "ar":
        return "any"
    return f"{row[name]:.0%}" if name == "accuracy" else str(row[name])


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:28}{cells[1]:10}" + "".join(f"{cell:>9}" for cell in cells[2:])


def plot(report: Mapping[str, Any], path: Path) -> bool:
    """Draw where the time goes, one panel of stacked bars a factor, a batch per row; False where matplotlib is missing.

    Args:
        report: the result, as it is written.
        path: the picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    factors = {name: _split(rows) for name, rows in report["factors"].items() if rows}
    figure = Figure(figsize=(10, 3.2 * len(factors)), layout="constrained")
    panels = figure.subplots(len(factors), 1, squeeze=False)[:, 0]
    for panel, (name, rows) in zip(panels, factors.items(), strict=True):
        places = range(len(rows))
        bottom = np.zeros(len(rows))
        for phase in PHASES:
            heights = np.array([row["phases_ms"][phase] / row["batch"] for row in rows])
            panel.bar(places, heights, bottom=bottom, label=phase)
            bottom += heights
        panel.set_xticks(
            places, [f"{label(name, row)}\n{row['decoding']}".replace(", ", ",\n") for row in rows], fontsize=7
        )
        panel.set(title=TITLES[name], ylabel="ms per row, mean")
    figure.suptitle(f"{report['model']}, {report['device']}", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), fontsize=8)
    figure.savefig(path, dpi=120)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with defaults that depend on the device filled in."""
    parser = evaluation_parser("latency", __doc__, limit=50)
    parser.add_argument("--minutes", type=float, default=8, help="no round is begun that would end later")
    parser.add_argument("--shape", default="model", choices=["model", "smollm3-3b"], help="what is measured")
    parser.add_argument("--layers", type=int, help=f"of the 36 of smollm3-3b; default: {CPU_LAYERS} on a CPU, else all")
    parser.add_argument("--cells", choices=list(GRIDS), help="default: few for smollm3-3b on a CPU, else all")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 elsewhere"
    )
    parser.add_argument("--factors", nargs="+", default=list(TITLES), choices=list(TITLES), help="what is varied")
    options = parser.parse_args(arguments)
    if options.limit < 0 or options.minutes <= 0:
        parser.error("--limit must be at least 0 (as many rounds as fit), --minutes more than 0")
    if options.layers is not None and (options.shape == "model" or not 1 <= options.layers <= 36):
        parser.error("--layers goes with --shape smollm3-3b and is from 1 to 36")
    cpu = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if cpu else "bfloat16")
    options.cells = options.cells or ("few" if cpu and options.shape == "smollm3-3b" else "all")
    if options.shape == "smollm3-3b" and options.layers is None and cpu:
        options.layers = CPU_LAYERS
    return options


def shape_of(options: argparse.Namespace) -> Shape:
    """The model that is measured.

    Raises:
        SystemExit: there is no such device or model; says what to do.
    """
    dtype = getattr(torch, options.dtype)
    try:
        check_device(options.device)
    except ValueError as error:
        raise SystemExit(f"eval.latency: {error}") from error
    if options.shape == "smollm3-3b":
        return smollm3_shape(options.layers, seed=options.seed, device=options.device, dtype=dtype)
    try:
        return load(options.model, options.device, dtype)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"eval.latency: --model {options.model}: no model could be loaded from there "
            f"({str(error).splitlines()[0]}). Give the folder of a model (config.json, model.safetensors, "
            "tokenizer.json) or the name of a Hub repo."
        ) from error


def run(options: argparse.Namespace, command: str) -> None:
    """Measure, print the tables, write the result and draw it.

    Args:
        options: of the command.
        command: how it was called, for the result.

    Raises:
        SystemExit: nothing can be measured, or the run was interrupted; says what to do.
    """
    start = time.monotonic()
    shape = shape_of(options)
    loaded = time.monotonic()
    maker = Maker(shape, options.seed)
    runner = Runner(maker)  # reads the tokenizer's tokens
    times = {"load_s": loaded - start, "vocabulary_s": time.monotonic() - loaded}
    grid = GRIDS[options.cells]
    if (reason := _reason(maker, grid.centre)) is not None:
        raise SystemExit(f"eval.latency: this model cannot be measured: {reason}.")
    made = plan(maker, grid, options.factors)
    deciding = ("model", "shape", "layers", "cells", "dtype", "device", "threads", "seed", "factors")
    try:
        found = PartialResults(options.out, {name: getattr(options, name) for name in deciding})
    except (OSError, ValueError) as error:
        raise SystemExit(f"eval.latency: {error}") from error
    with found.kept_when_interrupted():
        if "start" not in found:
            first = runner.run(grid.centre, maker.make(grid.centre, FIRST, FIRST))
            found.put("start", times | {"first_ms": _total(first)})
        measurement = Measurement(runner, maker, made, found)
        measurement.first_requests()
        rounds = measurement.rounds(options.limit, start + 60 * options.minutes)
    report = {
        "command": command,
        "method": METHOD,
        **surroundings(shape, options),
        "rounds": rounds,
        "start": found["start"],
        "left_out": made.left_out,
        "not_compiled": {
            f"{cell.mode}, {cell.decoding}": parts
            for cell in made.cells
            if (parts := found[_key(cell, FIRST)]["uncompiled"])
        },
        "factors": rows_of(made, rounds, found),
    }
    show(report)
    found.finish(report)
    picture = options.out.with_suffix(".png")
    drawn = f"{picture}" if plot(report, picture) else "no plot: matplotlib is missing (pip install matplotlib)"
    print(f"\n{options.out}; {drawn}")


def surroundings(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """What the times depend on besides the cells."""
    return {
        "model": shape.label,
        "device": device_name(shape.model.device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "seed": options.seed,
        "centre": asdict(GRIDS[options.cells].centre),
    }


def show(report: Mapping[str, Any]) -> None:
    """Print the tables."""
    print(f"\n{report['model']}, {report['device']}, {report['dtype']}, {report['threads']} threads")
    print(f"centre: {report['centre']}; {report['rounds']} requests a cell")
    start = report["start"]
    print(
        f"start: {start['load_s']:.1f} s to load, {start['vocabulary_s']:.2f} s to read the tokenizer's tokens, "
        f"{start['first_ms']:.0f} ms for the first request of all"
    )
    for name, rows in report["factors"].items():
        print(f"\n{table(name, rows)}")
    print(f"\n{LEGEND}\n\nWhere the time goes:")
    for name, rows in report["factors"].items():
        print(f"\n{phase_table(name, rows)}")
    print()
    for what, reason in report["left_out"].items():
        print(f"left out: {what}: {reason}")
    for mode, parts in report["not_compiled"].items():
        print(f"not compiled in {mode}: {parts}")
    print(f"\n{METHOD}\n{report['versions']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    command = shlex.join(["python", "-m", "eval.latency", *(sys.argv[1:] if arguments is None else arguments)])
    with threads(options.threads or torch.get_num_threads()):
        run(options, command)


if __name__ == "__main__":
    main()
