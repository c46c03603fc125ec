"""Exact match of whole replies: the right calls with the right arguments, and nothing else.

Takes the calls of replies as JSON; gives how many replies equal the gold ones. Knows no schema.
"""

import json
from collections import Counter
from collections.abc import Hashable
from decimal import Decimal
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Share of replies whose calls equal the gold calls: as many, each with the same name and equal arguments. The order of
parallel calls and of the properties of objects is free, that of array items is not. Equal is what JSON Schema calls
equal: 1 and 1.0 are one number, true is no number, strings are compared character by character. No partial credit.
"""

_CITATION = """
Defined in this repository. Equality of values: JSON Schema draft 2020-12, section 4.2.2 (instance equality).
"""

_INPUTS = """
Args:
    predictions: for each reply its calls as a JSON text, [{"name": ..., "arguments": {...}}, ...]; [] where nothing is
        called. Nested values of many shapes are no Arrow column, hence the text. What is no such text counts as wrong.
    references: for each reply the gold calls in the same form.

Returns:
    requests: how many.
    exact_match: share of replies that are right.
    call_exact_match: share of right ones among those where the gold reply calls.
    name_match: share of replies with the right multiset of names, among those where the gold reply calls.
    no_call_match: share of right ones (nothing called) among those where the gold reply calls nothing.
    right: for each reply whether it is right, in order.
    A rate over nothing is None.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/call_match")
    >>> gold = '[{"name": "f", "arguments": {"a": 1, "b": "x"}}, {"name": "g", "arguments": {}}]'
    >>> same = '[{"name": "g", "arguments": {}}, {"name": "f", "arguments": {"b": "x", "a": 1.0}}]'
    >>> metric.compute(predictions=[same, "[]"], references=[gold, gold])["right"]
    [True, False]
"""


class CallMatch(evaluate.Metric):
    """Exact match of whole replies."""

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
        right, named, wants = [], [], []
        for number, (made_text, gold_text) in enumerate(zip(predictions, references, strict=True)):
            gold, made = _calls(gold_text), _calls(made_text)
            if gold is None:
                raise ValueError(
                    f"Reference {number} is no JSON list of calls with name and arguments: {gold_text!r:.200}."
                )
            right.append(made == gold)
            named.append(made is not None and _names(made) == _names(gold))
            wants.append(bool(gold))
        calls = [index for index, want in enumerate(wants) if want]
        others = [index for index, want in enumerate(wants) if not want]
        return {
            "requests": len(right),
            "exact_match": sum(right) / len(right),
            "call_exact_match": _share(right, calls),
            "name_match": _share(named, calls),
            "no_call_match": _share(right, others),
            "right": right,
        }


_Calls = Counter[tuple[str, Hashable]]


def _calls(text: str | None) -> _Calls | None:
    """The multiset of calls that a JSON text lists, None where it is none."""
    try:
        # Decimals, so that long numbers are compared as they are written.
        listed = json.loads(
            text or "", parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_distinct_names
        )
    except (ValueError, RecursionError):
        return None
    if not isinstance(listed, list):
        return None
    calls: _Calls = Counter()
    for call in listed:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return None
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            return None
        try:
            calls[call["name"], _key(call["arguments"])] += 1
        except RecursionError:
            return None  # nested more deeply than can be compared
    return calls


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return dict(pairs)


def _key(value: Any) -> Hashable:
    """Something hashable that is equal exactly for equal JSON values."""
    if isinstance(value, dict):
        return ("object", frozenset((name, _key(inner)) for name, inner in value.items()))
    if isinstance(value, list):
        return ("array", tuple(_key(inner) for inner in value))
    if isinstance(value, bool) or value is None:
        return ("literal", str(value))
    return ("text", value) if isinstance(value, str) else ("number", value)


def _names(calls: _Calls) -> Counter[str]:
    names: Counter[str] = Counter()
    for (name, _), count in calls.items():
        names[name] += count
    return names


def _share(flags: list[bool], places: list[int]) -> float | None:
    return sum(flags[place] for place in places) / len(places) if places else None
