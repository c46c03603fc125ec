"""Whether calls are among the accepted ones, where a benchmark lists several values for each argument.

Follows the rules of the Berkeley Function Calling Leaderboard's AST check, written anew from their description; the
official checker may differ in details. Knows no schema: arguments that fit their schema are taken for granted.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# An argument that may be left out lists this among its values.
OPTIONAL = ""

_IGNORED = re.compile(r"[ ,./\-_*^]")


def accepts_calls(calls: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Mapping[str, Any]]]) -> bool:
    """Whether calls are a possible answer: as many as asked for, in any order, each one that is accepted.

    Args:
        calls: `{"name", "arguments"}` each.
        answers: for each call that is asked for `{name: {argument: [accepted values]}}`.
    """
    if len(calls) != len(answers):
        return False
    if not calls:
        return True
    # The first call may fit several answers; only some pairing of all of them counts.
    return any(
        accepts_call(calls[0], answer) and accepts_calls(calls[1:], [*answers[:place], *answers[place + 1 :]])
        for place, answer in enumerate(answers)
    )


def accepts_call(call: Mapping[str, Any], answer: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether one call is accepted: the name, every argument, none too many and none missing that is not optional.

    Args:
        call: `{"name", "arguments"}`.
        answer: `{name: {argument: [accepted values]}}`.
    """
    ((name, accepted),) = answer.items()
    return call["name"] == name and _fits_object(call["arguments"], accepted)


def _fits_object(value: Mapping[str, Any], accepted: Mapping[str, Any]) -> bool:
    """Every member is accepted, and what is absent is optional."""
    absent = accepted.keys() - value.keys()
    return (
        value.keys() <= accepted.keys()
        and all(OPTIONAL in accepted[name] for name in absent)
        and all(_among(member, accepted[name]) for name, member in value.items())
    )


def _among(value: Any, accepted: Sequence[Any]) -> bool:
    return any(_fits(value, one) for one in accepted)


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
