"""Loads the metrics of this repository by name, from wherever a command is run.

The metrics themselves are `evaluate` modules: `evaluate.load("eval/metrics/<name>")` loads them without this module.
"""

from typing import Any

import evaluate

from repo_package import ROOT

METRICS = ROOT / "eval" / "metrics"


def metric_names() -> list[str]:
    """Names of the metrics, in alphabetical order."""
    return sorted(path.stem for path in METRICS.glob("*/*.py") if path.stem == path.parent.name)


def load_metric(name: str) -> Any:
    """Load one metric; what it is given is kept in memory, so that processes do not share files.

    Args:
        name: one of `metric_names()`.

    Returns:
        The `evaluate.Metric`; `compute(...)` takes what its `inputs_description` says.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in metric_names():
        raise ValueError(f"There is no metric {name!r}: choose from {', '.join(metric_names())}.")
    return evaluate.load(str(METRICS / name), keep_in_memory=True)
