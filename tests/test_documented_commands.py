"""Every command and every piece of Python that the documents show works as it stands.

Taken are the fenced blocks of the documents and the recipes of the Makefile. Each command is read by its own option
parser, and `RUN_BY` says which test runs what it starts; Python blocks run here, or where `SHOWN_PYTHON` says.
"""

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_package import ROOT
from tiny_models import tiny_text_config

# ---------------------------------------------------------------------------------------------------------------------
# What covers what: add a command or a page here
# ---------------------------------------------------------------------------------------------------------------------


_EXAMPLES = "tests/test_examples.py::test_the_docs_show_what_an_example_prints"
_SERVED = "tests/test_transformers_serve.py::test_shared_behaviours"
_WALK = "tests/test_walkthrough.py::test_a_new_user_gets_from_nothing_to_a_released_model_and_back"

RUN_BY: dict[str, str] = {
    "python demo.py": "tests/test_demo.py::test_the_demo_takes_the_users_own_tools",
    "python release.py": "tests/test_release.py::test_the_command_checks_and_pushes_and_says_what_it_did",
    "python serve.py": "tests/test_serve.py::test_replicas_share_the_load_and_nothing_is_lost_when_one_dies",
    "python app.py": "tests/test_app_browser.py::test_the_keyboard_alone_is_enough",
    "python validate_setup.py": (
        "tests/test_validate_setup.py::test_the_command_ends_well_here_and_says_what_to_run_next"
    ),
    "python examples/openai_client.py": _EXAMPLES,
    "python examples/smolagents_agent.py": _EXAMPLES,
    "python examples/langchain_agent.py": _EXAMPLES,
    "python train_hf.py --stage base": "tests/test_base_training.py::test_a_run_saves_a_loadable_base",
    "python train_hf.py --stage head": "tests/test_head_training.py::test_a_run_trains_the_head_and_leaves_the_base",
    "python train_hf.py --stage distill": (
        "tests/test_distill.py::test_a_run_teaches_the_head_what_the_base_writes_and_leaves_the_base"
    ),
    "python train_hf.py --stage decision": (
        "tests/test_decision.py::test_a_run_saves_threshold_and_probe_and_leaves_all_else"
    ),
    "python train_hf.py --stage adapter": "tests/test_train_hf.py::test_every_stage_of_a_shipped_config_is_a_run",
    "python -m training.audit overlap": ("tests/test_audit.py::test_the_overlap_command_prints_writes_and_fails_above"),
    "python -m training.audit split": "tests/test_audit.py::test_the_split_command_writes_every_record_to_one_side",
    "python -m training.sources": "tests/test_sources.py::test_the_command_writes_what_training_reads",
    "python -m training.synthetic_calls": (
        "tests/test_synthetic_calls.py::test_the_command_writes_what_the_training_data_reader_reads"
    ),
    "python -m training.smoke": "tests/test_smoke.py::test_everything_holds",
    "python -m eval.ablation": "tests/test_ablation.py::test_heads_are_trained_and_compared",
    "python -m eval.bench_decoding": (
        "tests/test_bench_decoding.py::test_the_command_compares_everyone_on_the_same_requests"
    ),
    "python -m eval.bench_decoding --simulate": (
        "tests/test_bench_decoding.py::test_the_simulation_costs_more_the_more_is_wrong"
    ),
    "python -m eval.bfcl": "tests/test_bfcl.py::test_the_command_writes_every_number_that_it_shows",
    "python -m eval.bfcl_handler": (
        "tests/test_bfcl_handler.py::test_options_of_the_official_command_are_passed_on_and_all_decodings_are_known"
    ),
    "python -m eval.chat": "tests/test_chat.py::test_a_run_writes_what_it_shows",
    "python -m eval.compare": (
        "tests/test_compare.py::test_the_command_writes_what_it_shows_and_goes_on_where_it_was_stopped"
    ),
    "python -m eval.decision": "tests/test_decision.py::test_the_report_compares_three_ways_on_balanced_sets",
    "python -m eval.decoding_ablation": (
        "tests/test_decoding_ablation.py::test_the_command_writes_what_it_shows_and_goes_on_where_it_was_stopped"
    ),
    "python -m eval.footprint": (
        "tests/test_footprint.py::test_the_command_measures_made_up_requests_where_there_are_no_data"
    ),
    "python -m eval.generate_dataset": (
        "tests/test_generate_dataset.py::test_every_row_gets_the_answer_that_it_gets_alone"
    ),
    "python -m eval.held_out": "tests/test_held_out.py::test_the_command_writes_every_set_and_decoding",
    "python -m eval.latency": "tests/test_latency.py::test_the_command_measures_each_factor_around_the_centre",
    "python -m eval.lm_eval_adapter": "tests/test_lm_eval_adapter.py::test_a_run_of_the_local_task",
    "python -m eval.report": (
        "tests/test_report.py::test_every_result_has_a_section_with_its_command_and_is_in_step_afterwards"
    ),
    "python -m eval.animation": "tests/test_animation.py::test_a_random_model_is_recorded_and_drawn",
    "python -m eval.bench_scaffold": "tests/test_bench_scaffold.py::test_the_command_saves_what_it_measured",
    "python -m eval.learning_curve": (
        "tests/test_learning_curve.py::test_the_command_prints_the_table_and_writes_the_points"
    ),
    "python -m eval.load_test": (
        "tests/test_load_test.py::test_a_command_with_nothing_lost_ends_well_and_shows_its_table"
    ),
    "python -m eval.schema_coverage": "tests/test_schema_coverage.py::test_missing_engines_are_named_and_left_out",
    "python -m eval.soak": "tests/test_soak.py::test_the_command_finds_nothing_wrong",
    "python -m eval.tool_retrieval": (
        "tests/test_eval_tool_retrieval.py::test_the_command_writes_rankings_and_calls_and_goes_on_where_it_was"
    ),
    "python -m training.records": "tests/test_records.py::test_the_command_prints_counts_and_skipped_lines",
    "python -m eval.widget": (
        "tests/test_card.py::test_the_model_in_this_repository_answers_the_widgets_examples_as_the_card_says"
    ),
    "python -m pytest": "not run: it runs the tests",
    "python -m venv": "not run: Python's own; every environment begins with it",
    "python -m pip install": "not run: fills environments; its extras are checked against pyproject.toml",
    "pip install": "not run: fills environments; its extras are checked against pyproject.toml",
    "python tests/common/fetch_transformers_tests.py": "not run: downloads transformers' source distribution",
    "python .ci/dependency_audit.py": "not run: asks a database of vulnerabilities; its report has a test of its own",
    "python -c": "not run: the program of the evaluation harness; the code is compiled here",
    "make": "not run: the recipe is taken apart like a document",
    ".ci/run": "not run: it runs the tests",
    "source": "not run: takes an environment into use",
    "export": "not run: sets a variable",
    "curl": _WALK,
    "kill": _WALK,
    "cd": "not run: changes the folder",
    "hf": "not run: the Hub's own command, and a Space of the reader's",
    "git clone": "not run: another project",
    "ruff": "not run: the linter, run in every check",
    "mypy": "not run: the types, run in every check",
    "rm": "not run: makes room",
    "mkdir": "not run: makes room",
    "ln": "not run: makes room",
    "touch": "not run: marks an environment as made",
    "transformers serve": _SERVED,
    "python gen_api_answer.py": "not run: FastChat's",
    "python gen_judgment.py": "not run: FastChat's",
    "python show_result.py": "not run: FastChat's",
}
"""Command, or how it begins -> the test that runs what it starts, or why none does; the longest beginning counts."""

