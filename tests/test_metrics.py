"""The metrics load by path without a network, do what their examples say, and agree with the plainest definitions."""

import doctest
import json
import math
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_package import ROOT

# Metrics are an extra of the training environment.
evaluate = pytest.importorskip("evaluate")
pytest.importorskip("datasets")

from eval.load_metrics import load_metric, metric_names  # noqa: E402

NAMES = (
    "ast_accuracy",
    "call_match",
    "call_validity",
    "decision_roc",
    "draft_acceptance",
    "expected_calibration_error",
    "hallucination_rate",
    "null_tokens",
    "relevance",
    "slot_match",
)
NULL = 9
few = settings(max_examples=25, deadline=None)

CHILD = """
import os, sys
from pathlib import Path
os.chdir(sys.argv[1])
import evaluate
found = {}
for name in sys.argv[2:]:
    metric = evaluate.load(f"eval/metrics/{name}")
    assert isinstance(metric, evaluate.Metric), name
    assert Path(os.environ["HF_HOME"]) in Path(sys.modules[type(metric).__module__].__file__).parents, name
    assert metric.description.strip() and metric.citation.strip() and "Returns:" in metric.inputs_description
    found[name] = sorted(metric.features)
metric = evaluate.load("eval/metrics/slot_match")
assert metric.compute(predictions=["1"], references=["1"], kinds=["number"])["exact_match"] == 1.0
print(found)
"""


@cache
def metric(name: str) -> Any:
    return load_metric(name)


def compute(name: str, **inputs: Any) -> dict[str, Any]:
    return metric(name).compute(**inputs)


def share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


# --------------------------------------------------------------- loading


def test_every_metric_is_known() -> None:
    assert metric_names() == sorted(NAMES)


def test_an_unknown_metric_is_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"no metric 'bleu'.*slot_match"):
        load_metric("bleu")


def test_they_load_by_path_without_a_network_and_into_an_empty_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", CHILD, str(ROOT), *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_metric_is_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = metric(name).inputs_description
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert example.examples
    result = doctest.DocTestRunner(verbose=False).run(example)
    assert result.failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_measure_is_an_error(name: str) -> None:
    extra = {"null_id": NULL} if name == "null_tokens" else {}
    with pytest.raises(ValueError, match="give at least one"):
        compute(name, **{column: [] for column in metric(name).features}, **extra)


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_different_lengths_are_an_error(name: str) -> None:
    columns = dict.fromkeys(metric(name).features, VALID[name])
    last = list(columns)[-1]
    with pytest.raises(ValueError, match="Mismatch in the number"):
        compute(name, **{column: [value] * (1 + (column == last)) for column, value in columns.items()})


VALID: dict[str, Any] = {
    "ast_accuracy": "[]",
    "call_match": "[]",
    "call_validity": "[]",
    "decision_roc": 1,
    "draft_acceptance": 1,
    "expected_calibration_error": 1,
    "hallucination_rate": "[]",
    "null_tokens": [1],
    "relevance": "[]",
    "slot_match": "1",
}


# --------------------------------------------------------------- null_tokens


@st.composite
def scaffolds(draw: st.DrawFn) -> dict[str, list[int]]:
    """One row: fixed text and slots, each with content and then NULL."""
    row: dict[str, list[int]] = {"predictions": [], "references": [], "slots": [], "masked": []}
    for number in range(draw(st.integers(1, 4))):
        fixed = draw(st.integers(0, 2))
        content, nulls = draw(st.integers(0, 3)), draw(st.integers(0, 2))
        width = content + nulls
        row["references"] += [1] * fixed + draw(st.lists(st.integers(1, 3), min_size=content, max_size=content))
        row["references"] += [NULL] * nulls
        row["slots"] += [-1] * fixed + [number] * width
        row["masked"] += [0] * fixed + draw(st.lists(st.integers(0, 1), min_size=width, max_size=width))
        row["predictions"] += draw(
            st.lists(st.sampled_from([1, 2, 3, NULL]), min_size=fixed + width, max_size=fixed + width)
        )
    return row


