"""Whether calls are among the accepted ones, where a benchmark lists several values for each argument.

Takes the calls of replies and the possible answers as JSON; gives how many replies are a possible answer. Follows the
rules of the AST check of the Berkeley Function Calling Leaderboard for Python, written anew. Knows no schema; the card
beside it says where the official checker differs.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Share of replies whose calls are a possible answer: as many calls as are asked for, in any order, each with the right
name and, for every argument, one of the values that are accepted for it. Strings are compared without case, spaces and
the marks , . / - _ * ^; 1 and 1.0 are one number, true is no number; the order of array items counts.
"""

_CITATION = """
Rules: AST evaluation of Python calls of the Berkeley Function Calling Leaderboard (Patil et al., The Berkeley Function
Calling Leaderboard, ICML 2025; package bfcl-eval 2026.3.23).
"""

_INPUTS = """
Args:
    predictions: for each reply its calls as a JSON text, [{"name": ..., "arguments": {...}}, ...]; [] where nothing is
        called. What is no such text counts as wrong.
    references: for each reply the possible answers as a JSON text, [{name: {argument: [accepted values]}}, ...], one
        for each call that is asked for; [] where none is. An argument that may be left out has "" among its values.
        The members of an accepted object are lists of accepted values too.

Returns:
    requests: how many.
    accuracy: share of replies that are right.
    ast_accuracy: share of right ones among those where calls are asked for.
    no_call_accuracy: share of right ones (nothing called) among those where none is.
    right: for each reply whether it is right, in order.
    A rate over nothing is None.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/ast_accuracy")
    >>> answers = '[{"weather": {"city": ["New York", "NYC"], "days": [1, ""]}}]'
    >>> good = '[{"name": "weather", "arguments": {"city": "new york"}}]'
    >>> bad = '[{"name": "weather", "arguments": {"city": "York", "days": 1}}]'
    >>> found = metric.compute(predictions=[good, bad, "[]"], references=[answers, answers, "[]"])
    >>> found["right"], found["ast_accuracy"], found["no_call_accuracy"]
    ([True, False, True], 0.5, 1.0)
"""

OPTIONAL = ""
"""An argument that may be left out has this among its values."""

_IGNORED = re.compile(r"[ ,./\-_*^]")

Answer = Mapping[str, Mapping[str, Sequence[Any]]]
"""`{name: {argument: [accepted values]}}`."""


class AstAccuracy(evaluate.Metric):
    """Share of replies that are a possible answer."""

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
        right, wants = [], []
        for number, (made, accepted) in enumerate(zip(predictions, references, strict=True)):
            calls, answers = _calls(made), _answers(accepted, number)
            right.append(calls is not None and accepts_calls(calls, answers))
            wants.append(bool(answers))
        return {
            "requests": len(right),
            "accuracy": sum(right) / len(right),
            "ast_accuracy": _share([one for one, want in zip(right, wants, strict=True) if want]),
            "no_call_accuracy": _share([one for one, want in zip(right, wants, strict=True) if not want]),
            "right": right,
        }


# ---------------------------------------------------------------------------------------------------------------------
# The rules
# ---------------------------------------------------------------------------------------------------------------------


def accepts_calls(calls: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> bool:
    """Whether calls are a possible answer: as many as asked for, in any order, each one that is accepted.

    Args:
        calls: `{"name", "arguments"}` each.
        answers: for each call that is asked for `{name: {argument: [accepted values]}}`.
    """
    if len(calls) != len(answers):
        return False
    fits = [[place for place, answer in enumerate(answers) if accepts_call(call, answer)] for call in calls]
    taken: dict[int, int] = {}
    return all(_finds_answer(number, fits, taken, set()) for number in range(len(calls)))


def _finds_answer(call: int, fits: Sequence[Sequence[int]], taken: dict[int, int], tried: set[int]) -> bool:
    """Give a call an answer that fits it, and those that hold one of these another one: an augmenting path.

    A call may fit several answers, and only a pairing of all of them counts; trying all orders would take too long.
    """
    for place in fits[call]:
        if place not in tried:
            tried.add(place)
            if place not in taken or _finds_answer(taken[place], fits, taken, tried):
                taken[place] = call
                return True
    return False


def accepts_call(call: Mapping[str, Any], answer: Answer) -> bool:
    """Whether one call is accepted: the name, every argument, none too many and none missing that is not optional.

    Args:
        call: `{"name", "arguments"}`.
        answer: `{name: {argument: [accepted values]}}`.
    """
    ((name, accepted),) = answer.items()
    return bool(call["name"] == name) and _fits_object(call["arguments"], accepted)


def _fits_object(value: Mapping[str, Any], accepted: Mapping[str, Sequence[Any]]) -> bool:
    """Every member is accepted, and what is absent is optional."""
    absent = accepted.keys() - value.keys()
    return (
        value.keys() <= accepted.keys()
        and all(OPTIONAL in accepted[name] for name in absent)
        and all(_among(member, accepted[name]) for name, member in value.items())
    )


def _among(value: Any, accepted: Sequence[Any]) -> bool:
    """Whether a value is one of the accepted ones."""
    values = [one for one in accepted if one != OPTIONAL]
    if any(_fits(value, one) for one in values):
        return True
    # An empty text or list says no more than an argument that is left out, if the argument is of that type.
    empty = _plain(value) == "" if isinstance(value, str) else value == []
    return empty and OPTIONAL in accepted and all(one is None or isinstance(one, type(value)) for one in values)


def _fits(value: Any, one: Any) -> bool:
    """Whether a value is the accepted one; the members of an accepted object list the values that are."""
    if isinstance(value, Mapping) and isinstance(one, Mapping):
        return _fits_object(value, {name: inner if isinstance(inner, list) else [inner] for name, inner in one.items()})
    if isinstance(value, list) and isinstance(one, list):
        return len(value) == len(one) and all(map(_fits, value, one))
    if isinstance(value, str) and isinstance(one, str):
        return _plain(value) == _plain(one)
    if isinstance(value, bool) or isinstance(one, bool) or value is None or one is None:
        return value is one
    # Whether a number is written with a fraction is a matter of the schema.
    return isinstance(value, int | float) and isinstance(one, int | float) and value == one


def _plain(text: str) -> str:
    """Text as it is compared: without spaces and some marks, in small letters, with one kind of quote."""
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _calls(text: str | None) -> list[dict[str, Any]] | None:
    """The calls that a JSON text lists, None where it is no such list."""
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
    return listed


def _answers(text: str | None, number: int) -> list[dict[str, Any]]:
    """The possible answers that a JSON text lists."""
    try:
        listed = json.loads(text or "", parse_constant=_no_constant, object_pairs_hook=_distinct_names)
        if not isinstance(listed, list):
            raise TypeError("it is no list")
        for answer in listed:
            ((name, accepted),) = answer.items()
            for argument, values in accepted.items():
                if not isinstance(values, list):
                    raise TypeError(f"the accepted values of {name}.{argument} are no list")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Reference {number} is no JSON list of possible answers, {{name: {{argument: [accepted values]}}}} each: "
            f"{error}. Got {text!r:.200}."
        ) from error
    return listed


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return dict(pairs)
