"""The plots of `python -m eval.report`: one function to read a plot's numbers out of the results, one to draw them.

Numbers are read without matplotlib, so that `--check` knows which plots there are; an empty reading means no plot. The
same numbers give the same file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from eval.card import Results
from eval.compare import is_ours

WIDTH = 8.0
"""Inches; with `DPI` the width of a README in pixels."""
DPI = 120
_OURS, _RIVALS = "tab:blue", "tab:orange"
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")


@dataclass(frozen=True)
class Plot:
    """A picture in docs/plots.

    Args:
        title: what it shows, also for those who cannot see it.
        read: takes the results, gives the numbers; empty where they were not measured.
        draw: puts them into an empty matplotlib figure of `WIDTH` inches, whose height it sets.
    """

    title: str
    read: Callable[[Results], Mapping[str, Any]]
    draw: Callable[[Any, Mapping[str, Any]], None]

    def save(self, numbers: Mapping[str, Any], path: Path) -> None:
        """Draw and write the PNG file.

        Args:
            numbers: from `read`, not empty.
            path: the file.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        figure.set_figwidth(WIDTH)
        self.draw(figure, numbers)
        figure.suptitle(self.title, size=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


# ---------------------------------------------------------------------------------------------------------------------
# Forwards per call against rivals
# ---------------------------------------------------------------------------------------------------------------------


def _compared(results: Results) -> dict[str, dict[str, float]]:
    """Set -> decoding -> base forwards per call."""
    sets = results.get("compare", {}).get("sets", {})
    return {
        name: {
            decoding: row["base_forwards_per_call"]
            for decoding, row in found["decodings"].items()
            if row["requests"] and row["base_forwards_per_call"] is not None
        }
        for name, found in sets.items()
        if found["answered_by_all_with_a_call"]
    }


def _benched(results: Results) -> dict[str, dict[str, float]]:
    """Set -> decoding -> base forwards of a call whose tool is given."""
    sets = results.get("bench_decoding", {}).get("sets", {})
    return {
        name: {
            decoding: row["base_forwards"]["mean"] for decoding, row in found["decodings"].items() if row["requests"]
        }
        for name, found in sets.items()
    }


def _draw_forwards(figure: Any, numbers: Mapping[str, Mapping[str, float]]) -> None:
    """Bars, a panel for each set; ours in another colour."""
    rows = max(map(len, numbers.values()))
    figure.set_figheight(0.9 + 0.26 * rows)
    panels = figure.subplots(1, len(numbers), squeeze=False)[0]
    names = list(dict.fromkeys(name for found in numbers.values() for name in found))
    for place, (panel, (title, found)) in enumerate(zip(panels, numbers.items(), strict=True)):
        values = [found.get(name, 0.0) for name in names]
        colours = [_OURS if is_ours(name.split(",")[0]) else _RIVALS for name in names]
        bars = panel.barh(range(len(names)), values, color=colours)
        panel.bar_label(bars, [f"{found[name]:.1f}" if name in found else "none" for name in names], padding=2, size=8)
        panel.set_yticks(range(len(names)), names if place == 0 else [""] * len(names), size=8)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.set_title(title, size=9)
        panel.set_xlabel("base forwards per call, mean", size=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# Latency against slots
# ---------------------------------------------------------------------------------------------------------------------


def _slot_times(results: Results) -> dict[str, dict[str, list[list[float]]]]:
    """Model -> decoding -> [slots, median, least, most] in ms."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name in ("latency", "latency_smollm3_3b"):
        result = results.get(name, {})
        for row in result.get("factors", {}).get("slots", []):
            ms = row["ms"]
            title = fill(f"{result['model']}, {result['device']}, {result['dtype']}", 60)
            lines = found.setdefault(title, {})
            lines.setdefault(row["decoding"], []).append([row["slots"], ms["p50"], ms["min"], ms["max"]])
    return found


def _draw_slot_times(figure: Any, numbers: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> None:
    """Lines with the range as a band, a panel for each model."""
    figure.set_figheight(3.6)
    panels = figure.subplots(1, len(numbers), squeeze=False)[0]
    for panel, (title, lines) in zip(panels, numbers.items(), strict=True):
        for colour, (decoding, points) in zip(_COLOURS, lines.items(), strict=False):
            slots, middle, least, most = zip(*points, strict=True)
            panel.plot(slots, middle, marker="o", color=colour, label=decoding)
            panel.fill_between(slots, least, most, color=colour, alpha=0.15, linewidth=0)
            panel.set_xticks(slots)
        panel.set_ylim(bottom=0)
        panel.set_title(title, size=8)
        panel.set_xlabel("slots of the call", size=9)
        panel.set_ylabel("ms per request, median and range", size=9)
        panel.tick_params(labelsize=8)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Quality against denoising steps
# ---------------------------------------------------------------------------------------------------------------------

_OF_STEPS = {
    "values right": "values right, one diffusion reply, %",
    "calls right": "calls right, one diffusion reply, %",
    "values accepted": "drafted values accepted by the base, %",
}


def _qualities(results: Results) -> dict[str, dict[str, list[list[float]]]]:
    """Column of `eval.decoding_ablation` -> set -> [steps, percent, lower end, upper end], by steps."""
    result = results.get("decoding_ablation", {})
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name, part in result.get("sets", {}).items():
        for choice, columns in part["choices"].items():
            steps = choice.removeprefix("steps ")
            if choice == "defaults":
                steps = str(result["defaults"]["num_diffusion_steps"])
            for column in _OF_STEPS:
                if steps.isdigit() and columns[column]["value"] is not None:
                    shares = (columns[column]["value"], *columns[column]["interval"])
                    points = found.setdefault(column, {}).setdefault(name, [])
                    points.append([int(steps), *(100 * share for share in shares)])
    several = any(len(points) > 1 for sets in found.values() for points in sets.values())
    return {
        column: {name: sorted(points) for name, points in sets.items()} for column, sets in found.items() if several
    }


def _draw_qualities(figure: Any, numbers: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> None:
    """Lines with 95% intervals, a panel for each column."""
    figure.set_figheight(3.4)
    for panel, (column, sets) in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers.items(), strict=True):
        for number, (colour, (name, points)) in enumerate(zip(_COLOURS, sets.items(), strict=False)):
            steps, middle, low, high = zip(*points, strict=True)
            places = [place + 0.06 * number for place in range(len(steps))]  # so that intervals stand side by side
            panel.plot(places, middle, marker="o", markersize=4, color=colour, label=name)
            panel.vlines(places, low, high, color=colour, alpha=0.5)
            panel.set_xticks(range(len(steps)), steps)
        panel.set_ylim(0, 100)
        panel.set_title(_OF_STEPS[column], size=7.5)
        panel.set_xlabel("most denoising steps", size=8)
        panel.tick_params(labelsize=8)
        panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize=8, title="set", title_fontsize=8)


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance by kind of slot
# ---------------------------------------------------------------------------------------------------------------------


def _acceptance(results: Results) -> dict[str, dict[str, list[float]]]:
    """Set -> kind of slot -> [share accepted, drafted slots]."""
    held_out = results.get("held_out", {})
    sets = {**held_out.get("sets", {}), **held_out.get("bfcl", {})}
    found = {
        name: {
            kind: [rates["slot_acceptance"], rates["drafted_slots"]]
            for kind, rates in decodings.get("verified", {}).get("accepted_by_kind", {}).items()
            if rates["drafted_slots"]
        }
        for name, decodings in sets.items()
    }
    return {name: kinds for name, kinds in found.items() if kinds}


def _draw_acceptance(figure: Any, numbers: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Dots, their area after the number of slots, a line for each kind."""
    kinds = sorted({kind for found in numbers.values() for kind in found})
    figure.set_figheight(1.2 + 0.42 * len(kinds))
    panel = figure.subplots()
    for line in range(1, len(kinds)):
        panel.axhline(line - 0.5, color="lightgray", linewidth=0.8, zorder=0)
    for number, (colour, (name, found)) in enumerate(zip(_COLOURS, numbers.items(), strict=False)):
        # Sets stand a little below each other, so that equal shares stay visible.
        shift = 0.6 * ((number + 0.5) / len(numbers) - 0.5)
        for kind, (share, slots) in found.items():
            panel.scatter(100 * share, kinds.index(kind) + shift, s=12 + 2 * slots, color=colour, alpha=0.75)
        panel.scatter([], [], s=40, color=colour, label=name)
    panel.set_yticks(range(len(kinds)), kinds, size=9)
    panel.set_ylim(len(kinds) - 0.5, -0.5)
    panel.set_xlim(-4, 104)
    panel.set_xlabel("drafted slots that the base lets stand, % (area: how many were drafted)", size=9)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", fontsize=8)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration
# ---------------------------------------------------------------------------------------------------------------------


def _calibration(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> set -> the ROC curve and the bins of P(call) of the way in which the model ships."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for source, measured in results.get("decision", {}).get("models", {}).items():
        model = "shipped model" if source == "." else source
        for name, ways in measured["sets"].items():
            values = ways.get("shipped", ways["0.5"])
            if "bins" in values:
                found.setdefault(model, {})[name] = {key: values[key] for key in ("roc", "auc", "bins", "ece_15")}
    return found


def _draw_calibration(figure: Any, numbers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Reliability and ROC curves side by side, a line of panels for each model."""
    figure.set_figheight(0.3 + 4.1 * len(numbers))
    lines = figure.subplots(len(numbers), 2, squeeze=False)
    for (left, right), (model, sets) in zip(lines, numbers.items(), strict=True):
        for colour, (name, values) in zip(_COLOURS, sets.items(), strict=False):
            said = [one["confidence"] for one in values["bins"]]
            wanted = [one["accuracy"] for one in values["bins"]]
            left.plot(said, wanted, color=colour, label=f"{name}, error {values['ece_15']:.2f}")
            left.scatter(said, wanted, s=[8 + 2 * one["count"] for one in values["bins"]], color=colour, alpha=0.6)
            right.plot(*zip(*values["roc"], strict=True), color=colour, label=f"{name}, area {values['auc']:.2f}")
        for panel in (left, right):
            panel.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle="--")
            panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
            panel.tick_params(labelsize=8)
            panel.legend(fontsize=8, loc="lower right")
        left.set_title(f"{model}: reliability (area of a dot: prompts)", size=9)
        left.set_xlabel("P(call), mean of a bin", size=9)
        left.set_ylabel("share of prompts that want a call", size=9)
        right.set_title(f"{model}: ROC", size=9)
        right.set_xlabel("called where unwanted, share", size=9)
        right.set_ylabel("called where wanted, share", size=9)


PLOTS = {
    "forwards": Plot("Forwards of the base per call (blue: this repository)", _compared, _draw_forwards),
    "forwards_tool_given": Plot(
        "Forwards of the base per call, the tool given (blue: this repository)", _benched, _draw_forwards
    ),
    "latency_slots": Plot("Latency against the number of slots of a call", _slot_times, _draw_slot_times),
    "steps": Plot(
        "Quality against denoising steps, drafts of the head (bars: 95% intervals)", _qualities, _draw_qualities
    ),
    "acceptance": Plot("Acceptance of drafts by kind of slot, verified decoding", _acceptance, _draw_acceptance),
    "calibration": Plot("P(call) against what prompts want", _calibration, _draw_calibration),
}
"""By the name of the file, without its ending."""