def null_rates(positions: list[tuple[int, int]]) -> dict[str, Any]:
    """The rates of (predicted, true) pairs, each by its plain definition."""
    return {
        "positions": len(positions),
        "null_rate": share([true == NULL for _, true in positions]),
        "null_prediction_rate": share([made == NULL for made, _ in positions]),
        "null_accuracy": share([(made == NULL) == (true == NULL) for made, true in positions]),
        "null_precision": share([true == NULL for made, true in positions if made == NULL]),
        "null_recall": share([made == NULL for made, true in positions if true == NULL]),
        "real_token_accuracy": share([made == true for made, true in positions if true != NULL]),
    }


@few
@given(st.lists(scaffolds(), min_size=1, max_size=4))
def test_null_rates_are_their_definitions(rows: list[dict[str, list[int]]]) -> None:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    found = compute("null_tokens", **columns, null_id=NULL, length_limits=[0, 2])
    by_length: dict[str, list[tuple[int, int]]] = {"0": [], "1-2": [], "3+": []}
    for row in rows:
        for place, slot in enumerate(row["slots"]):
            if row["masked"][place]:
                places = [other for other, number in enumerate(row["slots"]) if number == slot]
                length = sum(row["references"][other] != NULL for other in places)
                pair = (row["predictions"][place], row["references"][place])
                by_length["0" if length == 0 else "1-2" if length <= 2 else "3+"].append(pair)
    overall = null_rates([pair for pairs in by_length.values() for pair in pairs])
    assert {name: found[name] for name in overall} == overall
    assert found["by_length"] == {name: null_rates(pairs) for name, pairs in by_length.items() if pairs}
    sizes = [len(row["slots"]) for row in rows]
    assert found["scaffold_size"] == {"mean": sum(sizes) / len(sizes), "least": min(sizes), "most": max(sizes)}
    assert found["masked_per_row"]["most"] == max(sum(row["masked"]) for row in rows)


def test_a_head_that_says_null_everywhere_has_recall_and_no_real_token() -> None:
    found = compute(
        "null_tokens",
        predictions=[[NULL] * 4],
        references=[[1, 2, NULL, NULL]],
        slots=[[0] * 4],
        masked=[[1] * 4],
        null_id=NULL,
    )
    assert (found["null_recall"], found["null_precision"], found["real_token_accuracy"]) == (1.0, 0.5, 0.0)
    assert found["by_length"].keys() == {"2-4"}


def test_a_row_without_positions_has_no_rates() -> None:
    found = compute("null_tokens", predictions=[[]], references=[[]], slots=[[]], masked=[[]], null_id=NULL)
    assert (found["positions"], found["by_length"], found["scaffold_size"]["most"]) == (0, {}, 0)
    assert [found[rate] for rate in ("null_rate", "null_precision", "null_recall", "real_token_accuracy")] == [None] * 4


def test_null_that_is_never_said_has_no_precision_and_null_that_never_is_has_no_recall() -> None:
    row: dict[str, Any] = {"slots": [[0, 0]], "masked": [[1, 1]], "null_id": NULL}
    never_said = compute("null_tokens", predictions=[[1, 1]], references=[[1, NULL]], **row)
    assert (never_said["null_precision"], never_said["null_recall"]) == (None, 0.0)
    never_is = compute("null_tokens", predictions=[[1, NULL]], references=[[1, 1]], **row)
    assert (never_is["null_precision"], never_is["null_recall"]) == (0.0, None)


def test_faulty_scaffolds_are_errors_that_name_the_row() -> None:
    row = {"predictions": [1, 2], "references": [1, 2], "slots": [-1, 0], "masked": [0, 1]}
    good = {name: [values] for name, values in row.items()}
    bad: dict[str, dict[str, list[Any]]] = {
        "lengths differ": {"predictions": [1]},
        "masked holds 1": {"masked": [0, 2]},
        "fixed text": {"masked": [1, 1]},
        "is missing": {"predictions": [1, None]},
    }
    for message, change in bad.items():
        columns = {name: [row[name], change.get(name, row[name])] for name in row}
        with pytest.raises(ValueError, match=f"Row 1: .*{message}"):
            compute("null_tokens", **columns, null_id=NULL)
    with pytest.raises(ValueError, match="ascending"):
        compute("null_tokens", **good, null_id=NULL, length_limits=[4, 1])


# --------------------------------------------------------------- slot_match


