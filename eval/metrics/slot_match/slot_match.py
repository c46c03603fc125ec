"""Exact match of single values, by their kind.

Takes the texts of drafted and true values; gives how many are equal, whole text against whole text. Knows no schema.
"""

from collections import defaultdict
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Share of slots whose value is exactly right, overall and by kind. The whole texts are compared: no prefixes, no
normalisation, nothing stripped.
"""

_CITATION = """
Defined in this repository.
"""

_INPUTS = """
Args:
    predictions: for each slot the text of the value that was made, as JSON (strings in quotes). An empty text says
        that no value was made; no JSON text is empty.
    references: for each slot the text of the true value, as JSON; an empty text where there should be none.
    kinds: for each slot its kind, any name: "string", "number", "boolean", "enum", "array", "object", "union", "date".

Returns:
    slots: how many.
    exact_match: share of slots whose texts are equal. Texts are compared, so that 1 and 1.0 differ here.
    missing: share of slots that should hold a value and hold none.
    by_kind: the same for each kind, in alphabetical order.
    A rate over nothing is None.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/slot_match")
    >>> found = metric.compute(
    ...     predictions=['"Paris"', "3", ""], references=['"Paris, France"', "3", "true"],
    ...     kinds=["string", "number", "boolean"],
    ... )
    >>> found["by_kind"]["number"]
    {'slots': 1, 'exact_match': 1.0, 'missing': 0.0}
    >>> round(found["exact_match"], 3), found["by_kind"]["boolean"]["missing"]
    (0.333, 1.0)
"""


class SlotMatch(evaluate.Metric):
    """Exact match of values by kind."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text, "kinds": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], kinds: list[str]) -> dict[str, Any]:
        """See `inputs_description`."""
        if not references:
            raise ValueError("There are no slots to measure: give at least one.")
        slots = list(zip(predictions, references, strict=True))
        by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for number, (slot, kind) in enumerate(zip(slots, kinds, strict=True)):
            if not kind or None in slot:
                raise ValueError(
                    f"Slot {number}: prediction, reference and kind must be texts, the kind not empty; got "
                    f"{slot[0]!r}, {slot[1]!r} and {kind!r}. An empty text stands for no value."
                )
            by_kind[kind].append(slot)
        return {**_rates(slots), "by_kind": {kind: _rates(by_kind[kind]) for kind in sorted(by_kind)}}


def _rates(slots: list[tuple[str, str]]) -> dict[str, Any]:
    wanted = [made for made, true in slots if true]
    return {
        "slots": len(slots),
        "exact_match": sum(made == true for made, true in slots) / len(slots),
        "missing": sum(not made for made in wanted) / len(wanted) if wanted else None,
    }
