"""How long a call takes, and where the time goes: `python -m eval.latency`.

One factor at a time is varied around a centre: the prompt's length, the number of slots, the length of values, the
batch, the denoising steps, how many slots are drafted right, and the mode (warm, tools never seen before, prefix reuse,
compiled forwards, CUDA graphs), each for `verified` and, where it makes a difference, for `ar`, the reference. Requests
are made in code, so `--data` is not read, and the base is made to choose the call that a cell asks for: this measures
costs, not quality. `--shape smollm3-3b` takes random weights of SmolLM3-3B's shape instead of `--model`. Cells are
measured `--repeats` times (`--limit` bounds that), in an order drawn anew for each round. The first request of a cell
is not counted but reported apart. An interrupted run goes on from what it has.
"""

import argparse
import gc
import platform
import random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from eval.bench_decoding import load, threads
from eval.gold_choices import Shape, smollm3_shape
from eval.latency_measure import MODES, PHASES, REUSED, TOOLS, Cell, LeftOut, Maker, Runner
from eval.resumable import PartialResults, evaluation_parser, versions

FACTORS: dict[str, tuple[Any, ...]] = {
    "prompt": (128, 256, 512, 1024, 2048, 4096, 8192),
    "slots": (1, 2, 4, 8, 16),
    "value": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8, 16, 32),
    "steps": (1, 2, 4, 8),
    "accuracy": (1.0, 0.75, 0.5, 0.25, 0.0),
    "mode": tuple(MODES),
}
"""Fields of `Cell` that are varied, and their values; the centre is the default `Cell`."""
TITLES = {
    "prompt": "tokens of the prompt",
    "slots": "slots of the call",
    "value": "tokens of a value",
    "batch": "rows of a request",
    "steps": "denoising steps of a draft",
    "accuracy": "share of slots drafted right",
    "mode": "mode",
}
ONLY_DRAFTS = ("steps", "accuracy")
"""Factors that make no difference to `ar`."""
FIRST = 999
"""Number of the request that a cell begins with and that is not counted."""
CPU_LAYERS = 9
"""Layers of SmolLM3-3B's shape on a CPU: the shallowest base whose head has its due share of the time."""