@few
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "1", "1.0", '"a"', '"ab"']), st.sampled_from(["", "1", '"a"']), st.sampled_from("xyz")
        ),
        min_size=1,
        max_size=8,
    )
)
def test_slots_match_where_their_texts_are_equal(slots: list[tuple[str, str, str]]) -> None:
    made, true, kinds = map(list, zip(*slots, strict=True))
    found = compute("slot_match", predictions=made, references=true, kinds=kinds)
    assert found["exact_match"] == share([one == other for one, other, _ in slots])
    assert found["missing"] == share([not one for one, other, _ in slots if other])
    assert list(found["by_kind"]) == sorted(set(kinds))
    for kind, rates in found["by_kind"].items():
        assert rates["exact_match"] == share([one == other for one, other, name in slots if name == kind])
    assert sum(rates["slots"] for rates in found["by_kind"].values()) == found["slots"] == len(slots)


@pytest.mark.parametrize(
    ("made", "true"),
    [
        ('"Par"', '"Paris"'),
        ('"Paris "', '"Paris"'),
        ('"Paris"', '"paris"'),
        ("1", "1.0"),
        ("1", "true"),
        ("1.0", "true"),
        ('"1"', "1"),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}'),
        ("[1, 2]", "[1,2]"),
        ('"\u00e9"', '"e\u0301"'),
        ('"é"', r'"\u00e9"'),
    ],
)
def test_values_are_compared_as_the_texts_that_they_are(made: str, true: str) -> None:
    assert compute("slot_match", predictions=[true], references=[true], kinds=["string"])["exact_match"] == 1
    assert compute("slot_match", predictions=[made], references=[true], kinds=["string"])["exact_match"] == 0


def test_a_slot_that_is_no_text_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="Slot 1"):
        compute("slot_match", predictions=["1", None], references=["1", "1"], kinds=["number"] * 2)
    with pytest.raises(ValueError, match="Slot 0"):
        compute("slot_match", predictions=["1"], references=["1"], kinds=[""])


# --------------------------------------------------------------- call_match

numbers = st.one_of(st.sampled_from([0, 1, 1.0, 2, 0.5, 10**20, 1e20]), st.booleans())
plain = st.one_of(numbers, st.none(), st.sampled_from(["", "1", "a", "A", "true"]))
values = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=4,
)
calls = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["f", "g"]), "arguments": st.dictionaries(st.sampled_from("ab"), values, max_size=2)}
    ),
    max_size=3,
)