SHOWN_PYTHON: dict[str, str] = {
    "docs/agents.md": "tests/test_tool_retrieval.py::test_a_sentence_transformer_finds_a_tool_by_its_meaning",
    "docs/release.md": "tests/test_push_to_hub.py::test_what_was_pushed_loads_and_calls",
    "docs/smaller.md": "tests/test_quantization.py::test_the_code_of_the_documentation_runs",
    "docs/transformers_serve.md": _SERVED,
    "docs/walkthrough.md": _WALK,
    "eval/metrics/": "tests/test_metric_cards.py::test_the_example_of_a_card_is_the_one_that_is_tested",
}
"""Page, or how its path begins -> the test that runs its Python, which needs more than this repository; that of the
other pages is run here."""

GIVEN: dict[str, dict[str, Any]] = {
    "README.md": {"messages": [{"role": "user", "content": "What is the weather in Lisbon?"}], "tools": []},
}
"""Page -> names that its Python takes as given, besides `repo`."""

# ---------------------------------------------------------------------------------------------------------------------
# What the documents show
# ---------------------------------------------------------------------------------------------------------------------

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        page: where it stands.
        words: the command without variables in front, redirections, comments and the path of an interpreter.
        elsewhere: it is typed in the folder of another project.
    """

    page: str
    words: tuple[str, ...]
    elsewhere: bool = False

    @property
    def text(self) -> str:
        return " ".join(self.words)


def pages() -> list[str]:
    """The documents, as paths from the root."""
    folders = ("", "docs/", "training/", "examples/", "serving/", "eval/", "eval/*/", "eval/*/*/")
    paths = [path for folder in folders for path in ROOT.glob(f"{folder}*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


@cache
def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block of a page."""
    return [match.groups() for match in FENCE.finditer((ROOT / page).read_text(encoding="utf-8"))]  # type: ignore[misc]


