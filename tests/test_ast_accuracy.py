"""AST accuracy: the values that a benchmark accepts, any order of calls, and the verdicts of the official checker.

The comparison with the official checker is skipped where `bfcl-eval` is not importable. `pip install --no-deps --target
bfcl bfcl-eval` and `PYTHONPATH=bfcl` make it so.
"""

import copy
import json
from collections.abc import Iterator
from functools import cache
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# Metrics are an extra of the training environment.
pytest.importorskip("evaluate")

from eval.bfcl_checker import CheckerMissingError, OfficialChecker, load_checker
from eval.load_metrics import load_metric

WEATHER = [{"weather": {"city": ["Oslo", "Oslo, Norway"], "days": [1, ""]}}]


@cache
def metric() -> Any:
    return load_metric("ast_accuracy")


def is_right(calls: Any, answers: Any) -> bool:
    """The verdict on one reply."""
    made = calls if isinstance(calls, str) else json.dumps(calls)
    found = metric().compute(predictions=[made], references=[json.dumps(answers)])
    assert found["right"] == [found["accuracy"] == 1.0]
    return bool(found["right"][0])


def accepts(value: Any, accepted: list[Any]) -> bool:
    """Whether a value of an argument is among the accepted ones."""
    return is_right([{"name": "f", "arguments": {"x": value}}], [{"f": {"x": accepted}}])


# --------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("value", "accepted", "right"),
    [
        (1, [1.0], True),
        (1.0, [1], True),
        (True, [1], False),
        (1, [True], False),
        ("1", [1], False),
        (1, ["1"], False),
        (None, [None], True),
        (None, ["", 1], False),
        ("oslo norway", ["Oslo, Norway"], True),
        ("Osl", ["Oslo"], False),
        ("Zürich", ["zÜRICH"], True),
        ("Zu\u0308rich", ["Z\u00fcrich"], False),
        ("東京", ["東京", "Tokyo"], True),
        ("🙂", ["🙃"], False),
        ([1, 2], [[1, 2.0]], True),
        ([1, True], [[1, 1]], False),
        ([2, 1], [[1, 2]], False),
        ([1, 1], [[1]], False),
        ([["a"], ["B "]], [[["A"], ["b"]]], True),
        ({"a": {"b": [1]}}, [{"a": [{"b": [[1], [2]]}]}], True),
        ({"a": {"b": [3]}}, [{"a": [{"b": [[1], [2]]}]}], False),
        ({"a": 1, "b": 2}, [{"a": [1]}], False),
        ({}, [{"a": [1, ""]}], True),
        ({}, [{"a": [1]}], False),
        ([{"a": 1}, {"a": 2}], [[{"a": [1]}, {"a": [2, 3]}]], True),
        ([{"a": 2}, {"a": 1}], [[{"a": [1]}, {"a": [2, 3]}]], False),
        (1, [], False),
    ],
)
def test_a_value_is_right_where_it_is_one_of_the_accepted_ones(value: Any, accepted: list[Any], right: bool) -> None:
    assert accepts(value, accepted) == right


@pytest.mark.parametrize(
    ("value", "accepted", "right"),
    [
        ("", ["", "a"], True),
        ("", [""], True),
        ("", ["", None], True),
        ([], ["", ["a"]], True),
        ([], [""], True),
        ("", ["a"], False),
        ("", ["", 1], False),
        ("", ["", True], False),
        ([], ["", "a"], False),
        ([], [["a"]], False),
        (0, ["", 1], False),
        (False, ["", True], False),
    ],
)
def test_an_empty_value_says_no_more_than_an_argument_that_is_left_out(
    value: Any, accepted: list[Any], right: bool
) -> None:
    assert accepts(value, accepted) == right


# --------------------------------------------------------------- calls


def test_names_are_compared_as_they_are_and_arguments_are_neither_too_many_nor_too_few() -> None:
    def weather(name: str = "weather", **arguments: Any) -> list[dict[str, Any]]:
        return [{"name": name, "arguments": arguments}]

    assert is_right(weather(city="Oslo"), WEATHER)
    assert is_right(weather(days=1, city="Oslo"), WEATHER)
    assert not is_right(weather(days=1), WEATHER)
    assert not is_right(weather(city="Oslo", days=2), WEATHER)
    assert not is_right(weather(city="Oslo", unit="C"), WEATHER)
    assert not is_right(weather("Weather", city="Oslo"), WEATHER)
    assert not is_right(weather(city="Oslo") * 2, WEATHER)
    assert is_right(weather(city="Oslo") * 2, WEATHER * 2)
    assert not is_right([], WEATHER)
    assert not is_right(weather(city="Oslo"), [])
    assert is_right([], [])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=3)), max_size=4))
