"""The decision between calling and talking, for every threshold on P(call).

Takes a score and the wish of each request; gives the ROC curve and what a threshold makes of it.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
How well a score separates requests that want a call from those that do not: ROC curve and the area under it, the best
threshold, and relevance (calls where one is wanted), irrelevance (none where none is wanted) and their mean at a
threshold. A request calls when its score is at least the threshold.
"""

_CITATION = """
Relevance and irrelevance: Berkeley Function Calling Leaderboard. The decision to call: Chen et al., arXiv 2412.01130.
ROC and the area under it: Fawcett, An introduction to ROC analysis, Pattern Recognition Letters 27 (2006).
"""

_INPUTS = """
Args:
    predictions: for each request a score, such as P(call); any finite numbers.
    references: for each request 1 where a call is wanted, else 0.
    threshold: where to measure relevance and irrelevance; None is the best threshold.

Returns:
    requests, calls_wanted: how many.
    auc: probability that a request that wants a call has a higher score than one that wants none, ties half.
    threshold: the one measured at.
    relevance, irrelevance, balanced_accuracy: at this threshold.
    best_threshold, best_balanced_accuracy: where the balanced accuracy is largest; of equals the highest threshold, in
        the middle between neighbouring scores.
    roc: points from (0, 0) on, one for each distinct score, falling: threshold, false_positive_rate,
        true_positive_rate. The first has no threshold.
    Where only one kind of request is given, what needs the other is None, and a threshold must be given.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/decision_roc")
    >>> found = metric.compute(predictions=[0.9, 0.4, 0.6, 0.1], references=[1, 1, 0, 0], threshold=0.5)
    >>> found["auc"], found["relevance"], found["irrelevance"], found["best_threshold"]
    (0.75, 0.5, 0.5, 0.75)
"""


class DecisionRoc(evaluate.Metric):
    """ROC of the decision to call."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self, predictions: list[float], references: list[int], threshold: float | None = None
    ) -> dict[str, Any]:
        """See `inputs_description`."""
        _check(predictions, references, threshold)
        scores, wants = np.array(predictions, dtype=np.float64), np.array(references, dtype=bool)
        roc = _roc(scores, wants) if wants.any() and not wants.all() else []
        best, best_accuracy = _best(roc)
        at = best if threshold is None else threshold
        relevance = float((scores[wants] >= at).mean()) if wants.any() else None
        irrelevance = float((scores[~wants] < at).mean()) if not wants.all() else None
        both = relevance is not None and irrelevance is not None
        return {
            "requests": len(scores),
            "calls_wanted": int(wants.sum()),
            "auc": _area(roc) if roc else None,
            "threshold": at,
            "relevance": relevance,
            "irrelevance": irrelevance,
            "balanced_accuracy": (relevance + irrelevance) / 2 if both else None,  # type: ignore[operator]
            "best_threshold": best,
            "best_balanced_accuracy": best_accuracy,
            "roc": roc,
        }


def _check(predictions: list[float], references: list[int], threshold: float | None) -> None:
    if not predictions:
        raise ValueError("There are no requests to measure: give at least one.")
    for number, (score, want) in enumerate(zip(predictions, references, strict=True)):
        if score is None or not np.isfinite(score):
            raise ValueError(f"Prediction {number}: a score is a finite number, got {score}.")
        if want not in (0, 1):
            raise ValueError(f"Reference {number}: 1 stands for a wanted call and 0 for none, got {want}.")
    if threshold is None and len(set(references)) == 1:
        raise ValueError(
            f"All {len(references)} requests have reference {references[0]}, so that no threshold is best: give a "
            "threshold, or requests of both kinds."
        )
    if threshold is not None and np.isnan(threshold):
        raise ValueError("The threshold is NaN: give a number.")


def _roc(scores: np.ndarray, wants: np.ndarray) -> list[dict[str, Any]]:
    """Points of the curve, from where nothing calls to where everything does."""
    points: list[dict[str, Any]] = [{"threshold": None, "false_positive_rate": 0.0, "true_positive_rate": 0.0}]
    for score in np.unique(scores)[::-1]:
        calls = scores >= score
        points.append(
            {
                "threshold": float(score),
                "false_positive_rate": float(calls[~wants].mean()),
                "true_positive_rate": float(calls[wants].mean()),
            }
        )
    return points


def _best(roc: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The threshold with the largest balanced accuracy, and this accuracy; None without a curve."""
    if not roc:
        return None, None
    accuracy = [(1 + point["true_positive_rate"] - point["false_positive_rate"]) / 2 for point in roc[1:]]
    place = 1 + int(np.argmax(accuracy))
    high, low = roc[place]["threshold"], roc[min(place + 1, len(roc) - 1)]["threshold"]
    middle = low / 2 + high / 2
    # Between neighbouring floats the middle may be the lower one, which would let its request call.
    return (middle if low < middle <= high else high), accuracy[place - 1]


def _area(roc: list[dict[str, Any]]) -> float:
    """The area under the curve by trapezoids."""
    x = np.array([point["false_positive_rate"] for point in roc])
    y = np.array([point["true_positive_rate"] for point in roc])
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())
