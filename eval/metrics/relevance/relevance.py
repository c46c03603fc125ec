"""Whether replies call where a call is wanted, and refuse where none is.

Takes the calls of replies and the gold calls as JSON; says nothing of whether a call is the right one.
"""

import json
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Relevance: share of the requests that want a call in which the reply calls something. Irrelevance: share of the requests
that want none in which it calls nothing. A reply that cannot be read is neither a call nor a refusal, so it is wrong
whichever was wanted.
"""

_CITATION = """
Relevance and irrelevance: Berkeley Function Calling Leaderboard, which takes a reply that cannot be read for a refusal.
"""

_INPUTS = """
Args:
    predictions: for each reply its calls as a JSON text, [{"name": ..., "arguments": {...}}, ...]; [] where nothing is
        called. What is no such text is a reply that cannot be read.
    references: for each reply the gold calls in the same form.

Returns:
    requests, calls_wanted: how many.
    relevance: share of replies that call, among those where the gold reply does.
    irrelevance: share of replies that call nothing, among those where the gold reply calls nothing.
    balanced_accuracy: mean of both.
    calls_missing: replies that call nothing where a call is wanted.
    calls_unwanted: replies that call where none is wanted.
    unread: replies that cannot be read.
    A rate over nothing is None.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/relevance")
    >>> call = '[{"name": "f", "arguments": {}}]'
    >>> found = metric.compute(predictions=[call, "[]", call, "[{"], references=[call, call, "[]", "[]"])
    >>> found["relevance"], found["irrelevance"], found["calls_missing"], found["calls_unwanted"], found["unread"]
    (0.5, 0.0, 1, 1, 1)
"""


class Relevance(evaluate.Metric):
    """The decision to call."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """See `inputs_description`."""
        if not references:
            raise ValueError("There are no replies to measure: give at least one.")
        wanted: list[bool | None] = []
        others: list[bool | None] = []
        for number, (made, gold) in enumerate(zip(predictions, references, strict=True)):
            wants = _calls(gold)
            if wants is None:
                raise ValueError(f"Reference {number} is no JSON list of calls with name and arguments: {gold!r:.200}.")
            (wanted if wants else others).append(_calls(made))
        relevance, irrelevance = _share(wanted, True), _share(others, False)
        both = relevance is not None and irrelevance is not None
        return {
            "requests": len(references),
            "calls_wanted": len(wanted),
            "relevance": relevance,
            "irrelevance": irrelevance,
            "balanced_accuracy": (relevance + irrelevance) / 2 if both else None,  # type: ignore[operator]
            "calls_missing": wanted.count(False),
            "calls_unwanted": others.count(True),
            "unread": wanted.count(None) + others.count(None),
        }


def _calls(text: str | None) -> bool | None:
    """Whether a JSON text lists a call; None where it is no list of calls."""
    try:
        listed = json.loads(text or "", parse_constant=_no_constant, object_pairs_hook=_distinct_names)
    except (ValueError, RecursionError):
        return None
    if not isinstance(listed, list):
        return None
    for call in listed:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return None
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            return None
    return bool(listed)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return dict(pairs)


def _share(found: list[bool | None], of: bool) -> float | None:
    return found.count(of) / len(found) if found else None
