"""How the held-out numbers of a training run moved: `python -m eval.learning_curve runs/base --rows_per_step 14`.

Reads the `trainer_state.json` of one run, or of several that went on from each other; prints a Markdown table of the
evaluations, writes the same as JSON and, where asked for and matplotlib is installed, as a picture.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repo_package import ROOT

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Args:
        run: number of the run, from 0.
        step: optimizer steps until then, those of the runs before included.
        tokens: trained on until then, padding included; None where the rows of a step are not known.
        minutes: training took until then, with evaluations and checkpoints; None likewise.
        metrics: what was measured, such as `seen_loss`.
    """

    run: int
    step: int
    tokens: int | None
    minutes: float | None
    metrics: dict[str, float]

    def shown(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        place = {"run": self.run, "step": self.step, "tokens": self.tokens, "minutes": self.minutes}
        return {name: value for name, value in place.items() if value is not None} | self.metrics


@dataclass(frozen=True)
class Curve:
    """The evaluations of runs, and what the runs took to their end.

    Args:
        points: in order.
        steps, tokens, minutes: of all runs together, up to the last log line; see `Point`.
    """

    points: list[Point]
    steps: int
    tokens: int | None
    minutes: float | None


def state_file(path: Path) -> Path:
    """The state of a run: the file itself, or that of a run's folder, of its newest checkpoint while it goes on.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return path
    checkpoints = sorted(path.glob(f"checkpoint-*/{STATE_FILE}"), key=lambda p: int(p.parent.name.rpartition("-")[2]))
    found = [*checkpoints, *path.glob(STATE_FILE)]
    if not found:
        raise FileNotFoundError(f"{path}: there is no {STATE_FILE} in it or in a checkpoint; is it the run's output?")
    return found[-1]


def curve(states: Sequence[Mapping[str, Any]], rows_per_step: Sequence[int] | None) -> Curve:
    """The evaluations of runs that went on from each other.

    Log lines hold rows and tokens per second since the line before; with the rows of a step, the same for a whole run,
    that gives the seconds. A pause between a checkpoint and its resumption is not counted.

    Args:
        states: contents of `trainer_state.json`, in the order of the runs.
        rows_per_step: of each run: rows of a forward on average x accumulation x processes.

    Returns:
        The curve.

    Raises:
        ValueError: a log line has no rate, though rows of a step were given.
    """
    points: list[Point] = []
    offset, seconds, tokens = 0, 0.0, 0.0
    for run, state in enumerate(states):
        last = 0
        for line in state["log_history"]:
            measured = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
            measured.pop("seconds", None)
            if "loss" in line and rows_per_step:
                rate = line.get("rows_per_second")
                if not rate:
                    raise ValueError(f"Run {run}, step {line['step']}: rows_per_second is {rate}; leave out the rows.")
                passed = (line["step"] - last) * rows_per_step[run] / rate
                seconds, tokens, last = seconds + passed, tokens + passed * line["tokens_per_second"], line["step"]
            if measured:
                metrics = {name: round(value, 4) for name, value in measured.items()}
                points.append(Point(run, offset + line["step"], *_spent(tokens, seconds), metrics))
        offset += state["global_step"]
    return Curve(points, offset, *_spent(tokens, seconds))


def _spent(tokens: float, seconds: float) -> tuple[int | None, float | None]:
    return (round(tokens), round(seconds / 60, 1)) if seconds else (None, None)


def table(found: Curve) -> str:
    """The evaluations as a Markdown table, with the totals behind it."""
    names = list(dict.fromkeys(name for point in found.points for name in point.metrics))
    timed = found.minutes is not None
    header = ["step", *(["tokens", "minutes"] if timed else []), *(name.replace("_", " ") for name in names)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for point in found.points:
        spent = [f"{(point.tokens or 0) / 1e6:.2f}M", f"{point.minutes or 0:.0f}"] if timed else []
        values = [f"{point.metrics[name]:.3f}" if name in point.metrics else "" for name in names]
        lines.append(f"| {' | '.join([str(point.step), *spent, *values])} |")
    spent_in_all = f", {(found.tokens or 0) / 1e6:.2f}M tokens, {found.minutes:.0f} minutes" if timed else ""
    return "\n".join([*lines, "", f"In all {found.steps} steps{spent_in_all}."])


def picture(found: Curve, path: Path) -> bool:
    """Draw losses beside all other measures, over tokens or else over steps.

    Args:
        found: the curve.
        path: of the PNG file.

    Returns:
        Whether it was drawn: not where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: pip install matplotlib", file=sys.stderr)
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    timed = found.minutes is not None
    for axes, losses in zip(figure.subplots(1, 2), (True, False), strict=True):
        names = dict.fromkeys(name for point in found.points for name in point.metrics)
        for name in (name for name in names if name.endswith("loss") == losses):
            with_it = [point for point in found.points if name in point.metrics]
            places = [(point.tokens or 0) / 1e6 if timed else point.step for point in with_it]
            axes.plot(places, [point.metrics[name] for point in with_it], marker=".", label=name.replace("_", " "))
        axes.set_xlabel("million tokens" if timed else "steps")
        axes.set_ylabel("loss" if losses else "share")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help=f"folders of runs or {STATE_FILE} files, in order")
    parser.add_argument(
        "--rows_per_step",
        type=int,
        nargs="+",
        help="rows_per_batch x gradient_accumulation_steps x processes, of all runs or of each: gives tokens, minutes",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "base_curve.json")
    parser.add_argument("--png", type=Path, help="picture to draw as well, such as docs/base_curve.png")
    options = parser.parse_args(arguments)
    rows, count = options.rows_per_step, len(options.runs)
    if rows and (len(rows) not in (1, count) or min(rows) < 1):
        parser.error(f"--rows_per_step takes one number from 1 on, or one for each of the {count} runs")
    rows = rows * count if rows and len(rows) == 1 else rows
    try:
        states = [json.loads(state_file(path).read_text(encoding="utf-8")) for path in options.runs]
        found = curve(states, rows)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if not found.points:
        parser.error(f"{', '.join(map(str, options.runs))}: there is no evaluation yet")
    print(table(found))
    shown = {
        "rows_per_step": rows,
        "steps": found.steps,
        "tokens": found.tokens,
        "minutes": found.minutes,
        "points": [point.shown() for point in found.points],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(shown) + "\n", encoding="utf-8")
    if options.png:
        picture(found, options.png)


if __name__ == "__main__":
    main()