def test_parallel_calls_are_right_where_some_pairing_with_the_answers_is(pairs: list[tuple[int, list[int]]]) -> None:
    calls = [{"name": "f", "arguments": {"x": value}} for value, _ in pairs]
    answers = [{"f": {"x": accepted}} for _, accepted in pairs]
    right = any(
        all(value in accepted for (value, _), (_, accepted) in zip(order, pairs, strict=True))
        for order in permutations(pairs)
    )
    assert is_right(calls, answers) == right


def test_many_equal_calls_take_no_time_that_grows_with_their_orders() -> None:
    """25 calls have more orders than could ever be tried; the last call fits no answer that is left."""
    calls = [{"name": "f", "arguments": {"x": 1}}] * 25
    assert is_right(calls, [{"f": {"x": [1, 2]}}] * 25)
    assert not is_right(calls, [{"f": {"x": [1, 2]}}] * 24 + [{"f": {"x": [2]}}])


# --------------------------------------------------------------- replies


def test_rates_are_over_the_replies_that_they_are_about() -> None:
    good, bad = (json.dumps([{"name": "weather", "arguments": {"city": city}}]) for city in ("Oslo", "Rome"))
    answers = json.dumps(WEATHER)
    found = metric().compute(
        predictions=[good, bad, bad, "[]", good], references=[answers, answers, answers, "[]", "[]"]
    )
    assert found["right"] == [True, False, False, True, False]
    assert (found["requests"], found["accuracy"]) == (5, 0.4)
    assert (found["ast_accuracy"], found["no_call_accuracy"]) == (1 / 3, 0.5)
    only = metric().compute(predictions=[good], references=[answers])
    assert (only["ast_accuracy"], only["no_call_accuracy"]) == (1.0, None)
    assert metric().compute(predictions=["[]"], references=["[]"])["ast_accuracy"] is None


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "{}",
        "[{}]",
        '[{"f": []}]',
        '[{"f": {"x": 1}}]',
        '[{"f": {}, "g": {}}]',
        '[{"f": {"x": [NaN]}}]',
        '[{"f": {"x": [1], "x": [2]}}]',
    ],
)
def test_a_reference_that_is_no_list_of_possible_answers_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(ValueError, match="Reference 1 is no JSON list of possible answers"):
        metric().compute(predictions=["[]", "[]"], references=["[]", text])


# --------------------------------------------------------------- the official checker

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "any": (str,),
    "integer": (int,),
    "float": (float, int),
    "boolean": (bool,),
    "array": (list,),
    "tuple": (list,),
    "dict": (dict,),
}
"""Types of values as the official checker asks for them, by the leaderboard's names."""
KNOWN_DIFFERENCES = {
    # Each of the answers takes the first call that fits, so that in this order the last one finds none.
    ("parallel_178", "reversed"),
    # An empty string is listed for a text, beside `true`.
    ("simple_python_307", "venue"),
}
Made = list[dict[str, Any]]


@pytest.fixture(scope="module")
def official() -> OfficialChecker:
    try:
        return load_checker()
    except CheckerMissingError as error:
        pytest.skip(f"the official checker is not installed: {error}")


def plain(accepted: Any) -> Any:
    """An accepted value as a call has it: of the values of a member the first, without those that may be left out."""
    if isinstance(accepted, dict):
        lists = {name: one if isinstance(one, list) else [one] for name, one in accepted.items()}
        return {name: plain(one[0]) for name, one in lists.items() if "" not in one}
    return [plain(one) for one in accepted] if isinstance(accepted, list) else accepted


def variants(answers: list[Any]) -> Iterator[tuple[str, Made]]:
    """Right and wrong replies, and what is done to them: each accepted value in turn, and each argument spoiled."""
    gold = [
        {"name": name, "arguments": {key: plain(next(one for one in values if one != "")) for key, values in kept}}
        for answer in answers
        for name, arguments in answer.items()
        for kept in [[entry for entry in arguments.items() if any(one != "" for one in entry[1])]]
    ]
    yield "gold", gold
    yield "reversed", gold[::-1]
    yield "twice", [*gold, gold[0]]
    yield "fewer", gold[1:]
    for place, call in enumerate(gold):
        for key, accepted in answers[place][call["name"]].items():
            value = call["arguments"].get(key, "x")
            for other in [*map(plain, accepted), *spoiled(value)]:
                made = copy.deepcopy(gold)
                made[place]["arguments"][key] = other
                yield key, made
            made = copy.deepcopy(gold)
            made[place]["arguments"].pop(key, None)
            yield key, made