def equal(one: Any, other: Any) -> bool:
    """JSON Schema's equality of instances, spelled out."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return Fraction(one) == Fraction(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def same_calls(made: list[Any], gold: list[Any]) -> bool:
    """Whether some order of the calls made equals the gold ones."""
    return any(equal(list(order), gold) for order in permutations(made))


@few
@given(st.lists(st.tuples(calls, calls), min_size=1, max_size=4))
def test_replies_match_where_some_order_of_their_calls_does(pairs: list[tuple[list[Any], list[Any]]]) -> None:
    made, gold = ([json.dumps(one) for one in column] for column in zip(*pairs, strict=True))
    found = compute("call_match", predictions=made, references=gold)
    right = [same_calls(one, other) for one, other in pairs]
    assert found["right"] == right
    assert found["exact_match"] == share(right)
    assert found["call_exact_match"] == share([flag for flag, (_, other) in zip(right, pairs, strict=True) if other])
    assert found["no_call_match"] == share([not one for one, other in pairs if not other])
    names = [[Counter(call["name"] for call in reply) for reply in pair] for pair in pairs]
    assert found["name_match"] == share([one == other for one, other in names if other])


@few
@given(calls, st.randoms())
def test_the_order_of_calls_and_of_properties_is_free(gold: list[Any], chance: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shuffled(value[key]) for key in chance.sample(sorted(value), len(value))}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    made = [shuffled(call) for call in chance.sample(gold, len(gold))]
    assert compute("call_match", predictions=[json.dumps(made)], references=[json.dumps(gold)])["exact_match"] == 1


@pytest.mark.parametrize(
    ("made", "gold", "right"),
    [
        ("1", "1.0", True),
        ("1e2", "100", True),
        ("0.1", "0.10", True),
        ("0.1", "0.1000000000000000055", False),
        ("true", "1", False),
        ('"1"', "1", False),
        ("[1, 2]", "[2, 1]", False),
        ('"a"', '"A"', False),
        ("null", '""', False),
        ('{"b": [1, {"c": true}]}', '{"b": [1.0, {"c": true}]}', True),
        ('{"b": [1, {"c": 1}]}', '{"b": [1.0, {"c": true}]}', False),
        ('{"b": null}', "{}", False),
        ("[[1], [2]]", "[[2], [1]]", False),
        ('"東京 🙂"', r'"\u6771\u4eac \ud83d\ude42"', True),
        ('"\u00e9"', '"e\u0301"', False),
        (r'"\ud800"', r'"\ud800"', True),
    ],
)
def test_values_are_equal_as_in_json_schema(made: str, gold: str, right: bool) -> None:
    texts = [f'[{{"name": "f", "arguments": {{"a": {value}}}}}]' for value in (made, gold)]
    assert compute("call_match", predictions=texts[:1], references=texts[1:])["right"] == [right]


def test_equal_calls_count_as_often_as_they_are_made() -> None:
    one, two = '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": {"a": 2}}'
    gold = f"[{one}, {two}, {one}]"
    made = [f"[{one}, {one}, {two}]", f"[{one}, {two}]", f"[{one}, {two}, {two}]", f"[{one}, {one}, {two}, {one}]"]
    found = compute("call_match", predictions=made, references=[gold] * 4)
    assert found["right"] == [True, False, False, False]
    assert found["name_match"] == 0.5


FAULTY_REPLIES = (
    "",
    "[",
    "{}",
    "[1]",
    '[{"name": "f"}]',
    '[{"name": 1, "arguments": {}}]',
    '[{"name": "f", "arguments": {"a": NaN}}]',
    '[{"name": "f", "arguments": {"a": 1, "a": 1}}]',
    "[" * 100_000,
)


@pytest.mark.parametrize("text", FAULTY_REPLIES)
def test_what_is_no_list_of_calls_is_wrong_and_as_gold_an_error(text: str) -> None:
    assert compute("call_match", predictions=[text], references=["[]"])["right"] == [False]
    with pytest.raises(ValueError, match="Reference 1 is no JSON list"):
        compute("call_match", predictions=["[]", "[]"], references=["[]", text])


@pytest.mark.parametrize("text", [*FAULTY_REPLIES, None])
def test_all_metrics_of_calls_take_the_same_replies_for_unread(text: str | None) -> None:
    tools, nothing = [json.dumps(TOOLS)] * 2, ["[]"] * 2
    made = ["[]", text]
    assert compute("ast_accuracy", predictions=made, references=nothing)["right"] == [True, False]
    assert compute("call_match", predictions=made, references=nothing)["right"] == [True, False]
    assert compute("call_validity", predictions=made, tools=tools)["parsed"] == 0.5
    assert compute("relevance", predictions=made, references=nothing)["unread"] == 1
    assert compute("hallucination_rate", predictions=made, tools=tools, conversations=nothing)["unread"] == 1


@pytest.mark.parametrize("depth", [10, 300, 600, 900])
def test_a_value_of_any_depth_is_measured_or_wrong_but_no_crash(depth: int) -> None:
    deep = f'[{{"name": "f", "arguments": {{"a": {"[" * depth}{"]" * depth}}}}}]'
    items = {"$defs": {"list": {"items": {"$ref": "#/$defs/list"}}}, "properties": {"a": {"$ref": "#/$defs/list"}}}
    tools = [json.dumps([{"function": {"name": "f", "parameters": items}}])]
    right = compute("call_match", predictions=[deep], references=['[{"name": "f", "arguments": {"a": [1]}}]'])["right"]
    assert right == [False]
    assert not any(compute("ast_accuracy", predictions=[deep], references=['[{"f": {"a": [[1]]}}]'])["right"])
    assert compute("call_validity", predictions=[deep], tools=tools)["valid"] in ([1.0] if depth == 10 else [0.0, 1.0])
    invented = compute("hallucination_rate", predictions=[deep], tools=tools, conversations=["[]"])
    assert invented["hallucinated"] == [[]]
    assert invented["unread"] in ([0] if depth == 10 else [0, 1])


# --------------------------------------------------------------- call_validity

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "object", "required": ["a"]}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "h"}},
]


@few
@given(st.lists(calls, min_size=1, max_size=4))
def test_validity_is_what_jsonschema_says(replies: list[list[Any]]) -> None:
    found = compute(
        "call_validity", predictions=[json.dumps(reply) for reply in replies], tools=[json.dumps(TOOLS)] * len(replies)
    )
    schema = TOOLS[0]["function"]["parameters"]  # type: ignore[index]

    def valid(call: Any) -> bool:
        try:
            jsonschema.validate(call["arguments"], schema, cls=jsonschema.Draft202012Validator)
        except jsonschema.ValidationError:
            return False
        return call["name"] == "f"

    made = [call for reply in replies for call in reply]
    assert found["calls"] == len(made)
    assert found["schema_valid"] == share([valid(call) for call in made])
    assert found["valid"] == share([all(map(valid, reply)) for reply in replies])
    assert found["unknown_names"] == sum(call["name"] != "f" for call in made)
    known = [call["arguments"] for call in made if call["name"] == "f"]
    lacking = ["a" not in one or (isinstance(one.get("b"), dict) and "a" not in one["b"]) for one in known]
    assert found["missing_required"] == sum(lacking)
    assert found["parsed"] == 1


@pytest.mark.parametrize("text", FAULTY_REPLIES)
def test_what_is_no_list_of_calls_is_not_valid(text: str) -> None:
    found = compute("call_validity", predictions=["[]", text], tools=[json.dumps(TOOLS)] * 2)
    assert found["valid"] == 0.5
    # A call whose arguments are no object parses, and is then no valid call.
    assert found["parsed"] == 0.5


def test_arguments_that_are_no_object_are_not_valid() -> None:
    found = compute("call_validity", predictions=['[{"name": "h", "arguments": 3}]'], tools=[json.dumps(TOOLS)])
    assert (found["parsed"], found["valid"], found["unknown_names"]) == (1, 0, 0)
    untyped = json.dumps([{"function": {"name": "h", "parameters": {"properties": {}}}}])
    assert compute("call_validity", predictions=['[{"name": "h", "arguments": 3}]'], tools=[untyped])["valid"] == 0


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ({"a": 1}, True),
        ({"a": 1.0}, True),
        ({"a": 1.5}, False),
        ({"a": True}, False),
        ({"a": "1"}, False),
        ({"a": None}, False),
        ({"a": 1, "b": {"a": [{"ü": "東京"}]}}, True),
        ({"a": 1, "b": {"c": {"a": 1}}}, False),
        ({"a": 1, "b": []}, False),
        ({"a": 1, "é": 1}, False),
    ],
)
def test_arguments_are_valid_as_in_json_schema(arguments: dict[str, Any], valid: bool) -> None:
    calls = [{"name": "f", "arguments": arguments}] * 2
    found = compute("call_validity", predictions=[json.dumps(calls)], tools=[json.dumps(TOOLS)])
    assert (found["calls"], found["valid"], found["schema_valid"]) == (2, valid, valid)


@pytest.mark.parametrize("reference", ["#/$defs/none", "https://127.0.0.1:9/schema.json"])
def test_a_reference_out_of_the_schema_is_an_error_and_is_not_fetched(reference: str) -> None:
    tools = json.dumps([{"function": {"name": "f", "parameters": {"properties": {"a": {"$ref": reference}}}}}])
    call = '[{"name": "f", "arguments": {"a": 1}}]'
    with pytest.raises(ValueError, match=r"\$ref in the tools of reply 1 cannot be resolved"):
        compute("call_validity", predictions=["[]", call], tools=[tools] * 2)


@pytest.mark.parametrize(
    "tools", ["", "[", "{}", "[{}]", "[1]", '[{"function": {"name": "f", "parameters": {"type": 3}}}]']
)
def test_faulty_tools_are_an_error_that_names_the_reply(tools: str) -> None:
    with pytest.raises(ValueError, match="tools of reply 0"):
        compute("call_validity", predictions=["[]"], tools=[tools])


# --------------------------------------------------------------- draft_acceptance

entries = st.tuples(st.sampled_from(["string", "enum"]), st.integers(0, 4), st.integers(0, 4)).map(
    lambda entry: (entry[0], entry[1] + entry[2], entry[2])
)
replies_made = st.lists(
    st.tuples(st.lists(entries, max_size=4), st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=4
)


@few
@given(replies_made)
def test_acceptance_is_accepted_of_drafted(rows: list[tuple[list[tuple[str, int, int]], int, int]]) -> None:
    found = compute(
        "draft_acceptance",
        kinds=[[kind for kind, _, _ in row] for row, _, _ in rows],
        drafted_slots=[[drafted for _, drafted, _ in row] for row, _, _ in rows],
        accepted_slots=[[accepted for _, _, accepted in row] for row, _, _ in rows],
        drafted_tokens=[[3 * drafted for _, drafted, _ in row] for row, _, _ in rows],
        accepted_tokens=[[accepted for _, _, accepted in row] for row, _, _ in rows],
        calls=[made for _, made, _ in rows],
        base_forwards=[forwards for _, _, forwards in rows],
        head_forwards=[0] * len(rows),
    )
    everything = [entry for row, _, _ in rows for entry in row]
    for name, rates in {None: found, **found["by_kind"]}.items():
        chosen = [entry for entry in everything if name in (None, entry[0])]
        drafted, accepted = sum(entry[1] for entry in chosen), sum(entry[2] for entry in chosen)
        assert (rates["drafted_slots"], rates["accepted_slots"]) == (drafted, accepted)
        assert rates["slot_acceptance"] == (accepted / drafted if drafted else None)
        assert rates["token_acceptance"] == (accepted / (3 * drafted) if drafted else None)
    made = sum(count for _, count, _ in rows)
    forwards = sum(count for _, calls_made, count in rows if calls_made)
    assert found["calls"] == made
    assert found["base_forwards_per_call"] == (forwards / made if made else None)


def test_impossible_counts_are_errors_that_name_the_reply() -> None:
    columns = ("drafted_slots", "accepted_slots", "drafted_tokens", "accepted_tokens")
    row: dict[str, Any] = {"kinds": ["string"], **{column: [1] for column in columns}}
    counts: dict[str, Any] = dict.fromkeys(("calls", "base_forwards", "head_forwards"), 1)
    bad: dict[str, dict[str, Any]] = {
        "Reply 0: 2 of 1 drafted slots": {"accepted_slots": [2]},
        "Reply 0: -1 of 1 drafted tokens": {"accepted_tokens": [-1]},
        "Reply 0: the lengths differ": {"drafted_slots": [1, 1]},
        "Reply 0: None of 1 drafted slots": {"accepted_slots": [None]},
        "Reply 0: a kind is a text": {"kinds": [""]},
        "negative or missing": {"base_forwards": -1},
        "or missing": {"calls": None},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            compute("draft_acceptance", **{name: [value] for name, value in {**row, **counts, **change}.items()})


def test_replies_without_drafts_have_forwards_and_no_acceptance() -> None:
    lists = ("kinds", "drafted_slots", "accepted_slots", "drafted_tokens", "accepted_tokens")
    empty: dict[str, Any] = {name: [[], []] for name in lists}
    found = compute("draft_acceptance", **empty, calls=[0, 2], base_forwards=[9, 5], head_forwards=[9, 1])
    assert (found["slot_acceptance"], found["token_acceptance"], found["by_kind"]) == (None, None, {})
    assert (found["base_forwards_per_call"], found["head_forwards_per_call"]) == (2.5, 0.5)


# --------------------------------------------------------------- expected_calibration_error


@few
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=12), st.sampled_from([1, 2, 4, 5]))
def test_the_calibration_error_is_its_definition(pairs: list[tuple[int, bool]], bins: int) -> None:
    # Twentieths, so that edges of bins are met; their place is worked out in fractions.
    confidences = [number / 20 for number, _ in pairs]
    found = compute("expected_calibration_error", predictions=confidences, references=[r for _, r in pairs], bins=bins)
    groups: dict[int, list[tuple[float, bool]]] = {}
    for number, right in pairs:
        group = max(math.ceil(Fraction(number, 20) * bins), 1)
        groups.setdefault(group, []).append((number / 20, right))
    gaps = {
        group: abs(sum(c for c, _ in members) - sum(r for _, r in members)) / len(members)
        for group, members in groups.items()
    }
    error = sum(gaps[group] * len(members) for group, members in groups.items()) / len(pairs)
    assert found["expected_calibration_error"] == pytest.approx(error, abs=1e-12)
    assert found["maximum_calibration_error"] == pytest.approx(max(gaps.values()), abs=1e-12)
    assert found["brier_score"] == pytest.approx(
        sum((c - r) ** 2 for c, (_, r) in zip(confidences, pairs, strict=True)) / len(pairs)
    )
    assert [one["count"] for one in found["bins"]] == [len(groups[group]) for group in sorted(groups)]


@pytest.mark.parametrize("confidence", [math.nan, -0.1, 1.1, math.inf])
def test_a_confidence_out_of_range_is_an_error(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"Prediction 1: a confidence is a number from 0 to 1, got"):
        compute("expected_calibration_error", predictions=[0.5, confidence], references=[1, 1])


@pytest.mark.parametrize("verdict", [2, -1, 0.7, math.nan])
@pytest.mark.parametrize("name", ["expected_calibration_error", "decision_roc"])
def test_a_verdict_is_0_or_1(name: str, verdict: float) -> None:
    with pytest.raises(ValueError, match=rf"Reference 1: .* got {verdict}"):
        compute(name, predictions=[0.5, 0.5], references=[1, verdict])


def test_no_bins_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one bin"):
        compute("expected_calibration_error", predictions=[0.5], references=[1], bins=0)


# --------------------------------------------------------------- decision_roc

scores = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000000000000001, 0.9, 1.0])


def at(pairs: list[tuple[float, bool]], threshold: float) -> tuple[float | None, float | None]:
    """Relevance and irrelevance at a threshold."""
    wanted = [score >= threshold for score, want in pairs if want]
    others = [score < threshold for score, want in pairs if not want]
    return share(wanted), share(others)


@few
@given(st.lists(st.tuples(scores, st.booleans()), max_size=10), st.tuples(scores, scores), st.sampled_from([None, 0.5]))
def test_the_curve_is_its_definition(
    more: list[tuple[float, bool]], both: tuple[float, float], threshold: float | None
) -> None:
    pairs = [(both[0], True), (both[1], False), *more]
    found = compute(
        "decision_roc", predictions=[s for s, _ in pairs], references=[w for _, w in pairs], threshold=threshold
    )
    wanted, others = ([score for score, want in pairs if want == flag] for flag in (True, False))
    wins = [(one > other) + (one == other) / 2 for one in wanted for other in others]
    assert found["auc"] == pytest.approx(sum(wins) / len(wins))
    relevance, irrelevance = at(pairs, found["threshold"])
    assert (found["relevance"], found["irrelevance"]) == (relevance, irrelevance)
    assert threshold is None or found["threshold"] == threshold

    def balanced(value: float) -> float:
        return sum(filter(None, at(pairs, value))) / 2

    assert found["best_balanced_accuracy"] == pytest.approx(
        max(balanced(value) for value in [2.0, *(s for s, _ in pairs)])
    )
    assert balanced(found["best_threshold"]) == pytest.approx(found["best_balanced_accuracy"])
    for point in found["roc"][1:]:
        hit, held = at(pairs, point["threshold"])
        assert (point["true_positive_rate"], 1 - point["false_positive_rate"]) == (hit, pytest.approx(held))
    assert [found["roc"][end]["true_positive_rate"] for end in (0, -1)] == [0, 1]


def test_one_kind_of_request_gives_what_it_can() -> None:
    found = compute("decision_roc", predictions=[0.2, 0.7], references=[0, 0], threshold=0.5)
    assert (found["irrelevance"], found["relevance"], found["auc"], found["roc"]) == (0.5, None, None, [])
    with pytest.raises(ValueError, match="no threshold is best"):
        compute("decision_roc", predictions=[0.2, 0.7], references=[0, 0])


def test_scores_and_thresholds_are_numbers() -> None:
    with pytest.raises(ValueError, match="Prediction 1: a score is a finite number, got nan"):
        compute("decision_roc", predictions=[0.2, math.nan], references=[0, 1])
    with pytest.raises(ValueError, match="threshold is NaN"):
        compute("decision_roc", predictions=[0.2, 0.7], references=[0, 1], threshold=math.nan)


def test_a_metric_works_again_behind_an_error() -> None:
    with pytest.raises(ValueError):
        compute("decision_roc", predictions=[math.nan], references=[1], threshold=0.5)
    found = compute("decision_roc", predictions=[0.7], references=[1], threshold=0.5)
    assert (found["requests"], found["relevance"]) == (1, 1.0)
