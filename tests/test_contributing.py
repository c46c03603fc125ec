"""The map of the code in CONTRIBUTING.md: every module stands on it, and imports point down."""

import re
from pathlib import Path

import pytest

from repo_package import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAP = TEXT.partition("## The map")[2].partition("\n## ")[0]
NAMED = re.findall(r"`(\w+\.py)`", MAP)
LAYERS = [re.findall(r"`(\w+\.py)`", line.split("|")[1]) for line in MAP.splitlines() if line.startswith("|")]
MODULES = [name for line in LAYERS for name in line]


def imported(path: Path) -> list[str]:
    """Files of the root that a module of the root imports."""
    return [f"{name}.py" for name in re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.M)]


def test_every_module_of_the_root_stands_on_the_map_once() -> None:
    assert sorted(NAMED) == sorted(set(NAMED))
    assert sorted(NAMED) == sorted(path.name for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_below_it(name: str) -> None:
    below = MODULES[MODULES.index(name) + 1 :]
    assert set(imported(ROOT / name)) <= set(below)


def test_the_model_imports_no_command_and_no_package_of_the_repository() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert {"eval", "training"} <= packages
    for name in MODULES:
        words = re.findall(r"^\s*(?:from|import) (\w+)", (ROOT / name).read_text(encoding="utf-8"), re.M)
        assert not packages & set(words), name


def test_every_file_and_folder_that_is_named_exists() -> None:
    for name in re.findall(r"`((?:\.ci|docs|eval|examples|serving|space|tests|training)/[\w./]*)`", TEXT):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_every_module_of_training_is_explained() -> None:
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "training").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in text, path.name
