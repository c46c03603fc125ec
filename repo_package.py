"""Imports the repository root as the package `smollm_diffusion`: one identity of its modules for scripts and tests.

The root is a Hub model repo: its modules are flat and import each other relatively, as `trust_remote_code` needs.
Nothing that `trust_remote_code` loads imports this file.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
PACKAGE = "smollm_diffusion"


def load_repo_module(name: str) -> ModuleType:
    """Import one of the root's modules inside the package.

    Args:
        name: module name without suffix, for example `"schema_scaffold"`.

    Returns:
        The module `smollm_diffusion.<name>`.

    Raises:
        ModuleNotFoundError: the root has no such module.
    """
    if PACKAGE not in sys.modules:
        # A namespace made by hand: the folder may have any name, and it has no __init__.py because a Hub repo has none.
        spec = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
        assert spec is not None
        package = importlib.util.module_from_spec(spec)
        package.__path__ = [str(ROOT)]
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{name}")