def spoiled(value: Any) -> Iterator[Any]:
    """Other values of the same type, some of which are accepted all the same."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, -value, float(value))
    elif isinstance(value, str):
        yield from (f"{value.upper()}.", f" {value}", f"{value}x", value[:-1])
    elif isinstance(value, list):
        yield from (
            value[::-1],
            value[:-1],
            [*value, *value[:1]],
            [one.upper() if isinstance(one, str) else one for one in value],
        )
    elif isinstance(value, dict):
        yield from (value | {"more": 1}, dict(list(value.items())[1:]))


def typed(made: Made, functions: list[Any]) -> bool:
    """Whether all required arguments are there, and all arguments are declared and have the leaderboard's types."""
    parameters = {function["name"]: function["parameters"] for function in functions}

    def call_is(name: str, arguments: dict[str, Any]) -> bool:
        kinds = {key: TYPES[parameter["type"]] for key, parameter in parameters[name]["properties"].items()}
        return set(parameters[name]["required"]) <= arguments.keys() and all(
            type(value) in kinds.get(key, ()) for key, value in arguments.items()
        )

    return all(call_is(**call) for call in made)


@pytest.mark.parametrize("category", CATEGORIES)
def test_where_the_types_fit_the_verdicts_are_those_of_the_official_checker(
    category: str, official: OfficialChecker
) -> None:
    asked, accepted = (
        [json.loads(line) for line in (official.data / folder).read_text(encoding="utf-8").splitlines()]
        for folder in (f"BFCL_v4_{category}.json", f"possible_answer/BFCL_v4_{category}.json")
    )
    replies = [
        (entry["id"], change, entry["function"], made, answer["ground_truth"])
        for entry, answer in zip(asked, accepted, strict=True)
        for change, made in variants(answer["ground_truth"])
        if typed(made, entry["function"]) and (entry["id"], change) not in KNOWN_DIFFERENCES
    ]
    verdicts = metric().compute(
        predictions=[json.dumps(made) for *_, made, _ in replies],
        references=[json.dumps(answers) for *_, answers in replies],
    )["right"]
    assert {False, True} == set(verdicts)
    assert len(replies) > 2000
    for right, (name, change, functions, made, answers) in zip(verdicts, replies, strict=True):
        fault = official.fault(category, functions, made, answers)
        assert right == (fault is None), (name, change, made, answers, fault)


def functions(kind: str, required: tuple[str, ...] = ("x",)) -> list[dict[str, Any]]:
    """A function of one argument, as BFCL has it."""
    properties = {"x": {"type": kind, "items": {"type": "array"}}}
    return [{"name": "f", "parameters": {"type": "dict", "properties": properties, "required": list(required)}}]


@pytest.mark.parametrize(
    ("kind", "arguments", "accepted", "ours"),
    [
        ("integer", {"x": 5.0}, [5], True),
        ("integer", {}, [5, ""], True),
        ("dict", {"x": {"a": {"b": "C"}}}, [{"a": [{"b": "c"}]}], True),
        ("array", {"x": [["A"]]}, [[["a"]]], True),
        ("dict", {"x": {"a": True}}, [{"a": [1]}], False),
        ("boolean", {"x": ""}, [""], True),
        ("string", {"x": ""}, ["", True], False),
    ],
)
def test_the_differences_that_the_card_lists_are_there(
    kind: str, arguments: dict[str, Any], accepted: list[Any], ours: bool, official: OfficialChecker
) -> None:
    calls, answers = [{"name": "f", "arguments": arguments}], [{"f": {"x": accepted}}]
    assert is_right(calls, answers) == ours
    assert (official.fault("simple_python", functions(kind), calls, answers) is None) != ours


def test_the_official_checker_gives_each_answer_the_first_call_that_fits(official: OfficialChecker) -> None:
    calls = [{"name": "f", "arguments": {"x": value}} for value in (1, 2)]
    answers = [{"f": {"x": accepted}} for accepted in ([1, 2], [1])]
    assert is_right(calls, answers)
    assert official.fault("parallel", functions("integer"), calls, answers) is not None
    assert official.fault("parallel", functions("integer"), calls[::-1], answers) is None
