"""Whether confidences mean what they say: predicted probability against observed frequency.

Takes a confidence and a verdict for each prediction; gives the error and the bins of a reliability diagram.
"""

import math
from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Expected calibration error: confidences are sorted into bins of equal width, and the distance between mean confidence
and share of right predictions is averaged over the bins, weighted by how many predictions they hold.
"""

_CITATION = """
Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, arXiv 1706.04599, equations 2 to 5.
"""

_INPUTS = """
Args:
    predictions: for each prediction its confidence, from 0 to 1.
    references: for each prediction 1 where it was right, else 0.
    bins: how many bins of equal width. A bin holds what is above its lower edge and up to its upper one; the first
        holds 0 too.

Returns:
    expected_calibration_error, maximum_calibration_error: mean (weighted) and largest distance over the bins.
    mean_confidence, accuracy: over all predictions.
    brier_score: mean squared distance between confidence and verdict.
    bins: for each bin that holds something: low, high, count, confidence, accuracy.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/expected_calibration_error")
    >>> found = metric.compute(predictions=[0.9, 0.9, 0.6, 0.6], references=[1, 1, 1, 0], bins=2)
    >>> found["accuracy"], round(found["expected_calibration_error"], 3), found["bins"][0]["count"]
    (0.75, 0.0, 4)
"""


class ExpectedCalibrationError(evaluate.Metric):
    """Expected calibration error and reliability bins."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int], bins: int = 10) -> dict[str, Any]:
        """See `inputs_description`."""
        _check(predictions, references, bins)
        confidences, right = np.array(predictions), np.array(references)
        edges = np.arange(bins + 1) / bins
        number = np.searchsorted(edges[1:-1], confidences, side="left")
        found = []
        for index in np.unique(number):
            inside = number == index
            found.append(
                {
                    "low": float(edges[index]),
                    "high": float(edges[index + 1]),
                    "count": int(inside.sum()),
                    "confidence": float(confidences[inside].mean()),
                    "accuracy": float(right[inside].mean()),
                }
            )
        gaps = [abs(one["confidence"] - one["accuracy"]) for one in found]
        shares = [one["count"] / len(right) for one in found]
        return {
            "expected_calibration_error": math.fsum(gap * share for gap, share in zip(gaps, shares, strict=True)),
            "maximum_calibration_error": max(gaps),
            "mean_confidence": float(confidences.mean()),
            "accuracy": float(right.mean()),
            "brier_score": float(((confidences - right) ** 2).mean()),
            "bins": found,
        }


def _check(predictions: list[float], references: list[int], bins: int) -> None:
    if not predictions:
        raise ValueError("There are no predictions to measure: give at least one.")
    if bins < 1:
        raise ValueError(f"bins={bins}: give at least one bin.")
    for number, (confidence, right) in enumerate(zip(predictions, references, strict=True)):
        # NaN is between no two numbers.
        if confidence is None or not 0 <= confidence <= 1:
            raise ValueError(f"Prediction {number}: a confidence is a number from 0 to 1, got {confidence}.")
        if right not in (0, 1):
            raise ValueError(f"Reference {number}: 1 stands for a right prediction and 0 for a wrong one, got {right}.")