METHOD = (
    f"Requests are made up: random words as prompt, {len(TOOLS)} tools of string parameters, one call. The base "
    "computes as it does and is made to choose the call; a draft costs what the head's costs, takes all of its steps "
    "and is wrong in as many slots as the cell says. What that simulation takes is not counted. Rows of a batch are "
    f"alike and end together. With prefix reuse, earlier requests began with the first {REUSED:.0%} of the prompt. "
    "Phases are means and add up to the mean latency; on an accelerator each border of a phase waits for the device, "
    "of which the mode 'warm, not split' has only those of the simulation."
)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        cells: all cells, each once.
        factors: of each factor, its values and their cells.
        left_out: why cells are not measured, by factor and value.
    """

    cells: list[Cell]
    factors: dict[str, list[tuple[Any, Cell]]]
    left_out: dict[str, str]


def plan(maker: Maker, factors: Sequence[str]) -> Plan:
    """Choose the cells that the model allows.

    Args:
        maker: makes the requests.
        factors: those that are varied.
    """
    made = Plan([], {name: [] for name in factors}, {})
    for name in factors:
        for value in FACTORS[name]:
            for decoding in ("verified",) if name in ONLY_DRAFTS else ("verified", "ar"):
                cell = replace(Cell(decoding=decoding), **{name: value})
                reason = _reason(maker, cell)
                if reason is not None:
                    made.left_out[f"{name} {value}"] = reason
                    continue
                made.factors[name].append((value, cell))
                if cell not in made.cells:
                    made.cells.append(cell)
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


def measure(runner: Runner, maker: Maker, cells: Sequence[Cell], repeats: int, found: PartialResults) -> None:
    """Measure what is not known yet: the first request of each cell, then rounds of all cells in an order drawn anew.

    Args:
        runner: runs the requests.
        maker: makes them.
        cells: what is measured.
        repeats: rounds.
        found: where results are kept.
    """
    numbers = {cell: number for number, cell in enumerate(cells)}
    todo = [[cell for cell in cells if _key(cell, repeat) not in found] for repeat in range(repeats)]
    warmed = [cell for cell in cells if any(cell in wanted for wanted in todo)]
    with tqdm(total=len(warmed) + sum(map(len, todo)), desc="latency", unit="request") as bar:
        for cell in warmed:
            request = maker.make(cell, numbers[cell], FIRST)
            first = runner.run(cell, request)
            # Compiled forwards may be compiled once more, or recorded, when they are run the second time.
            if MODES[cell.mode].compiled is not None:
                runner.run(cell, request)
            if _key(cell, FIRST) not in found:
                found.put(_key(cell, FIRST), first)
            bar.update()
        gc.collect()
        for repeat, wanted in enumerate(todo):
            chance = random.Random(f"order {maker.seed} {repeat}")
            for cell in chance.sample(wanted, len(wanted)):
                found.put(_key(cell, repeat), runner.run(cell, maker.make(cell, numbers[cell], repeat)))
                bar.update()


def _key(cell: Cell, repeat: int) -> str:
    return f"{cell} {repeat}"


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def summary(cell: Cell, runs: Sequence[Mapping[str, Any]], first: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell cost.

    Args:
        cell: the cell.
        runs: of its requests, from `Runner.run`.
        first: of the request in front of them.

    Returns:
        The cell's fields; milliseconds of a whole request: percentiles, range and mean, and mean ones by phase; calls
        and reply tokens per second at the median; a row's prompt tokens that a cache held; mean forwards; the share of
        drafted slots accepted (None for `ar`); milliseconds of the first request and of the simulation (mean), which
        are not in the others.
    """
    times = [sum(run["ms"].values()) for run in runs]
    p50, p95 = np.percentile(times, (50, 95), method="inverted_cdf").tolist()
    drafted = sum(run["drafted"] or 0 for run in runs)
    return {
        **asdict(cell),
        "requests": len(runs),
        "ms": {"p50": p50, "p95": p95, "min": min(times), "max": max(times), "mean": _mean(times)},
        "phases_ms": {phase: _mean([run["ms"][phase] for run in runs]) for phase in PHASES},
        "calls_per_second": 1000 * cell.batch / p50,
        "reply_tokens": runs[0]["tokens"],
        "reused_tokens": _mean([run["reused_tokens"] for run in runs]),
        "tokens_per_second": 1000 * cell.batch * runs[0]["tokens"] / p50,
        "base_forwards": _mean([run["base_forwards"] for run in runs]),
        "head_forwards": _mean([run["head_forwards"] for run in runs]),
        "accepted": sum(run["accepted"] for run in runs) / drafted if drafted else None,
        "first_ms": sum(first["ms"].values()),
        "simulation_ms": _mean([run["simulation_ms"] for run in runs]),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def rows_of(made: Plan, repeats: int, found: PartialResults) -> dict[str, list[dict[str, Any]]]:
    """Summaries by factor, in the order of its values."""
    return {
        name: [
            summary(cell, [found[_key(cell, repeat)] for repeat in range(repeats)], found[_key(cell, FIRST)])
            for _, cell in cells
        ]
        for name, cells in made.factors.items()
    }


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A factor's summaries as text, one cell a line."""
    columns = ("p50", "p95", "min", "max", "calls/s", "tok/s", "base", "head", "accept", "first", *PHASES)
    lines = [f"{TITLES[name]:30}{'decoding':10}" + "".join(f"{column:>9}" for column in columns)]
    for row in rows:
        accepted = "-" if row["accepted"] is None else f"{row['accepted']:.0%}"
        values = [f"{row['ms'][column]:.1f}" for column in ("p50", "p95", "min", "max")]
        values += [f"{row[column]:.1f}" for column in ("calls_per_second", "tokens_per_second")]
        values += [f"{row[column]:.1f}" for column in ("base_forwards", "head_forwards")]
        values += [accepted, f"{row['first_ms']:.0f}", *(f"{row['phases_ms'][phase]:.1f}" for phase in PHASES)]
        lines.append(f"{row[name]!s:30}{row['decoding']:10}" + "".join(f"{value:>9}" for value in values))
    return "\n".join(lines)


LEGEND = (
    "p50 to max: ms of a request, whatever its batch (p95 of few requests is their longest); base, head: forwards; "
    "accept: drafted slots that the base let stand; first: ms of the first request, its tools unknown, not counted; "
    "then mean ms by phase."
)


def plot(report: Mapping[str, Any], path: Path) -> bool:
    """Draw where the time goes, one panel of stacked bars a factor; False where matplotlib is missing.

    Args:
        report: the result, as it is written.
        path: the picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    factors = {name: rows for name, rows in report["factors"].items() if rows}
    figure = Figure(figsize=(10, 3.2 * len(factors)), layout="constrained")
    panels = figure.subplots(len(factors), 1, squeeze=False)[:, 0]
    for panel, (name, rows) in zip(panels, factors.items(), strict=True):
        places = range(len(rows))
        bottom = np.zeros(len(rows))
        for phase in PHASES:
            heights = np.array([row["phases_ms"][phase] for row in rows])
            panel.bar(places, heights, bottom=bottom, label=phase)
            bottom += heights
        panel.set_xticks(places, [f"{row[name]}\n{row['decoding']}".replace(", ", ",\n") for row in rows], fontsize=7)
        panel.set(title=TITLES[name], ylabel="ms, mean")
    panels[0].legend(ncols=len(PHASES), fontsize=7)
    figure.suptitle(f"{report['model']}, {report['device']}", fontsize=9)
    figure.savefig(path, dpi=120)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with defaults that depend on the device filled in."""
    parser = evaluation_parser("latency", __doc__, limit=0)
    parser.add_argument("--shape", default="model", choices=["model", "smollm3-3b"], help="what is measured")
    parser.add_argument("--layers", type=int, help=f"of the 36 of smollm3-3b; default: {CPU_LAYERS} on a CPU, else all")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 elsewhere"
    )
    parser.add_argument("--repeats", type=int, default=5, help="counted requests of each cell")
    parser.add_argument("--factors", nargs="+", default=list(FACTORS), choices=list(FACTORS), help="what is varied")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.limit < 0:
        parser.error("--repeats must be at least 1, --limit at least 0 (no bound)")
    cpu = options.device == "cpu"
    options.repeats = min(options.repeats, options.limit or options.repeats)
    options.dtype = options.dtype or ("float32" if cpu else "bfloat16")
    if options.shape == "smollm3-3b" and options.layers is None and cpu:
        options.layers = CPU_LAYERS
    return options