def typed(page: str) -> list[list[str]]:
    """What a page tells its reader to type, as the lines of each block; a line that goes on is one line."""
    found = []
    for language, text in blocks(page):
        lines = re.sub(r"\\\n\s*(?:> )?", "", text).splitlines()
        if language in ("bash", "sh", "shell"):
            found.append([line for line in lines if line.strip()])
        elif language == "console":
            found.append([line.removeprefix("$ ") for line in lines if line.startswith("$ ")])
    return found


def targets() -> list[str]:
    """What can be made."""
    return re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[0].split()


@cache
def recipe(target: str) -> list[str]:
    """The lines that `make` would run for a target, those of its environment included."""
    # The tests may run below another make, which this one is not to take for its parent.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    command = ["make", "--dry-run", "--always-make", target]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return re.sub(r"\\\n\s*", "", done.stdout).splitlines()


def split(page: str, lines: list[str]) -> Iterator[Command]:
    """The commands of lines that are typed one after another.

    Args:
        page: where they stand.
        lines: as a shell reads them.
    """
    elsewhere = False
    for line in lines:
        for words in simple_commands(line):
            yield Command(page, words, elsewhere)
            elsewhere = elsewhere or words[0] == "cd"


def simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    """The words of each command of a line."""
    lexer = shlex.shlex(re.sub(r"\s\d?>>?\s*(?:&\d|\S+)", "", line), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = list[str]()
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            if words:
                yield tuple(words)
            words = []
        elif words or not re.fullmatch(r"\w+=.*", word):
            program = re.fullmatch(r"(?:.*/bin/)?(python|pip|ruff|mypy|transformers)(?:3(?:\.\d+)?)?", word)
            words.append(program.group(1) if program and not words else word)


def commands() -> list[Command]:
    """Every command that is shown, once a page."""
    found = [command for page in pages() for lines in typed(page) for command in split(page, lines)]
    found += [command for target in targets() for command in split("Makefile", recipe(target))]
    return list(dict.fromkeys(found))


def mentioned() -> list[Command]:
    """Commands that stand in running text with their options, without those that leave something open."""
    found = list[Command]()
    for page in pages():
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for line in re.findall(r"`((?:python (?:-m )?(?!-m )[^\s`]+|make) [^`\n]+)`", text):
            if not re.search(r"\.\.\.|\bNAME\b", line):
                found += split(page, [line])
    return list(dict.fromkeys(found))


def in_parameters(found: list[Command]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return pytest.mark.parametrize("command", found, ids=lambda command: f"{command.page}: {command.text}"[:120])


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Raised in place of running a command whose options were read."""


def ends_after(original: Callable[..., Any], running: list[bool]) -> Callable[..., Any]:
    """A parser's method that reads the options and ends the command there; parts of it that it calls work as ever."""

    def parse(*args: Any, **kwargs: Any) -> Any:
        if running:
            return original(*args, **kwargs)
        running.append(True)
        try:
            original(*args, **kwargs)
        finally:
            running.clear()
        raise Parsed

    return parse


def read_options(module: str, arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    """Let a command read its options, and nothing more.

    Args:
        module: of the command.
        arguments: its words.
        patch: undone by the caller.

    Raises:
        SystemExit: an option is unknown, missing or of another type.
    """
    try:
        main = importlib.import_module(module).main
    except ImportError as error:
        missing = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        own = (missing.name or "").partition(".")[0]
        if not missing.name or (ROOT / own).exists() or (ROOT / f"{own}.py").exists():
            raise
        pytest.skip(f"{missing.name} is not installed")
    if module == "train_hf":  # reads its options in two steps, the second of which needs the first
        run = sys.modules[module]
        first, _ = run.command_line().parse_known_args(arguments)
        if "--help" in arguments:
            arguments = [word for word in arguments if word != "--help"] + ["--output", "a"]
        run.StageParser(first.stage).read(arguments, first.config)
        return
    running: list[bool] = []
    for name in ("parse_args", "parse_known_args"):
        patch.setattr(argparse.ArgumentParser, name, ends_after(getattr(argparse.ArgumentParser, name), running))
    patch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        main(*([arguments] if inspect.signature(main).parameters else []))


def check_python(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Check the words behind `python`."""
    if words[:1] == ["-c"]:
        compile(words[1], "command", "exec")
    elif words[:2] == ["-m", "pytest"]:
        for word in words[2:]:
            assert not word.startswith("tests") or (ROOT / word).exists(), f"there is no {word}"
    elif words[:1] == ["-m"]:
        if (ROOT / Path(*words[1].split("."))).with_suffix(".py").exists():
            read_options(words[1], words[2:], patch)
        else:
            assert words[1] in ("pip", "venv"), f"there is no module {words[1]}"
            check_extras(words[2:])
    elif (ROOT / words[0]).exists():
        if not words[0].startswith(("tests/", ".ci/", "examples/")):  # have no options
            read_options(words[0].removesuffix(".py").replace("/", "."), words[1:], patch)
    else:
        raise AssertionError(f"there is no {words[0]}")


def check_extras(words: list[str]) -> None:
    """The extras of this project that are installed exist."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        for extras in re.findall(r"^\.\[(.*)\]$", word):
            assert set(extras.split(",")) <= known.keys(), f"pyproject.toml has no extra {extras}"


def beginning(words: tuple[str, ...]) -> str | None:
    """The key of `RUN_BY` that a command falls under."""
    texts = (" ".join(words[:length]) for length in range(len(words), 0, -1))
    return next((text for text in texts if text in RUN_BY), None)


@in_parameters([*commands(), *mentioned()])
def test_a_command_has_the_options_that_it_is_shown_with(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *words = command.words
    if command.elsewhere:
        pytest.skip("typed in the folder of another project")
    elif program == "python":
        check_python(words, monkeypatch)
    elif program == "pip":
        check_extras(words)
    elif program == "make":
        wanted = [word for word in words if not re.fullmatch(r"\w+=.*", word)]
        assert set(wanted) <= set(targets()), "the Makefile has no such target"


@in_parameters(commands())
def test_a_command_is_run_by_a_test(command: Command) -> None:
    assert beginning(command.words) is not None, (
        f"{command.page} shows `{command.text}`, which nobody runs: name the test that runs it, or why none does, in "
        f"RUN_BY of {Path(__file__).relative_to(ROOT)}."
    )


NAMED = sorted({how for how in (*RUN_BY.values(), *SHOWN_PYTHON.values()) if not how.startswith("not run: ")})


@pytest.mark.parametrize("how", NAMED)
def test_a_test_that_is_named_exists(how: str) -> None:
    path, _, name = how.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path} has no {name}"


# ---------------------------------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------------------------------


def shown_python(page: str) -> list[str]:
    """The Python of a page, without that which shows its own output: doctest's form is for metrics' cards."""
    return [text for language, text in blocks(page) if language == "python" and not text.startswith(">>> ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the repository, in which a small base stands for the one that the documents name."""
    folder = tmp_path_factory.mktemp("shown") / "smollm-diffusion"
    folder.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            (folder / path.name).symlink_to(path)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    config = tiny_text_config()
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "HuggingFaceTB" / "SmolLM3-3B")
    tokenizer.save_pretrained(folder / "HuggingFaceTB" / "SmolLM3-3B")
    return folder


@pytest.mark.parametrize(
    "page", [page for page in pages() if shown_python(page) and not page.startswith(tuple(SHOWN_PYTHON))]
)
def test_python_that_is_shown_runs_as_it_stands(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {"repo": ".", "__name__": "shown", **GIVEN.get(page, {})}
    for text in shown_python(page):
        exec(compile(text, page, "exec"), names)


def test_json_that_is_shown_is_json() -> None:
    for page in pages():
        for language, text in blocks(page):
            if language == "json":
                json.loads(text)
