"""Docstrings that show code show what it does: every `>>>` of the repository's modules is run.

Those of the metrics are run by `test_metrics.py`, as `evaluate` loads them.
"""

import doctest
import importlib
from pathlib import Path

import pytest

from repo_package import ROOT, load_repo_module

PACKAGES = ("eval", "examples", "serving", "space", "training")
COMMANDS = ("app", "demo", "release", "repo_package", "serve", "train_hf", "validate_setup")
"""Modules of the root that `trust_remote_code` does not load; they are imported by their bare names."""


def shown() -> list[Path]:
    """Modules that show code."""
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))]
    return sorted(path.relative_to(ROOT) for path in paths if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", shown(), ids=str)
def test_code_that_a_docstring_shows_does_what_it_shows(path: Path) -> None:
    if len(path.parts) > 1 or path.stem in COMMANDS:
        module = importlib.import_module(".".join(path.with_suffix("").parts))
    else:
        module = load_repo_module(path.stem)
    said: list[str] = []
    runner, shows = doctest.DocTestRunner(), 0
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        result = runner.run(test, out=said.append)
        shows += result.attempted
        assert result.failed == 0, "".join(said)
    assert shows, f"{path} shows code outside of docstrings: move it into one, or write it otherwise"


def test_what_most_people_read_first_shows_code() -> None:
    names = {path.stem for path in shown()}
    assert {"tokenization_utils", "schema_scaffold", "schema_dialects"} <= names
