"""The held-out measurement: which requests, what counts as right, what is counted, and a run of the command."""

import json
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from repo_package import ROOT, load_repo_module
from tiny_tokenizer import tiny_vocabulary
from training.data import Row, write_records

# The metrics are an extra of the training environment.
pytest.importorskip("evaluate")

from eval import held_out
from eval.held_out_tables import markdown, tables
from eval.metrics.ast_accuracy.ast_accuracy import accepts_call, accepts_calls

decoding = load_repo_module("call_decoding")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place, now or on one of the days that follow, as the forecast has it",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
    },
}


def record(number: int, calls: list[Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": f"record-{number}",
        "source": "test",
        "messages": [{"role": "user", "content": f"Weather in city {number}?"}],
        "tools": [WEATHER, TIMER],
        "calls": calls,
        **fields,
    }


def call(city: str = "Oslo", **arguments: Any) -> dict[str, Any]:
    return {"name": "get_weather", "arguments": {"city": city, **arguments}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of records: `unseen` with and without calls, and a category of BFCL."""
    folder = tmp_path_factory.mktemp("data")
    several = record(90, [call(), call()])
    conversation = record(91, [call()])
    conversation["messages"] = [
        *conversation["messages"],
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": "So?"},
    ]
    unsupported = record(92, [call()])
    parameters = {"type": "object", "$ref": "https://example.com/schema"}
    unsupported["tools"] = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    own = [record(number, [call("Oslo")] if number % 2 else []) for number in range(8)]
    write_records(folder / "dev" / "dev.jsonl.gz", [*own, several, conversation, unsupported])
    answers = [{"get_weather": {"city": ["Oslo", "Oslo, Norway"], "days": [1, ""]}}]
    asked = [record(number, [call("Oslo")], possible_answer=answers) for number in range(3)]
    write_records(folder / held_out.BFCL_FOLDER / "simple_python.jsonl.gz", asked)
    return folder


# --------------------------------------------------------------- possible answers


@pytest.mark.parametrize(
    ("value", "accepted", "right"),
    [
        ("Oslo", ["Oslo"], True),
        ("new york", ["New York", "NYC"], True),
        ("New-York.", ["new york"], True),
        ("it's", ['it"s'], True),
        ("York", ["New York"], False),
        (5, [5], True),
        (5.0, [5], True),
        (True, [1], False),
        (1, [True], False),
        (None, ["None"], False),
        ("5", [5], False),
        ([1, 2], [[1, 2]], True),
        ([2, 1], [[1, 2]], False),
        ([1], [[1, 2]], False),
        (["A b"], [["ab"]], True),
        ({"a": 1}, [{"a": [1, 2], "b": [3, ""]}], True),
        ({"a": 1, "b": 4}, [{"a": [1, 2], "b": [3, ""]}], False),
        ({"b": 3}, [{"a": [1, 2], "b": [3, ""]}], False),
        ({"a": 1, "c": 1}, [{"a": [1]}], False),
        ([{"a": 1}], [[{"a": [1]}]], True),
        ("", ["", "x"], True),
        ("", ["x"], False),
    ],
)
def test_any_of_the_accepted_values_is_right(value: Any, accepted: list[Any], right: bool) -> None:
    assert accepts_call({"name": "f", "arguments": {"x": value}}, {"f": {"x": accepted}}) == right


def test_a_name_is_compared_as_it_is_and_arguments_are_neither_too_many_nor_too_few() -> None:
    answer: dict[str, Any] = {"get_weather": {"city": ["Oslo"], "days": [1, ""]}}
    assert accepts_call(call(), answer)
    assert accepts_call(call(days=1), answer)
    assert not accepts_call(call(days=2), answer)
    assert not accepts_call({"name": "get_weather", "arguments": {"days": 1}}, answer)
    assert not accepts_call(call(unit="C"), answer)
    assert not accepts_call({**call(), "name": "Get_weather"}, answer)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2), max_size=4),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True), max_size=4),
)
def test_calls_are_accepted_where_some_pairing_accepts_each(values: list[int], accepted: list[list[int]]) -> None:
    made = [{"name": "f", "arguments": {"x": value}} for value in values]
    answers = [{"f": {"x": numbers}} for numbers in accepted]
    pairings = permutations(accepted) if len(values) == len(accepted) else []
    right = any(all(v in numbers for v, numbers in zip(values, pairing, strict=True)) for pairing in pairings)
    assert accepts_calls(made, answers) == right


def test_every_gold_call_of_the_leaderboard_is_a_possible_answer() -> None:
    folder = held_out.DEFAULT_DATA / held_out.BFCL_FOLDER
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    checked = 0
    for name in held_out.BFCL_SETS:
        for found in held_out.read_records(folder / f"{name}.jsonl.gz"):
            if "possible_answer" in found:
                assert accepts_calls(found["calls"], found["possible_answer"]), found["id"]
                assert not accepts_calls([], found["possible_answer"]), found["id"]
                checked += 1
    assert checked == 1150


# --------------------------------------------------------------- requests


def test_a_smaller_limit_takes_the_first_requests_and_others_are_left_out(data: Path, tokenizer: Any) -> None:
    everything, left_out = held_out.requests("unseen", data, tokenizer, 2000, 100)
    ids = [request.row.id for request in everything]
    assert set(ids) == {f"record-{number}" for number in range(8)}, "one turn, one call or none"
    assert left_out == 1, "the tool whose schema is not supported"
    for limit in (0, 1, 5):
        some, _ = held_out.requests("unseen", data, tokenizer, 2000, limit)
        assert [request.row.id for request in some] == ids[:limit]
    again, _ = held_out.requests("unseen", data, tokenizer, 2000, 100)
    assert [request.row.prompt_ids for request in again] == [request.row.prompt_ids for request in everything]


def test_prompts_of_the_leaderboard_show_their_tools_in_full(data: Path, tokenizer: Any) -> None:
    (first, *others), left_out = held_out.requests("simple_python", data, tokenizer, 2000, 100)
    assert (len(others), left_out) == (2, 0)
    text = tokenizer.decode(first.row.prompt_ids)
    assert WEATHER["function"]["description"] in text  # type: ignore[index]
    assert first.accepts([call("oslo norway", days=1)], equal=False)
    assert not first.accepts([call("Bergen")], equal=False)
    assert held_out.requests("simple_python", data, tokenizer, 10, 100) == ([], 3)


# --------------------------------------------------------------- counts


def row(calls: list[Any]) -> Row:
    return Row("id", "test", [1], [2], [WEATHER, TIMER], calls, [])


NO_SLOTS: dict[str, list[Any]] = {
    name: [] for name in ("kinds", "drafted_slots", "accepted_slots", "drafted_tokens", "accepted_tokens")
}


def answer(calls: list[Any], probability: float = 0.5, **fields: Any) -> Any:
    given = {"slots": NO_SLOTS, "base_forwards": 3, "head_forwards": 2, "seconds": 0.5, **fields}
    return held_out.Answer(calls, [len(calls)] if calls else [], probability, **given)


def test_a_summary_counts_what_it_names() -> None:
    gold = [[call()], [call()], [call()], [], []]
    made = [[call()], [call("Bergen")], [], [], [call(days="now")]]
    todo = [held_out.Request(row(calls)) for calls in gold]
    slots = {
        "kinds": ["string", "presence"],
        "drafted_slots": [4, 2],
        "accepted_slots": [3, 0],
        "drafted_tokens": [8, 2],
        "accepted_tokens": [7, 0],
    }
    answers = [answer(calls, slots=slots if number == 0 else NO_SLOTS) for number, calls in enumerate(made)]
    found = held_out.summary(todo, answers, [answer(calls) for calls in [[call()], [], [], [], []]])
    assert (found["requests"], found["right"], found["equal"]) == (5, 2, 2)
    assert (found["calls_wanted"], found["calls_right"], found["names_right"]) == (3, 1, 2)
    assert found["refusals_right"] == 1
    assert (found["relevance"], found["irrelevance"], found["balanced_accuracy"]) == (0.667, 0.5, 0.583)
    assert found["valid"] == 4, "`days` is no integer in the last one"
    assert found["same_tokens_as_ar"] == 3
    assert found["slots_accepted"] == 0.75, "of values; whether they are there is counted by kind"
    assert found["accepted_by_kind"]["presence"]["slot_acceptance"] == 0
    assert found["accepted_by_kind"]["string"]["token_acceptance"] == 0.875
    assert (found["base_forwards_per_call"], found["head_forwards_per_call"], found["median_ms"]) == (3, 2, 500)


def test_what_a_call_holds_in_the_slots_of_the_gold_call_is_counted_by_kind() -> None:
    gold = [[call("Oslo", days=2)], [call("Oslo")], [call("")], []]
    made = [[call("Oslo", days=3)], [], [call("")], [call("Rome")]]
    todo = [held_out.Request(row(calls)) for calls in gold]
    found = held_out.summary(todo, [answer(calls) for calls in made], [answer([])] * 4)
    assert found["values_right"] == 0.5, "of Oslo, 2, Oslo and the empty text; a call too many has no gold values"
    assert found["right_by_kind"] == {
        "integer": {"slots": 1, "exact_match": 0, "missing": 0},
        "presence": {"slots": 3, "exact_match": 0.667, "missing": 0.333},
        "string": {"slots": 3, "exact_match": 0.667, "missing": 0.333},
    }


def test_without_a_gold_call_no_value_is_counted() -> None:
    found = held_out.summary([held_out.Request(row([]))], [answer([call()])], [answer([])])
    assert (found["values_right"], found["right_by_kind"]) == (None, {})


names = st.sampled_from(["Oslo", "Rome", ""])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, st.one_of(st.none(), st.integers(0, 2))), max_size=4), st.randoms())
def test_the_gold_calls_in_another_order_are_right_in_every_slot(values: list[Any], chance: Any) -> None:
    gold = [call(city, **({} if days is None else {"days": days})) for city, days in values]
    slots = held_out.gold_slots(row(gold), chance.sample(gold, len(gold)))
    assert len(slots) == sum(2 + (days is not None) for _, days in values), "city, and whether days are there"
    assert all(made == true for made, true, _ in slots)
    assert all(made == "" for made, _, _ in held_out.gold_slots(row(gold), []))


def test_a_longer_array_differs_in_its_length_alone_and_a_gold_call_without_a_layout_is_left_out() -> None:
    parameters = {"type": "object", "properties": {"days": {"type": "array", "items": {"type": "integer"}}}}
    tool = {"type": "function", "function": {"name": "plan", "parameters": {**parameters, "required": ["days"]}}}
    gold, longer = ({"name": "plan", "arguments": {"days": days}} for days in ([4, 5], [4, 5, 6, 7]))
    asked = Row("id", "test", [1], [2], [tool], [gold], [])
    slots = held_out.gold_slots(asked, [longer])
    assert [(made == true, kind) for made, true, kind in slots] == [
        (False, "length"),
        (True, "integer"),
        (True, "integer"),
    ]
    no_days = Row("id", "test", [1], [2], [tool], [{"name": "plan", "arguments": {"weeks": 1}}], [])
    assert held_out.gold_slots(no_days, [longer]) == []


def test_possible_answers_decide_what_is_right_where_there_are_some() -> None:
    todo = [held_out.Request(row([call()]), [{"get_weather": {"city": ["Oslo", "Bergen"]}}])]
    found = held_out.summary(todo, [answer([call("Bergen")])], [answer([])])
    assert (found["right"], found["equal"], found["slots_accepted"]) == (1, 0, None)


def test_a_summary_of_a_model_that_never_calls_has_no_cost_of_a_call() -> None:
    todo = [held_out.Request(row([])), held_out.Request(row([call()]))]
    found = held_out.summary(todo, [answer([]), answer([])], [answer([]), answer([])])
    assert found["base_forwards_per_call"] is found["head_forwards_per_call"] is found["median_ms"] is None
    assert (found["right"], found["irrelevance"], found["relevance"]) == (1, 1, 0)


def test_the_decision_is_judged_where_calls_and_refusals_are_wanted() -> None:
    todo = [held_out.Request(row(calls)) for calls in ([], [call()], [call()])]
    answers = [answer([], probability) for probability in (0.2, 0.6, 0.8)]
    assert held_out.decision(todo, answers) == {"auc": 1, "best_threshold": 0.4, "best_balanced_accuracy": 1}
    assert held_out.decision(todo[1:], answers[1:]) is None


def test_accepted_tokens_are_those_in_front_of_the_first_difference() -> None:
    vocabulary = tiny_vocabulary()
    model = SimpleNamespace(vocabulary=vocabulary)
    texts = [("New York", "New York"), ("New York", "New Jersey"), ("New York", None), ("New York", "New York City")]
    slots = [decoding.DraftedSlot("/city", "string", drafted, final) for drafted, final in texts]
    found = held_out.Model.slot_counts(model, slots)  # type: ignore[arg-type]
    tokens = [list(vocabulary.encode(text)) for text in ("New York", "New Jersey", "New York City")]
    shared = [next(n for n in range(99) if tokens[0][:n] != other[:n] or n > len(other)) - 1 for other in tokens[1:]]
    assert (found["drafted_slots"], found["accepted_slots"]) == ([4], [1])
    assert found["drafted_tokens"] == [4 * len(tokens[0])]
    assert found["accepted_tokens"] == [len(tokens[0]) + shared[0] + min(shared[1], len(tokens[0]))]


def test_spread_keeps_the_shape_and_leaves_out_what_is_no_number() -> None:
    runs: list[dict[str, Any]] = [
        {"unseen": {"ar": {"right": right, "auc": None, "kind": "x"}}, "other": None} for right in (4, 8)
    ]
    found = held_out.spread(runs)
    assert found == {"unseen": {"ar": {"right": {"mean": 6, "sd": 2.8284, "least": 4, "most": 8}}}}


# --------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def results(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes about the shipped model, taken twice as if it were two."""
    out = tmp_path_factory.mktemp("out") / "results.json"
    words = ["--data", str(data), "--sets", "unseen", "simple_python", "--limit", "2", "--threads", "1"]
    held_out.main([*words, "--model", f"{ROOT},{ROOT}", "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_command_writes_every_set_and_decoding(results: dict[str, Any]) -> None:
    assert results["sets"].keys() == {"unseen"}
    assert results["bfcl"].keys() == {"simple_python"}
    for decodings in (results["sets"]["unseen"], results["bfcl"]["simple_python"]):
        assert list(decodings) == ["ar", "verified", "diffusion"]
        assert all(counts["requests"] == counts["valid"] == 2 for counts in decodings.values())
        assert decodings["verified"]["same_tokens_as_ar"] == 2
        assert decodings["verified"]["right"] == decodings["ar"]["right"]
        assert decodings["diffusion"]["slots_accepted"] is None, "nobody checked"
    assert results["command"].startswith("python -m eval.held_out --sets unseen simple_python --limit 2 --threads 1")


def test_two_runs_of_one_model_do_not_spread(results: dict[str, Any]) -> None:
    assert len(results["further_models"]) == 1
    for decoding_name, counts in results["spread"]["sets"]["unseen"].items():
        for name, value in results["sets"]["unseen"][decoding_name].items():
            if name != "median_ms" and isinstance(value, int):
                assert counts[name] == {"mean": value, "sd": 0, "least": value, "most": value}


def test_the_command_prints_the_tables_of_a_file(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    held_out.main(["--markdown", "--out", str(path)])
    assert capsys.readouterr().out.rstrip("\n") == "\n\n".join(tables(results))
    assert json.loads(path.read_text(encoding="utf-8")) == results, "nothing was measured"
    with pytest.raises(SystemExit):
        held_out.main(["--markdown", "--out", str(tmp_path / "none.json")])
    assert "there is no" in capsys.readouterr().err


def test_every_part_of_a_result_has_its_table() -> None:
    todo = [held_out.Request(row(calls)) for calls in ([call("Oslo")], [call("Rome")], [])]
    slots = {
        "kinds": ["string", "presence"],
        "drafted_slots": [4, 2],
        "accepted_slots": [3, 0],
        "drafted_tokens": [8, 2],
        "accepted_tokens": [7, 0],
    }
    written = [answer([call("Oslo")]), answer([call("Lima")]), answer([], 0.1)]
    checked = [answer([call("Oslo")], slots=slots), *written[1:]]
    answers = {"ar": written, "verified": checked, "diffusion": written[:1] + [answer([])] * 2}
    counts = {name: held_out.summary(todo, made, written) for name, made in answers.items()}
    one = {
        "sets": {"unseen": counts},
        "bfcl": {"multiple": counts},
        "decision": {"unseen": held_out.decision(todo, written)},
    }
    own, leaderboard, decided, kinds, spreads = (
        cells(table) for table in tables({**one, "further_models": [one], "spread": held_out.spread([one, one])})
    )
    forwards = ["base forwards per call", "head forwards per call"]
    assert own == [
        ["set", "decoding", "right", "calls right", *forwards, "values accepted", "values right", "median ms per call"],
        ["unseen tools", "`ar`", "2 of 3", "1 of 2", "3.0", "2.0", "", "50%", "500.0"],
        ["unseen tools", "`verified`", "2 of 3", "1 of 2", "3.0", "2.0", "75%", "50%", "500.0"],
        ["unseen tools", "`diffusion`", "2 of 3", "1 of 2", "3.0", "2.0", "not checked", "50%", "500.0"],
    ]
    assert leaderboard[0][0] == "category"
    assert [line[1:] for line in leaderboard] == [line[1:] for line in own]
    assert decided[1] == ["unseen tools", "100%", "100%", "100%", "1.000"]
    assert kinds[0][2:] == ["drafted", "accepted", "tokens accepted", *(f"right, `{name}`" for name in answers)]
    assert kinds[1:3] == [
        ["unseen tools", "presence", "2", "0%", "0%", "100% of 2", "100% of 2", "50% of 2"],
        ["unseen tools", "string", "4", "75%", "88%", "50% of 2", "50% of 2", "50% of 2"],
    ]
    assert spreads[0][0] == "set, 2 models"
    assert spreads[2] == [
        "unseen tools",
        "`verified`",
        "2.0 ± 0.0 (2.0 to 2.0)",
        "1.0 ± 0.0 (1.0 to 1.0)",
        "3.00 ± 0.00 (3.00 to 3.00)",
        "0.750 ± 0.000 (0.750 to 0.750)",
        "0.500 ± 0.000 (0.500 to 0.500)",
    ]


def cells(table: str) -> list[list[str]]:
    """Header and rows of a Markdown table; all are as wide as its rule."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
    assert {len(line) for line in lines} == {len(lines[1])}
    assert set(lines.pop(1)) == {"---"}
    return lines


def test_a_column_or_a_table_without_anything_in_it_is_not_printed() -> None:
    assert markdown(["a", "b", "c"], [["1", "", "2"], ["3", "", ""]]) == "| a | c |\n|---|---|\n| 1 | 2 |\n| 3 |  |"
    assert markdown(["a"], []) == ""
    assert tables({"sets": {}}) == []


def test_without_the_reference_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        held_out.main(["--decodings", "verified"])
    assert "--decodings must hold ar" in capsys.readouterr().err


def test_a_set_of_which_nothing_fits_is_an_error(data: Path, tokenizer: Any) -> None:
    config = SimpleNamespace(
        max_call_tokens=1, get_text_config=lambda: SimpleNamespace(max_position_embeddings=5, vocab_size=1)
    )
    model = SimpleNamespace(tokenizer=tokenizer, room=1, model=SimpleNamespace(config=config))
    options = SimpleNamespace(sets=["unseen"], data=data, limit=5)
    with pytest.raises(SystemExit, match="unseen: all 9 records were left out"):
        held_out.measure(model, options)  # type: ignore[arg-type]
