"""Tables, plots and metadata of the documentation, out of the committed results: `python -m eval.report`.

Reads eval/results/*.json and writes docs/evaluation.md, the pictures in docs/plots, the parts of README.md between
`<!-- results: NAME -->` and `<!-- end of results: NAME -->`, and its front matter (`eval.card`). Of a result that is
missing, one line says which command makes it. `--check` writes nothing and ends with status 1 where texts are not in
step with the results; pictures are only looked for.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import report_tables, widget
from eval.card import Results, front_matter, metadata, with_metadata
from eval.report_plots import PLOTS
from repo_package import ROOT

PREFACE = (
    "# Evaluation\n\nMade by `python -m eval.report` (`make report`) out of the files in `eval/results`; do not edit. "
    "`make evaluate` measures all of it anew. The revision of a result is that which last changed its file: "
    "`git log -1 -- eval/results/NAME.json`."
)


class ReportError(RuntimeError):
    """A file that the report needs cannot be used; says which, and what to do."""


@dataclass(frozen=True)
class Section:
    """What is shown of one result file.

    Args:
        title: of the section in docs/evaluation.md.
        command: makes the file.
        body: gives the section's paragraphs.
        plots: names of `PLOTS` that follow them.
        summary: gives the paragraphs of the README; None where the result is not in it.
        pictures: names of `PLOTS` that follow those.
    """

    title: str
    command: str
    body: Callable[[Mapping[str, Any]], list[str]]
    plots: Sequence[str] = ()
    summary: Callable[[Mapping[str, Any]], list[str]] | None = None
    pictures: Sequence[str] = ()


def shown_by(module: str) -> Callable[[Mapping[str, Any]], list[str]]:
    """The `body` of a module of eval, imported when its result is there: it may need packages of an extra."""
    return lambda result: importlib.import_module(f"eval.{module}").body(result)


SECTIONS = {
    "compare": Section(
        "Ways of calling tools side by side",
        "python -m eval.compare",
        report_tables.compare_body,
        ["forwards"],
        report_tables.compare_summary,
        ["forwards"],
    ),
    "bfcl": Section("BFCL, official checker", "python -m eval.bfcl", report_tables.bfcl_body),
    "held_out": Section(
        "Held-out requests",
        "python -m eval.held_out",
        report_tables.held_out_body,
        ["acceptance"],
        report_tables.held_out_summary,
    ),
    "bench_decoding": Section(
        "What decoding a call costs when the tool is given",
        "python -m eval.bench_decoding",
        report_tables.bench_body,
        ["forwards_tool_given"],
    ),
    "latency": Section("Latency", "python -m eval.latency", report_tables.latency_body, ["latency_slots"]),
    "latency_smollm3_3b": Section(
        "Latency on SmolLM3-3B's shape",
        "python -m eval.latency --shape smollm3-3b --out eval/results/latency_smollm3_3b.json",
        report_tables.latency_body,
    ),
    "footprint": Section("Smaller models", "python -m eval.footprint", shown_by("footprint")),
    "footprint_compiled": Section(
        "Compiled forwards",
        'python -m eval.footprint --variants "float32, compiled" --limit 4 --out eval/results/footprint_compiled.json',
        shown_by("footprint"),
    ),
    "load_test": Section("Serving under load", "python -m eval.load_test", shown_by("load_test")),
    "tool_retrieval": Section("Hundreds of tools", "python -m eval.tool_retrieval", shown_by("tool_retrieval")),
    "chat": Section("Talking is untouched", "python -m eval.chat", report_tables.chat_body),
    "decision": Section("When to call", "python -m eval.decision", report_tables.decision_body, ["calibration"]),
    "decoding_ablation": Section(
        "Choices of decoding", "python -m eval.decoding_ablation", report_tables.decoding_ablation_body, ["steps"]
    ),
    "ablation": Section("Choices of training", "python -m eval.ablation", report_tables.ablation_body),
    "widget": Section("Examples of the card's widget", "python -m eval.widget", widget.body),
    "audit": Section(
        "What training shares with evaluation",
        "python -m training.audit overlap",
        report_tables.audit_body,
        summary=report_tables.audit_summary,
    ),
}
"""By the name of the result file."""


# ---------------------------------------------------------------------------------------------------------------------
# Results and what is said of them
# ---------------------------------------------------------------------------------------------------------------------


def read_results(root: Path) -> dict[str, dict[str, Any]]:
    """The result files that are there, by name.

    Args:
        root: folder of the repository.

    Raises:
        ReportError: a file is broken.
    """
    found = {}
    for name, section in SECTIONS.items():
        path = root / "eval" / "results" / f"{name}.json"
        if path.exists():
            try:
                found[name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ReportError(
                    f"{path} is no JSON ({error}). Remove it, or make it anew: {section.command}"
                ) from error
    return found


def paragraphs(
    name: str, results: Results, shown: Callable[[Mapping[str, Any]], list[str]], plots: Sequence[str], folder: str
) -> list[str]:
    """What is said of a result: its command, what it was measured with, its tables, its pictures.

    Args:
        name: of the result.
        results: all results.
        shown: gives the tables.
        plots: names of `PLOTS`; those without numbers are left out.
        folder: of the pictures, as seen from the text.

    Raises:
        ReportError: the file lacks what the tables need.
    """
    section = SECTIONS[name]
    if name not in results:
        return [f"Not measured: `{section.command}` makes `eval/results/{name}.json`."]
    result = results[name]
    try:
        tables = shown(result)
        pictures = [f"![{PLOTS[one].title}]({folder}/{one}.png)" for one in plots if PLOTS[one].read(results)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ReportError(
            f"eval/results/{name}.json lacks what the report shows of it ({type(error).__name__}: {error}). Make it "
            f"anew: {section.command}"
        ) from error
    command = f"```console\n$ {result.get('command', section.command)}\n```"
    return [command, *tables, *_measured_with(result), *pictures]


def _measured_with(result: Mapping[str, Any]) -> list[str]:
    """A line with versions, threads, device and dtype, as far as the result names them."""
    words = [f"{name} {version}" for name, version in result.get("versions", {}).items()]
    if threads := result.get("threads"):
        words.append(f"{threads} thread{'s' if threads > 1 else ''}")
    words += [result[name] for name in ("device", "dtype") if name in result]
    return [f"Measured with {', '.join(words)}."] if words else []


def document(results: Results) -> str:
    """The text of docs/evaluation.md."""
    texts = [PREFACE]
    for name, section in SECTIONS.items():
        texts += [f"## {section.title}", *paragraphs(name, results, section.body, section.plots, "plots")]
    return "\n\n".join(texts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------------------------------


def block(readme: str, name: str) -> re.Match[str]:
    """Where the README's part on a result is; its group 1 is the text between the two lines.

    Raises:
        ReportError: the two lines are not there exactly once.
    """
    begin, end = f"<!-- results: {name} -->\n", f"<!-- end of results: {name} -->"
    found = list(re.finditer(f"{re.escape(begin)}(.*?){re.escape(end)}", readme, re.DOTALL))
    if len(found) != 1:
        raise ReportError(
            f"README.md has {len(found)} parts between the lines {begin.strip()} and {end}; it needs one, where the "
            f"tables of eval/results/{name}.json belong."
        )
    return found[0]


def block_text(name: str, results: Results) -> str:
    """What stands in the README between the two lines of a result."""
    section = SECTIONS[name]
    assert section.summary is not None
    return "\n\n".join(paragraphs(name, results, section.summary, section.pictures, "docs/plots")) + "\n"


def in_card() -> list[str]:
    """Names of the results that the README shows."""
    return [name for name, section in SECTIONS.items() if section.summary is not None]


def card(readme: str, results: Results) -> str:
    """The README with its parts and its metadata made anew; the rest of the text as it was.

    Args:
        readme: the README's text.
        results: all results.

    Raises:
        ReportError: a part is missing or given twice, or one is of no result.
    """
    unknown = set(re.findall(r"<!-- results: (.*?) -->", readme)) - set(in_card())
    if unknown:
        raise ReportError(f"README.md has parts of no result: {', '.join(sorted(unknown))}. Known: {in_card()}.")
    for name in in_card():
        start, end = block(readme, name).span(1)
        readme = readme[:start] + block_text(name, results) + readme[end:]
    return with_metadata(readme, metadata(results))


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def write(root: Path, results: Results) -> None:
    """Write the texts and draw the pictures.

    Args:
        root: folder of the repository.
        results: all results.
    """
    readme = root / "README.md"
    texts = {
        readme: card(readme.read_text(encoding="utf-8"), results),
        root / "docs" / "evaluation.md": document(results),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(root))
    for name, plot in PLOTS.items():
        path = root / "docs" / "plots" / f"{name}.png"
        numbers = plot.read(results)
        if numbers:
            plot.save(numbers, path)
            print(path.relative_to(root))
        else:
            path.unlink(missing_ok=True)


def differences(root: Path, results: Results) -> list[str]:
    """What is not in step with the results; pictures are only looked for.

    Args:
        root: folder of the repository.
        results: all results.
    """
    readme = (root / "README.md").read_text(encoding="utf-8")
    wanted = card(readme, results)
    found = [
        f"README.md: the part `{name}` is not what eval/results/{name}.json says"
        for name in in_card()
        if block(readme, name)[1] != block(wanted, name)[1]
    ]
    if front_matter(readme) != front_matter(wanted):
        found.append("README.md: the metadata is not what eval/card.py and eval/results say")
    path = root / "docs" / "evaluation.md"
    shown, made = (
        _sections(text) for text in (path.read_text(encoding="utf-8") if path.exists() else "", document(results))
    )
    found += [f"docs/evaluation.md: {title}" for title in {**made, **shown} if shown.get(title) != made.get(title)]
    missing = [name for name, plot in PLOTS.items() if plot.read(results) and not _picture(root, name).exists()]
    return found + [f"docs/plots/{name}.png is missing" for name in missing]


def _picture(root: Path, name: str) -> Path:
    return root / "docs" / "plots" / f"{name}.png"


def _sections(text: str) -> dict[str, str]:
    """The sections of docs/evaluation.md by their first line."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    return {part.partition("\n")[0]: part for part in parts}


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md, docs and eval/results")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where texts are out of step")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.root)
        if not options.check:
            write(options.root, results)
            return
        found = differences(options.root, results)
    except ImportError as error:
        sys.exit(f'eval.report: {error}: pip install -e ".[dev]", which has what all the results are shown with')
    except (OSError, ReportError) as error:
        sys.exit(f"eval.report: {error}")
    if found:
        print("\n".join([*found, "`make report` brings them in step."]))
        sys.exit(1)


if __name__ == "__main__":
    main()
