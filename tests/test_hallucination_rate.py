"""What counts as invented: names that a schema does not have, values that nothing supports, and nothing else."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# Metrics are an extra of the training environment.
pytest.importorskip("evaluate")

from eval.load_metrics import load_metric

OPEN: dict[str, Any] = {"type": "object"}


@cache
def metric() -> Any:
    return load_metric("hallucination_rate")


def judged(arguments: Any, schema: Any, *said: Any, name: str = "f") -> dict[str, Any]:
    """The metric of one call, where users or messages said something."""
    messages = [message if isinstance(message, dict) else {"role": "user", "content": message} for message in said]
    return metric().compute(
        predictions=[json.dumps([{"name": name, "arguments": arguments}])],
        tools=[json.dumps([{"type": "function", "function": {"name": "f", "parameters": schema}}])],
        conversations=[json.dumps(messages)],
    )


def invented(arguments: Any, schema: Any, *said: Any) -> list[str]:
    """Pointers of what is invented in one call, without the number of the call."""
    (found,) = judged(arguments, schema, *said)["hallucinated"]
    return [pointer.removeprefix("/0") for pointer in found]


def supported(value: Any, said: Any, schema: Any = None) -> bool:
    """Whether one value is."""
    properties = {"x": {} if schema is None else schema}
    return not invented({"x": value}, {"type": "object", "properties": properties}, said)


# --------------------------------------------------------------- what was said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Paris", "Weather in Paris?"),
        ("paris", "PARIS!"),
        ("Zurich", "to Zürich, please"),
        ("Zu\u0308rich", "to Z\u00fcrich, please"),
        ("New York, NY", "new york ny"),
        ("the red car", "a red car"),
        ("red cars", "a red car"),
        ("city", "all cities"),
        ("box", "two boxes"),
        ("25 miles", "twenty-five miles"),
        ("twenty-five", "25"),
        ("3x**2 + 2x - 1", "of 3x^2 + 2x - 1"),
        ("Paris, Rome", "from Rome to Paris"),
        ("eggs and milk", "milk, then eggs"),
        ("A", "the mark A"),
        (":A", "the mark A."),
        ("+", "1 + 2"),
        ("東京", "東京の天気"),
        ("", "hello"),
        ("   ", "hello"),
    ],
)
def test_a_text_is_supported_where_it_was_said(value: str, said: str) -> None:
    assert supported(value, said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Par", "Weather in Paris?"),
        ("Paris tomorrow", "tomorrow in Paris"),
        ("New Paris", "a new flight to Paris"),
        ("Paris, France", "Weather in Paris?"),
        ("NYC", "New York"),
        ("EUR", "200 euros"),
        ("A1", "number 1"),
        ("B", "the mark A"),
        ("-", "1 + 2"),
        ("one two", "2 1"),
        ("日本", "東京の天気"),
    ],
)
def test_a_text_that_nobody_said_is_invented(value: str, said: str) -> None:
    assert not supported(value, said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (5, "5 days"),
        (5.0, "five days"),
        (25, "twenty-five"),
        (205, "two hundred and five"),
        (5300, "five thousand three hundred"),
        (1_000_000, "1,000,000"),
        (3_000_000, "3 million"),
        (2.5e9, "2.5 billion"),
        (10_000, "10k"),
        (3, "the 3rd"),
        (3, "the third"),
        (0.05, "5%"),
        (5, "5 percent"),
        (0.5, "half of it"),
        (0.75, "3/4"),
        (2, "twice"),
        (12, "a dozen"),
        (-5, "minus five"),
        (-5, "-5 degrees"),
        (1e-9, "1e-9 metres"),
        (3, "in March"),
        (19, "at 7 pm"),
        (7, "007"),
        (2.50, "$2.5"),
    ],
)
def test_a_number_is_supported_in_all_its_forms(value: float, said: str) -> None:
    assert supported(value, said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (5, "15 days"),
        (5, "0.5"),
        (-5, "5 degrees"),
        (-5, "3-5 degrees"),
        (1, "a week"),
        (7, "a week"),
        (1000, "100"),
        (1.5, "15"),
        (5, "you may ask"),
        (10**400, "ten"),
    ],
)
def test_a_number_that_nobody_said_is_invented(value: float, said: str) -> None:
    assert not supported(value, said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2024-03-05", "March 5th, 2024"),
        ("2024-03-05", "on the 5th of March 2024"),
        ("2024-03-05", "5 mar 2024"),
        ("2024-03-05", "in 2024, on March 5"),
        ("2024-03-05", "03/05/2024"),
        ("2024-03-05", "5.3.2024"),
        ("2024-03-05", "March.05, 2024"),
        ("03/05/2024", "2024-03-05"),
        ("March 2024", "from March 5, 2024"),
        ("2024-03-05T00:00:00", "March 5, 2024"),
        ("2024-03-05T19:30:00Z", "March 5, 2024 at 7:30 pm"),
        ("19:00", "7 pm"),
        ("07:30", "seven thirty, so 7:30"),
        ("7:00 PM", "19:00"),
        ("12:00", "at noon"),
        ("19:00", "seven o'clock"),
    ],
)
def test_dates_and_times_are_supported_in_other_forms(value: str, said: str) -> None:
    assert supported(value, said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2024-03-05", "March 5"),
        ("2024-03-05", "March 2024"),
        ("2024-03-05", "March 6, 2024"),
        ("2024-03-05", "tomorrow"),
        ("2024-13-05", "May 13, 2024"),
        ("19:00", "7 am"),
        ("07:30", "7:30 pm"),
        ("2024-03-05T19:30:00", "March 5, 2024"),
        ("2024-03-05 in Rome", "March 5, 2024"),
    ],
)
def test_a_date_or_time_with_a_part_that_nobody_said_is_invented(value: str, said: str) -> None:
    assert not supported(value, said)


def test_everything_in_the_conversation_counts_but_no_role_and_no_description() -> None:
    said = [
        {"role": "system", "content": "You live in Oslo."},
        {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"zip": 155}}}]},
        {"role": "tool", "tool_call_id": "x9", "content": [{"type": "text", "text": '{"city": "Bergen"}'}]},
        {"role": "user", "content": None},
    ]
    names = ("Oslo", "155", "Bergen", "user", "x9", "Rome")
    properties = {name: {"type": "string", "description": "Such as Rome", "examples": ["Rome"]} for name in names}
    found = invented({name: name for name in names}, {"type": "object", "properties": properties}, *said)
    assert found == ["/user", "/x9", "/Rome"]


# --------------------------------------------------------------- what the schema supports


@pytest.mark.parametrize(
    ("value", "schema", "right"),
    [
        ("C", {"enum": ["C", "F"]}, True),
        ("c", {"enum": ["C", "F"]}, False),
        ("K", {"enum": ["C", "F"]}, False),
        (1.0, {"enum": [1]}, True),
        (True, {"enum": [1]}, False),
        ("km", {"const": "km"}, True),
        ("km", {"type": "string", "default": "km"}, True),
        ("km", {"type": "string", "description": "km"}, False),
        (["a", {"b": "c"}], {"default": ["a", {"b": "c"}]}, True),
        (["a", {"b": "d"}], {"default": ["a", {"b": "c"}]}, False),
        ("C", {"anyOf": [{"type": "integer"}, {"enum": ["C"]}]}, True),
        ("C", {"allOf": [{"type": "string"}, {"oneOf": [{"const": "C"}]}]}, True),
        (True, {"type": "boolean"}, True),
        (False, {"type": ["boolean", "null"]}, True),
        (None, {"type": ["string", "null"]}, True),
        (None, {"type": "string"}, False),
        (True, {}, False),
        ("x", True, False),
    ],
)
def test_values_that_the_schema_lists_are_supported(value: Any, schema: Any, right: bool) -> None:
    assert supported(value, "hello", schema) == right


@pytest.mark.parametrize(
    ("value", "said", "right"),
    [
        (True, "with windows", True),
        (False, "without windows", True),
        (True, "without windows", False),
        (False, "windows", False),
        ("true", "turn it on", True),
        ("false", "do not", True),
        ("false", "turn it on", False),
    ],
)
def test_booleans_are_supported_by_yes_and_no(value: Any, said: str, right: bool) -> None:
    assert supported(value, said) == right


# --------------------------------------------------------------- names


def test_a_name_that_the_schema_does_not_have_is_one_invented_argument() -> None:
    properties = {"a": {"properties": {"b": {}}}, "l": {"items": {"properties": {"c": {}}}}}
    schema = {"type": "object", "properties": properties}
    arguments = {"a": {"b": "x", "d/e": ["x", "x"]}, "l": [{"c": "x"}, {"f": {}}], "g": "x"}
    found = judged(arguments, schema, "x")
    assert found["hallucinated"] == [["/0/a/d~1e", "/0/l/1/f", "/0/g"]]
    assert (found["arguments"], found["unknown_names"], found["unsupported_values"]) == (5, 3, 0)
    assert found["hallucination_rate"] == 3 / 5


@pytest.mark.parametrize(
    ("schema", "invented_names"),
    [
        (OPEN, ["/age"]),
        ({"additionalProperties": True, "properties": {"a": {}}}, ["/age"]),
        ({"additionalProperties": {"type": "string"}, "properties": {"a": {}}}, ["/age"]),
        ({"additionalProperties": False}, ["/size", "/age"]),
        ({"properties": {"a": {}}}, ["/size", "/age"]),
        ({"patternProperties": {"^a": {}}}, ["/size"]),
        ({"patternProperties": {"(": {}}}, ["/size", "/age"]),
        ({"properties": {"size": {}, "age": {}}}, []),
    ],
)
def test_free_names_need_support_and_others_a_declaration(schema: Any, invented_names: list[str]) -> None:
    assert invented({"size": 5, "age": 5}, schema, "size 5") == invented_names


def test_references_are_followed_once() -> None:
    node = {"properties": {"name": {}, "next": {"$ref": "#/$defs/a~1b"}, "lost": {"$ref": "#/$defs/none"}}}
    schema = {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"anyOf": [node, {"$ref": "#/$defs/a~1b"}]}}}
    arguments = {"name": "x", "next": {"name": "y", "next": {"other": 1}}}
    assert invented(arguments, schema, "x") == ["/next/name", "/next/next/other"]


def test_items_are_judged_by_their_place() -> None:
    schema = {"properties": {"l": {"prefixItems": [{"enum": ["a"]}], "items": {"enum": ["b"]}}}}
    assert invented({"l": ["a", "b", "a"]}, schema) == ["/l/2"]


def test_a_tool_that_was_not_offered_has_no_names() -> None:
    found = judged({"a": 1, "b": {"c": 2}}, OPEN, "1 2", name="g")
    assert (found["unknown_tools"], found["unknown_names"], found["arguments"]) == (1, 2, 2)
    assert judged({}, OPEN, name="g")["hallucination_rate"] is None


# --------------------------------------------------------------- counting


def test_replies_are_counted_together_and_told_apart() -> None:
    call = {"name": "f", "arguments": {"x": "Rome"}}
    replies = [[call], [call, call], [], [{"name": "f", "arguments": {}}]]
    texts = [*map(json.dumps, replies), "[{", '[{"name": "f"}]', None]
    tools = json.dumps([{"function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}])
    said = [json.dumps([{"role": "user", "content": text}]) for text in ("Rome", "Oslo", *[""] * 5)]
    found = metric().compute(predictions=texts, tools=[tools] * 7, conversations=said)
    assert found["hallucinated"] == [[], ["/0/x", "/1/x"], [], [], [], [], []]
    assert (found["requests"], found["unread"], found["calls"], found["arguments"]) == (7, 3, 4, 3)
    assert found["hallucination_rate"] == 2 / 3
    assert found["reply_hallucination_rate"] == 1 / 3


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("tools", "{", "tools of reply 1"),
        ("tools", "{}", "tools of reply 1"),
        ("tools", '[{"name": "f"}]', "tools of reply 1"),
        ("conversations", "{", "conversation of reply 1"),
        ("conversations", '["hello"]', "conversation of reply 1"),
    ],
)
def test_what_is_no_tools_and_no_conversation_is_an_error_that_names_the_reply(
    column: str, text: str, message: str
) -> None:
    columns = {name: ["[]", "[]"] for name in ("predictions", "tools", "conversations")}
    columns[column][1] = text
    with pytest.raises(ValueError, match=message):
        metric().compute(**columns)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=3), st.text())
def test_nothing_that_json_can_hold_breaks_it(arguments: dict[str, Any], said: str) -> None:
    found = judged(arguments, OPEN, said)
    assert len(found["hallucinated"][0]) == found["unknown_names"] + found["unsupported_values"] <= found["arguments"]


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_a_text_supports_itself(text: str) -> None:
    assert supported(text, f"Say {text} now")


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.integers(0, 10**12), st.decimals(0, 10**6, places=3).map(float)))
def test_a_number_in_digits_supports_itself(number: float) -> None:
    assert supported(number, f"it is {number:,} or so" if isinstance(number, int) else f"it is {number:.3f} or so")
