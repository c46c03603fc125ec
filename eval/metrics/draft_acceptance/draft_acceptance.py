"""What becomes of drafts: values that the base lets stand, by kind, and the forwards that calls cost.

Takes counts of replies; gives shares. Knows no model.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Share of drafted slots and of their tokens that stand in the final call, overall and by kind of slot, and the forwards
of base and head per call.
"""

_CITATION = """
Defined in this repository. Drafts and their acceptance: Leviathan et al., Fast Inference from Transformers via
Speculative Decoding, arXiv 2211.17192.
"""

_INPUTS = """
Args:
    kinds: for each reply the kinds of its drafted slots, any names; one entry a slot, or one a kind.
    drafted_slots, accepted_slots: for each reply, beside `kinds`: how many slots, how many of them stand unchanged.
    drafted_tokens, accepted_tokens: for each reply, beside `kinds`: how many tokens, how many of them stand.
    calls: for each reply how many calls it makes.
    base_forwards, head_forwards: for each reply its forwards.

Returns:
    drafted_slots, accepted_slots, slot_acceptance: numbers and their quotient.
    drafted_tokens, accepted_tokens, token_acceptance: the same of tokens.
    by_kind: the same for each kind, in alphabetical order.
    calls: how many.
    base_forwards_per_call, head_forwards_per_call: over the replies that call; those that do not call are left out.
    A rate over nothing is None.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/draft_acceptance")
    >>> found = metric.compute(
    ...     kinds=[["string", "number"]], drafted_slots=[[2, 1]], accepted_slots=[[1, 1]],
    ...     drafted_tokens=[[6, 1]], accepted_tokens=[[4, 1]], calls=[1], base_forwards=[3], head_forwards=[2],
    ... )
    >>> found["by_kind"]["string"]["slot_acceptance"], found["accepted_slots"], found["base_forwards_per_call"]
    (0.5, 2, 3.0)
"""

_UNITS = ("slot", "token")


class DraftAcceptance(evaluate.Metric):
    """Acceptance of drafts by kind, and forwards per call."""

    def _info(self) -> evaluate.MetricInfo:
        count = datasets.Value("int64")
        lists = {f"{done}_{unit}s": datasets.Sequence(count) for unit in _UNITS for done in ("drafted", "accepted")}
        counts = dict.fromkeys(("calls", "base_forwards", "head_forwards"), count)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"kinds": datasets.Sequence(datasets.Value("string")), **lists, **counts}),
        )

    def _compute(
        self,
        kinds: list[list[str]],
        drafted_slots: list[list[int]],
        accepted_slots: list[list[int]],
        drafted_tokens: list[list[int]],
        accepted_tokens: list[list[int]],
        calls: list[int],
        base_forwards: list[int],
        head_forwards: list[int],
    ) -> dict[str, Any]:
        """See `inputs_description`."""
        if not kinds:
            raise ValueError("There are no replies to measure: give at least one.")
        if any(count is None or count < 0 for count in (*calls, *base_forwards, *head_forwards)):
            raise ValueError(
                "calls, base_forwards and head_forwards are numbers from 0 on; one is negative or missing."
            )
        by_kind: dict[str, Counter[str]] = {}
        columns = {
            "drafted_slots": drafted_slots,
            "accepted_slots": accepted_slots,
            "drafted_tokens": drafted_tokens,
            "accepted_tokens": accepted_tokens,
        }
        for number, names in enumerate(kinds):
            row = {column: counts[number] for column, counts in columns.items()}
            _check(number, names, row)
            for place, kind in enumerate(names):
                by_kind.setdefault(kind, Counter()).update({column: row[column][place] for column in row})
        overall: Counter[str] = Counter()
        for counts in by_kind.values():
            overall.update(counts)
        replies = [number for number, count in enumerate(calls) if count]
        return {
            **_rates(overall),
            "by_kind": {kind: _rates(by_kind[kind]) for kind in sorted(by_kind)},
            "calls": sum(calls),
            "base_forwards_per_call": _per_call(base_forwards, calls, replies),
            "head_forwards_per_call": _per_call(head_forwards, calls, replies),
        }


def _check(number: int, kinds: list[str], row: dict[str, list[int]]) -> None:
    lengths = {"kinds": len(kinds), **{column: len(counts) for column, counts in row.items()}}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Reply {number}: the lengths differ: {lengths}. Give one entry a slot or a kind.")
    if not all(kinds):
        raise ValueError(f"Reply {number}: a kind is a text that is not empty, got {kinds}.")
    for unit in _UNITS:
        for drafted, accepted in zip(row[f"drafted_{unit}s"], row[f"accepted_{unit}s"], strict=True):
            if None in (drafted, accepted) or not 0 <= accepted <= drafted:
                raise ValueError(f"Reply {number}: {accepted} of {drafted} drafted {unit}s cannot have been accepted.")


def _rates(counts: Counter[str]) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for unit in _UNITS:
        drafted, accepted = counts[f"drafted_{unit}s"], counts[f"accepted_{unit}s"]
        rates |= {f"drafted_{unit}s": drafted, f"accepted_{unit}s": accepted}
        rates[f"{unit}_acceptance"] = accepted / drafted if drafted else None
    return rates


def _per_call(forwards: Sequence[int], calls: Sequence[int], replies: Sequence[int]) -> float | None:
    made = sum(calls[reply] for reply in replies)
    return sum(forwards[reply] for reply in replies) / made if made else None