def shape_of(options: argparse.Namespace) -> Shape:
    """The model that is measured.

    Raises:
        SystemExit: there is no such device or model; says what to do.
    """
    dtype = getattr(torch, options.dtype)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {options.device}: torch finds no CUDA device here. Use --device cpu.")
    if options.shape == "smollm3-3b":
        return smollm3_shape(options.layers, seed=options.seed, device=options.device, dtype=dtype)
    try:
        return load(options.model, options.device, dtype)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--model {options.model}: no model could be loaded from there ({str(error).splitlines()[0]}). Give the "
            "folder of a model (config.json, model.safetensors, tokenizer.json) or the name of a Hub repo."
        ) from error


@contextmanager
def kept_when_interrupted(found: PartialResults) -> Iterator[None]:
    """End the command with one message where it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted. {len(found)} results are in {found.path}; the same command goes on from there.")
        raise SystemExit(130) from None


def device_name(device: torch.device) -> str:
    """The device, as its maker calls it where that is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def run(options: argparse.Namespace, command: str) -> None:
    """Measure, print the tables, write the result and draw it.

    Args:
        options: of the command.
        command: how it was called, for the result.

    Raises:
        SystemExit: nothing can be measured, or the run was interrupted; says what to do.
    """
    start = time.perf_counter()
    shape = shape_of(options)
    loaded = time.perf_counter()
    maker = Maker(shape, options.seed)
    runner = Runner(maker)  # reads the tokenizer's tokens
    ready = time.perf_counter()
    if (reason := _reason(maker, Cell())) is not None:
        raise SystemExit(f"This model cannot be measured: {reason}.")
    made = plan(maker, options.factors)
    deciding = ("model", "shape", "layers", "dtype", "device", "threads", "seed", "repeats", "factors")
    try:
        found = PartialResults(options.out, {name: getattr(options, name) for name in deciding})
    except ValueError as error:
        raise SystemExit(str(error)) from error
    with kept_when_interrupted(found):
        if "start" not in found:
            first = runner.run(Cell(), maker.make(Cell(), FIRST, FIRST))
            times = {"load_s": loaded - start, "vocabulary_s": ready - loaded, "first_ms": sum(first["ms"].values())}
            found.put("start", times)
        measure(runner, maker, made.cells, options.repeats, found)
    compiled = {mode: forwards.off for mode, forwards in runner.compiled.items() if forwards is not None}
    report = {
        "command": command,
        "method": METHOD,
        **surroundings(shape, options),
        "start": found["start"],
        "left_out": made.left_out,
        "not_compiled": {mode: parts for mode, parts in compiled.items() if parts},
        "factors": rows_of(made, options.repeats, found),
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
        "repeats": options.repeats,
        "centre": asdict(Cell()),
    }


def show(report: Mapping[str, Any]) -> None:
    """Print the tables."""
    print(f"\n{report['model']}, {report['device']}, {report['dtype']}, {report['threads']} threads")
    print(f"centre: {report['centre']}; {report['repeats']} requests a cell")
    start = report["start"]
    print(
        f"start: {start['load_s']:.1f} s to load, {start['vocabulary_s']:.2f} s to read the tokenizer's tokens, "
        f"{start['first_ms']:.0f} ms for the first request of all"
    )
    for name, rows in report["factors"].items():
        print(f"\n{table(name, rows)}")
    for what, reason in report["left_out"].items():
        print(f"left out: {what}: {reason}")
    for mode, parts in report["not_compiled"].items():
        print(f"not compiled in mode {mode}: {parts}")
    print(f"\n{LEGEND}\n{METHOD}\n{report['versions']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    command = shlex.join(["python", "-m", "eval.latency", *(sys.argv[1:] if arguments is None else arguments)])
    with threads(options.threads or torch.get_num_threads()):
        run(options, command)


if __name__ == "__main__":
    main()
