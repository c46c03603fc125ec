"""NULL against content: how well a head that fills slots of a fixed width knows where a value ends.

Takes predicted and true ids of whole scaffolds; gives rates over the masked positions. Knows no model and no tokenizer.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Rates of NULL (the token that fills the unused tail of a slot) and of content over the masked positions of scaffolds,
overall and by the true length of the value that stands in the slot.
"""

_CITATION = """
Defined in this repository. Masked diffusion: Sahoo et al., Simple and Effective Masked Diffusion Language Models,
arXiv 2406.07524.
"""

_INPUTS = """
Args:
    predictions: for each row the predicted token id at every position of its scaffold; what stands at a position that
        is not masked is not read.
    references: for each row the true token id at every position.
    slots: for each row the number of the slot at every position, -1 for fixed text. A slot is one run of a number.
    masked: for each row 1 at every position that was masked, else 0; only positions of slots can be masked.
    null_id: id of NULL.
    length_limits: largest true lengths of the buckets, ascending; longer values share one more bucket.

Returns:
    positions: masked positions in all rows.
    null_rate, null_prediction_rate: share of them whose target is NULL; share where NULL was predicted.
    null_accuracy: share of them where NULL or content was decided rightly.
    null_precision, null_recall: of the predicted NULLs those that are right; of the true NULLs those that were found.
    real_token_accuracy: share of the positions with content where exactly this token was predicted.
    by_length: the same by true length of the value in tokens, keys such as "0", "1", "2-4" and "33+".
    masked_per_row, scaffold_size: mean, least and most of the rows.
    A rate over nothing is None.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/null_tokens")
    >>> found = metric.compute(
    ...     predictions=[[5, 7, 9, 9]], references=[[5, 7, 8, 9]], slots=[[-1, 0, 0, 0]], masked=[[0, 1, 1, 1]],
    ...     null_id=9,
    ... )
    >>> found["null_precision"], found["null_recall"], found["real_token_accuracy"]
    (0.5, 1.0, 0.5)
"""

_Counts = Counter[str]


class NullTokens(evaluate.Metric):
    """Rates of NULL and of content at masked positions."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(dict.fromkeys(("predictions", "references", "slots", "masked"), ids)),
        )

    def _compute(
        self,
        predictions: list[list[int]],
        references: list[list[int]],
        slots: list[list[int]],
        masked: list[list[int]],
        null_id: int,
        length_limits: Sequence[int] = (0, 1, 4, 8, 16, 32),
    ) -> dict[str, Any]:
        """See `inputs_description`."""
        if not references:
            raise ValueError("There are no rows to measure: give at least one scaffold.")
        limits = list(length_limits)
        if limits != sorted(set(limits)) or not limits or limits[0] < 0:
            raise ValueError(f"length_limits must be ascending lengths from 0 on, got {limits}.")
        overall: _Counts = Counter()
        buckets: dict[str, _Counts] = {name: Counter() for name in _names(limits)}
        for number, row in enumerate(zip(predictions, references, slots, masked, strict=True)):
            _check(number, *row)
            for length, counts in _slots(*row, null_id):
                overall += counts
                buckets[_names(limits)[int(np.searchsorted(limits, length))]] += counts
        return {
            **_rates(overall),
            "by_length": {name: _rates(counts) for name, counts in buckets.items() if counts["positions"]},
            "masked_per_row": _spread([sum(row) for row in masked]),
            "scaffold_size": _spread([len(row) for row in references]),
        }


def _check(number: int, predicted: list[int], true: list[int], slots: list[int], masked: list[int]) -> None:
    lengths = {"predictions": len(predicted), "references": len(true), "slots": len(slots), "masked": len(masked)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Row {number}: the lengths differ: {lengths}. Give one entry a position of the scaffold.")
    if None in (*predicted, *true, *slots):
        raise ValueError(f"Row {number}: an id or a slot's number is missing (None).")
    if any(flag not in (0, 1) for flag in masked):
        raise ValueError(
            f"Row {number}: masked holds 1 for masked positions and 0 for others, got {sorted(set(masked))}."
        )
    if any(flag and slot < 0 for flag, slot in zip(masked, slots, strict=True)):
        raise ValueError(f"Row {number}: a position of fixed text (slot -1) is masked; only slots are predicted.")


def _slots(
    predicted: list[int], true: list[int], slots: list[int], masked: list[int], null_id: int
) -> list[tuple[int, _Counts]]:
    """True length and counts of each slot of a row."""
    found = []
    for slot, run in groupby(range(len(slots)), key=slots.__getitem__):
        if slot < 0:
            continue
        places = list(run)
        counts: _Counts = Counter()
        for place in places:
            if masked[place]:
                null, says_null = true[place] == null_id, predicted[place] == null_id
                counts["positions"] += 1
                counts["null"] += null
                counts["says_null"] += says_null
                counts["null_found"] += null and says_null
                counts["real_right"] += not null and predicted[place] == true[place]
        found.append((sum(true[place] != null_id for place in places), counts))
    return found


def _names(limits: list[int]) -> list[str]:
    lows = [0, *(limit + 1 for limit in limits)]
    names = [f"{low}" if low == high else f"{low}-{high}" for low, high in zip(lows, limits, strict=False)]
    return [*names, f"{lows[-1]}+"]


def _rates(counts: _Counts) -> dict[str, Any]:
    positions, null, says_null = counts["positions"], counts["null"], counts["says_null"]
    wrong = null + says_null - 2 * counts["null_found"]
    return {
        "positions": positions,
        "null_rate": _share(null, positions),
        "null_prediction_rate": _share(says_null, positions),
        "null_accuracy": _share(positions - wrong, positions),
        "null_precision": _share(counts["null_found"], says_null),
        "null_recall": _share(counts["null_found"], null),
        "real_token_accuracy": _share(counts["real_right"], positions - null),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _spread(numbers: list[int]) -> dict[str, float]:
    return {"mean": float(np.mean(numbers)), "least": min(numbers), "most": max(numbers)}
