"""The BFCL measurement: the official checker, its data, how scores are weighed, and a run of the command.

What needs the official checker is skipped where `bfcl-eval` is not importable. `pip install --no-deps --target bfcl
bfcl-eval` and `PYTHONPATH=bfcl` make it so.
"""

import copy
import dataclasses
import itertools
import json
import math
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# The data module that names the default folder belongs to the training extra.
pytest.importorskip("datasets")

from eval import bfcl
from eval.bfcl_checker import CheckerMissingError, OfficialChecker, language_of, load_checker, source_text
from eval.bfcl_handler import Answered
from training.data import DEFAULT_DATA

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "dict",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
ANSWERS = [{"get_weather": {"city": ["Oslo"], "days": [1, ""]}}]


def call(city: str = "Oslo", **arguments: Any) -> dict[str, Any]:
    return {"name": "get_weather", "arguments": {"city": city, **arguments}}


# --------------------------------------------------------------- a checker that is not the official one

CHECKER = """
from bfcl_eval.constants.enums import Language
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING


def ast_checker(functions, made, answers, language, category, model):
    assert not MODEL_CONFIG_MAPPING[model].underscore_to_dot
    if any("boom" in next(iter(call.values())).values() for call in made):
        raise KeyError("items")
    (name, accepted), = answers[0].items()
    right = len(made) == 1 and list(made[0]) == [name] and made[0][name]["city"] in accepted["city"]
    return {"valid": right, "error": [] if right else ["no"], "error_type": f"wrong:{language.value}"}
"""
UTILS = """
from bfcl_eval.constants.eval_config import *


def add_language_specific_hint_to_function_doc(requests):
    for request in requests:
        for function in request["function"]:
            function["description"] += " " + request["id"]
"""
ENUMS = """
from enum import Enum


class Language(Enum):
    PYTHON = "python"
    JAVA = "java"
    JAVASCRIPT = "javascript"
"""


def lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def put_data(folder: Path) -> None:
    """BFCL's files with four requests that want a call and two that want none."""

    def questions(category: str, count: int) -> list[dict[str, Any]]:
        asked = [[{"role": "user", "content": f"Weather in city {category}?"}]]
        return [{"id": f"{category}_{n}", "question": asked, "function": [WEATHER]} for n in range(count)]

    wanted = questions("simple_python", 4)
    lines(folder / "BFCL_v4_simple_python.json", wanted)
    answers = [{"id": one["id"], "ground_truth": ANSWERS} for one in wanted]
    lines(folder / "possible_answer" / "BFCL_v4_simple_python.json", answers)
    lines(folder / "BFCL_v4_irrelevance.json", questions("irrelevance", 2))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a package of the official names, with data."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("", "constants", "eval_checker", "eval_checker/ast_eval"):
        (folder / "bfcl_eval" / name).mkdir(exist_ok=True)
        (folder / "bfcl_eval" / name / "__init__.py").touch()
    (folder / "bfcl_eval" / "constants" / "enums.py").write_text(ENUMS)
    (folder / "bfcl_eval" / "constants" / "model_config.py").write_text("import every_vendor")
    (folder / "bfcl_eval" / "constants" / "eval_config.py").write_text("raise OSError('makes folders')")
    (folder / "bfcl_eval" / "utils.py").write_text(UTILS)
    (folder / "bfcl_eval" / "eval_checker" / "ast_eval" / "ast_checker.py").write_text(CHECKER)
    put_data(folder / "bfcl_eval" / "data")
    (folder / "bfcl_eval-7.1.dist-info").mkdir()
    (folder / "bfcl_eval-7.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: bfcl_eval\nVersion: 7.1\n"
    )
    return folder


@pytest.fixture(scope="module")
def checker(package: Path) -> OfficialChecker:
    return load_checker(package)


# --------------------------------------------------------------- the official checker

UNWRITABLE = {
    "simple_java": {26, 35, 38, 45, 58, 69, 72, 82, 87, 88},
    "simple_javascript": {9, 11, 15, 19, 32, 37, 39},
}
"""Numbers of the requests whose answers name a variable where the type is a number, a list or a map."""
REJECTED = {"simple_java": {35, 36, 64, 65, 78, 83, 85, 86, 89, 90, 91}}
"""Numbers of the requests whose own answers do not pass: the checker keeps the quotes of strings in arrays and, where a
map's accepted value is no list (64), takes its letters for the accepted ones."""
CALLING = ("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple")
OMITTED = object()


def gold(accepted: Sequence[Any], required: bool) -> Any:
    """The first accepted value of an argument; nothing where it may be left out."""
    if "" in accepted and not required:
        return OMITTED
    return gold_value(next((value for value in accepted if value != ""), ""))


def gold_value(value: Any) -> Any:
    if isinstance(value, dict):
        members = {name: gold(one if isinstance(one, list) else [one], False) for name, one in value.items()}
        return {name: one for name, one in members.items() if one is not OMITTED}
    return [gold_value(one) for one in value] if isinstance(value, list) else value


def gold_calls(entry: bfcl.Entry) -> list[dict[str, Any]]:
    """BFCL's own answer to one of its requests."""
    required = {function["name"]: function["parameters"]["required"] for function in entry.functions}
    calls = []
    for answer in entry.answers:
        ((name, arguments),) = answer.items()
        made = {key: gold(accepted, key in required[name]) for key, accepted in arguments.items()}
        calls.append({"name": name, "arguments": {key: one for key, one in made.items() if one is not OMITTED}})
    return calls


@pytest.fixture(scope="module")
def official() -> OfficialChecker:
    try:
        return load_checker()
    except CheckerMissingError as error:
        pytest.skip(f"the official checker is not installed: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def entries(official: OfficialChecker) -> dict[str, list[bfcl.Entry]]:
    """The open categories that want a call."""
    try:
        folder, _ = bfcl.find_data(None, official, DEFAULT_DATA)
    except bfcl.DataMissingError as error:
        pytest.skip(str(error))
    return {category: bfcl.read_entries(folder, category) for category in CALLING}


@pytest.mark.parametrize("category", CALLING)
def test_the_official_answers_pass_the_official_checker(
    category: str, official: OfficialChecker, entries: dict[str, list[bfcl.Entry]]
) -> None:
    faults = {
        entry.id: official.fault(category, entry.functions, gold_calls(entry), entry.answers)
        for entry in entries[category]
    }
    wrong = {name for name, fault in faults.items() if fault is not None}
    assert wrong == {f"{category}_{number}" for number in REJECTED.get(category, ())}
    assert len(faults) == {"simple_python": 400, "simple_java": 100, "simple_javascript": 50}.get(category, 200)


def spoiled(calls: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Calls that are wrong in one way each."""
    yield []
    yield [*calls, calls[0]]
    for change in ("name", "more"):
        made = copy.deepcopy(calls)
        made[0] |= {"name": made[0]["name"] + "x"} if change == "name" else {}
        made[0]["arguments"] |= {"surplus": 1} if change == "more" else {}
        yield made
    for key, value in calls[0]["arguments"].items():
        made = copy.deepcopy(calls)
        made[0]["arguments"][key] = spoiled_value(value)
        yield made


def spoiled_value(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return value | {"spoiled": 1}
    return (
        [*value, "spoiled"] if isinstance(value, list) else f"{value} spoiled" if isinstance(value, str) else value + 7
    )


@pytest.mark.parametrize("category", CALLING)
def test_known_wrong_answers_fail_the_official_checker(
    category: str, official: OfficialChecker, entries: dict[str, list[bfcl.Entry]]
) -> None:
    for entry in entries[category]:
        for made in spoiled(gold_calls(entry)):
            assert official.fault(category, entry.functions, made, entry.answers) is not None, (entry.id, made)


@pytest.mark.parametrize("category", ["simple_java", "simple_javascript"])
def test_some_answers_are_no_values_of_their_type(category: str, entries: dict[str, list[bfcl.Entry]]) -> None:
    strings = {"String", "any", "char", ""}
    found = set()
    for entry in entries[category]:
        properties = entry.functions[0]["parameters"]["properties"]
        arguments = gold_calls(entry)[0]["arguments"]
        if any(isinstance(one, str) and properties[name]["type"] not in strings for name, one in arguments.items()):
            found.add(int(entry.id.rpartition("_")[2]))
    assert found == UNWRITABLE[category]


def test_the_official_checker_knows_dots_and_any_order(official: OfficialChecker) -> None:
    functions = [WEATHER | {"name": "weather.get"}]
    answers = [{"weather.get": {"city": [city], "days": [""]}} for city in ("Oslo", "Bergen")]
    calls = [{"name": "weather.get", "arguments": {"city": city}} for city in ("Bergen", "Oslo")]
    assert official.fault("parallel", functions, calls, answers) is None
    assert official.fault("parallel", functions, calls[:1], answers) == "parallel_function_checker_no_order:wrong_count"
    assert official.fault("simple_python", functions, [calls[1]], answers) is None
    assert official.fault("simple_python", functions, [calls[0]], answers) == "value_error:string"


def test_the_official_hints_make_strings_of_java_and_leave_the_request_alone(official: OfficialChecker) -> None:
    functions = [copy.deepcopy(WEATHER)]
    (python,) = official.shown_functions("simple_python_0", functions)
    (java,) = official.shown_functions("simple_java_0", functions_with_descriptions := [described(WEATHER)])
    assert functions == [WEATHER]
    assert functions_with_descriptions == [described(WEATHER)]
    assert python == WEATHER | {"description": python["description"]}
    assert "Python" in python["description"]
    assert {one["type"] for one in java["parameters"]["properties"].values()} == {"string"}
    assert "integer" in java["parameters"]["properties"]["days"]["description"]


def described(function: dict[str, Any]) -> dict[str, Any]:
    """The function with descriptions of its parameters, as all of BFCL's have."""
    made = copy.deepcopy(function)
    for name, schema in made["parameters"]["properties"].items():
        schema["description"] = f"The {name}."
    return made


# --------------------------------------------------------------- finding the checker


def test_only_the_checker_is_loaded_and_nothing_of_it_stays(package: Path) -> None:
    before = [name for name in sys.modules if name.startswith("bfcl_eval")]
    found = load_checker(package)
    assert found.version == "7.1"
    assert found.fault("simple_python", [WEATHER], [call()], ANSWERS) is None
    assert found.fault("simple_python", [WEATHER], [call("Rome")], ANSWERS) == "wrong:python"
    assert [name for name in sys.modules if name.startswith("bfcl_eval")] == before


def test_an_installed_package_and_a_wheel_are_found_too(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "bfcl_eval-7.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in package.rglob("*"):
            if "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(package))
    monkeypatch.syspath_prepend(str(package))
    for found in (load_checker(wheel), load_checker()):
        assert found.version == "7.1"
        assert found.fault("simple_python", [WEATHER], [call()], ANSWERS) is None
        assert len(bfcl.read_entries(found.data, "simple_python")) == 4


def test_a_missing_checker_says_what_to_type(tmp_path: Path, package: Path) -> None:
    (tmp_path / "bfcl_eval").mkdir()  # a folder of that name is no package yet
    for path, problem in [
        (tmp_path / "nowhere", "there is no"),
        (tmp_path, "no official checker"),
        (package / "bfcl_eval", "must hold the folder"),
    ]:
        with pytest.raises(CheckerMissingError, match=problem) as raised:
            load_checker(path)
        assert "pip install --no-deps --target bfcl bfcl-eval==" in str(raised.value)
        assert "python -m eval.bfcl --checker-path bfcl" in str(raised.value)
    (tmp_path / "bfcl_eval" / "__init__.py").touch()
    with pytest.raises(CheckerMissingError, match="holds no checker that is known here"):
        load_checker(tmp_path)


def test_deciding_whether_to_call_needs_no_answer(checker: OfficialChecker) -> None:
    for category, calls, fault in [
        ("irrelevance", [], None),
        ("live_irrelevance", [call()], "irrelevance_error:decoder_success"),
        ("live_relevance", [call("Rome")], None),
        ("live_relevance", [], "relevance_error:decoder_failed"),
        ("parallel", [], "ast_decoder:decoder_failed"),
    ]:
        assert checker.fault(category, [WEATHER], calls, []) == fault


def test_a_value_that_breaks_the_checker_is_wrong(checker: OfficialChecker) -> None:
    assert checker.fault("simple_python", [WEATHER], [call("boom")], ANSWERS) == "checker_failed:KeyError"


# --------------------------------------------------------------- Java and JavaScript


@pytest.mark.parametrize(
    ("value", "parameter", "text"),
    [
        ("mapArea", {"type": "any"}, "mapArea"),
        ('say "x"', {"type": "String"}, 'say "x"'),
        (True, {"type": "boolean"}, "true"),
        (5, {"type": "integer"}, "5"),
        (5, {"type": "long"}, "5L"),
        (-2.5, {"type": "float"}, "-2.5f"),
        (2.5, {"type": "double"}, "2.5"),
        (None, {"type": "any"}, "null"),
        ([1, 2], {"type": "Array", "items": {"type": "integer"}}, "new int[]{1, 2}"),
        (["a", 'b"'], {"type": "Array", "items": {"type": "String"}}, 'new String[]{"a", "b\\""}'),
        (["a"], {"type": "Array", "items": {"type": "char"}}, "new char[]{'a'}"),
        ([], {"type": "Array", "items": {"type": "String"}}, "new String[]{}"),
        ([], {"type": "ArrayList", "items": {"type": "long"}}, "new ArrayList<>()"),
        ([3], {"type": "ArrayList", "items": {"type": "long"}}, "new ArrayList<>(Arrays.asList(3L))"),
        ([["a", True]], {"type": "Array", "items": {"type": "any"}}, 'new Object[]{new Object[]{"a", true}}'),
        ({}, {"type": "HashMap"}, "new HashMap<>()"),
        (
            {"é": 50, "b": "c"},
            {"type": "HashMap"},
            'new HashMap<String, Object>() {{ put("é", 50); put("b", "c"); }}',
        ),
    ],
)
def test_values_are_written_as_java(value: Any, parameter: dict[str, Any], text: str) -> None:
    assert source_text(value, parameter, "java") == text


@pytest.mark.parametrize(
    ("value", "parameter", "text"),
    [
        ("myButton", {"type": "any"}, "myButton"),
        (5, {"type": "integer"}, "5"),
        (5, {"type": "Bigint"}, "5n"),
        (True, {"type": "Boolean"}, "true"),
        (None, {"type": "any"}, "null"),
        (["ä", 1.5], {"type": "array"}, '["ä", 1.5]'),
        ({"a": [True]}, {"type": "dict"}, '{"a": [true]}'),
    ],
)
def test_values_are_written_as_javascript(value: Any, parameter: dict[str, Any], text: str) -> None:
    assert source_text(value, parameter, "javascript") == text


def test_only_two_categories_are_of_another_language() -> None:
    others = {name: language_of(name) for name in (*bfcl.NON_LIVE, *bfcl.LIVE) if language_of(name) != "python"}
    assert others == {"simple_java": "java", "simple_javascript": "javascript"}


# --------------------------------------------------------------- data


def test_data_are_looked_for_in_three_places(package: Path, checker: OfficialChecker, tmp_path: Path) -> None:
    named = tmp_path / "named"
    put_data(named)
    put_data(tmp_path / "bfcl_open" / "original")
    assert bfcl.find_data(named, checker, tmp_path) == (named, str(named))
    assert bfcl.find_data(None, checker, tmp_path)[1] == "bfcl-eval 7.1"
    bare = dataclasses.replace(checker, data=tmp_path / "no data")
    assert bfcl.find_data(None, bare, tmp_path) == (tmp_path / "bfcl_open" / "original", "bfcl_open/original")
    with pytest.raises(bfcl.DataMissingError, match="--bfcl: there is no folder"):
        bfcl.find_data(tmp_path / "nowhere", checker, tmp_path)
    with pytest.raises(bfcl.DataMissingError, match="Name it with --bfcl"):
        bfcl.find_data(None, bare, named)


def test_faulty_data_are_named(tmp_path: Path) -> None:
    put_data(tmp_path)
    with pytest.raises(bfcl.DataMissingError, match=r"BFCL_v4_parallel\.json.*holds BFCL_v4_irrelevance\.json"):
        bfcl.read_entries(tmp_path, "parallel")
    (tmp_path / "BFCL_v4_live_relevance.json").write_text("{", encoding="utf-8")
    with pytest.raises(bfcl.DataMissingError, match="is not JSON"):
        bfcl.read_entries(tmp_path, "live_relevance")
    lines(tmp_path / "BFCL_v4_live_relevance.json", [{"id": "live_relevance_0", "question": [[]]}])
    with pytest.raises(bfcl.DataMissingError, match="'function'"):
        bfcl.read_entries(tmp_path, "live_relevance")


def test_a_smaller_limit_takes_the_first_of_the_same_order(tmp_path: Path) -> None:
    put_data(tmp_path)
    found = bfcl.read_entries(tmp_path, "simple_python")
    orders = [[entry.id for entry in bfcl.chosen(found, 0, seed)] for seed in range(8)]
    assert [entry.id for entry in bfcl.chosen(found[::-1], 2, 0)] == orders[0][:2]
    assert all(sorted(order) == [entry.id for entry in found] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


# --------------------------------------------------------------- scores


def test_categories_are_weighed_as_bfcl_does() -> None:
    sizes = dict.fromkeys(bfcl.NON_LIVE, 100) | dict.fromkeys(bfcl.LIVE, 10) | {"live_multiple": 70}
    found = bfcl.groups(sizes)
    assert list(found) == ["non-live AST", "live AST", "irrelevance", "overall", "relevance"]
    assert all(sum(weights.values()) == pytest.approx(1) for weights in found.values())
    assert found["non-live AST"]["simple_java"] == pytest.approx(1 / 12)
    assert found["non-live AST"]["parallel"] == pytest.approx(1 / 4)
    assert found["live AST"] == pytest.approx(
        {"live_simple": 0.1, "live_multiple": 0.7, "live_parallel": 0.1, "live_parallel_multiple": 0.1}
    )
    assert found["irrelevance"] == {"irrelevance": 0.5, "live_irrelevance": 0.5}
    assert found["overall"]["live_multiple"] == pytest.approx(0.7 / 3)
    assert found["overall"]["irrelevance"] == pytest.approx(0.5 / 3)


def test_a_score_is_given_only_where_all_its_categories_are_measured() -> None:
    assert bfcl.groups({"simple_python": 400, "multiple": 200}) == {}
    assert list(bfcl.groups({"irrelevance": 240, "simple_python": 400})) == ["irrelevance"]
    assert list(bfcl.groups(dict.fromkeys(bfcl.NON_LIVE, 9))) == ["non-live AST", "irrelevance", "overall"]


def test_groups_are_scored_by_their_weights() -> None:
    rows = {name: {"right": 1, "requests": 2} for name in bfcl.NON_LIVE}
    rows |= {"simple_java": {"right": 0, "requests": 9}, "irrelevance": {"right": 4, "requests": 4}}
    found = bfcl.combined(rows, dict.fromkeys(bfcl.NON_LIVE, 9), 0)
    assert found["non-live AST"]["accuracy"] == pytest.approx(1 / 2 - 1 / 24, abs=1e-4)
    assert found["overall"]["accuracy"] == pytest.approx((1 / 2 - 1 / 24 + 1) / 2, abs=1e-4)
    assert found["irrelevance"] == {"accuracy": 1.0, "interval": [1.0, 1.0], "of": ["irrelevance"]}
    low, high = found["overall"]["interval"]
    assert low < found["overall"]["accuracy"] < high


@settings(max_examples=20, deadline=None)
@given(requests=st.integers(20, 500), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_intervals_are_the_quantiles_of_resampling(requests: int, share: float, seed: int) -> None:
    right = round(share * requests)
    found = bfcl.interval(bfcl.resampled(right, requests, [seed, 0]))
    assert found == bfcl.interval(bfcl.resampled(right, requests, [seed, 0]))
    # A sample with replacement of as many requests holds k right ones with this probability.
    rate = right / requests
    chances = [math.comb(requests, k) * rate**k * (1 - rate) ** (requests - k) for k in range(requests + 1)]
    # Ends of an interval that a little less and a little more than its 95% would have.
    for end, (outer, inner) in zip(found, [(0.02, 0.03), (0.97, 0.98)], strict=True):
        least, most = (
            next(k for k, sum_ in enumerate(itertools.accumulate(chances)) if sum_ > at) for at in (outer, inner)
        )
        assert least <= round(end * requests, 1) <= most


def made(calls: list[Any], seconds: float = 0.5) -> dict[str, Any]:
    return {"calls": calls, "tokens": 9, "base_forwards": 2, "head_forwards": 4, "cut": len(calls), "seconds": seconds}


def test_what_could_not_be_asked_is_wrong_and_costs_nothing(checker: OfficialChecker, tmp_path: Path) -> None:
    put_data(tmp_path)
    found = bfcl.read_entries(tmp_path, "simple_python")
    answers = [made([call()]), made([call("Rome")], 1.5), {"refused": "ValueError: too long"}, made([])]
    reference = [made([call()]), made([call()]), {"refused": "ValueError: too long"}, made([])]
    row = bfcl.summary(found, answers, reference, checker, [0, 0])
    assert (row["requests"], row["right"], row["accuracy"]) == (4, 1, 0.25)
    assert (row["called"], row["refused"], row["cut"], row["calls_of_ar"]) == (2, 1, 2, 3)
    assert (row["base_forwards"], row["median_ms"]) == (2, 500.0)
    assert row["wrong"] == {
        "simple_python_1": "wrong:python",
        "simple_python_2": "refused",
        "simple_python_3": "ast_decoder:decoder_failed",
    }
    assert row["faults"] == {"wrong:python": 1, "refused": 1, "ast_decoder:decoder_failed": 1}
    refusals = bfcl.summary(
        bfcl.read_entries(tmp_path, "irrelevance"), [made([]), {"refused": "ValueError"}], None, checker, [0, 0]
    )
    assert (refusals["right"], refusals["calls_of_ar"]) == (1, None)
    assert bfcl.decisions({"simple_python": row, "irrelevance": refusals}) == {
        "called where wanted": [2, 4],
        "not called where unwanted": [1, 2],
    }
    assert bfcl.decisions({"simple_python": row})["not called where unwanted"] is None


# --------------------------------------------------------------- the command


class Parrot:
    """Stands for a model: calls for Oslo whatever is asked, but not where nothing is wanted."""

    def __init__(self, *arguments: str) -> None:
        self.asked = 0
        self.limit = 10**9
        self.descriptions: list[str] = []
        self.model = type("Model", (), {"generation_config": None})

    def ask(self, messages: Any, tools: Any, decoding: str, text_tokens: int) -> Answered:
        self.asked += 1
        self.descriptions.append(tools[0]["function"]["description"])
        if self.asked > self.limit:
            raise KeyboardInterrupt
        calls = [] if "irrelevance" in messages[0]["content"] else [call("Oslo" if decoding == "ar" else "Rome")]
        return Answered(calls, "", 9, 2, 0, 0, 0.25)


def run(monkeypatch: pytest.MonkeyPatch, parrot: Parrot, *arguments: str) -> None:
    monkeypatch.setattr(bfcl, "Caller", lambda *options: parrot)
    bfcl.main(["--categories", "simple_python", "irrelevance", "--decodings", "ar", "diffusion", *arguments])


def test_the_command_writes_every_number_that_it_shows(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    run(monkeypatch, Parrot(), "--checker-path", str(package), "--out", str(out), "--limit", "3")
    report = json.loads(out.read_text(encoding="utf-8"))
    rows = report["categories"]
    assert rows["simple_python"]["ar"]["right"] == 3
    assert rows["simple_python"]["diffusion"]["right"] == 0
    assert rows["irrelevance"]["diffusion"]["accuracy"] == 1.0
    assert report["groups"]["ar"]["irrelevance"]["accuracy"] == 1.0
    assert report["decisions"]["ar"] == {"called where wanted": [3, 3], "not called where unwanted": [2, 2]}
    assert report["versions"]["bfcl-eval"] == "7.1"
    assert report["data"] == "bfcl-eval 7.1"
    assert report["command"].startswith("python -m eval.bfcl --categories simple_python irrelevance")
    shown = capsys.readouterr().out
    assert "3 of 3" in shown
    assert "100.0%" in shown
    assert "called where wanted 3 of 3; not called where unwanted 2 of 2" in shown
    assert not (tmp_path / "a.partial.jsonl").exists()


def test_functions_are_shown_as_the_official_runner_does_unless_types_are_wanted(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, suffixes in [
        ("official", [f" simple_python_{n}" for n in range(4)] + [" irrelevance_0", " irrelevance_1"]),
        ("typed", [""]),
    ]:
        parrot, out = Parrot(), tmp_path / f"{name}.json"
        run(monkeypatch, parrot, "--checker-path", str(package), "--out", str(out), "--tools", name)
        assert set(parrot.descriptions) == {f"Weather of a city.{suffix}" for suffix in suffixes}
        assert json.loads(out.read_text(encoding="utf-8"))["tools"] == name


def test_an_interrupted_command_goes_on_where_it_was(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--checker-path", str(package), "--out", str(tmp_path / "a.json"))
    parrot = Parrot()
    parrot.limit = 5
    with pytest.raises(SystemExit, match="Interrupted: 5 answers"):
        run(monkeypatch, parrot, *options)
    with pytest.raises(SystemExit, match="another seed"):
        run(monkeypatch, Parrot(), *options, "--seed", "1")
    parrot = Parrot()
    run(monkeypatch, parrot, *options)
    assert parrot.asked == 2 * (4 + 2) - 5
    assert (
        json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["categories"]["simple_python"]["ar"]["right"] == 4
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--categories", "simple_ruby"], "invalid choice: 'simple_ruby'"),
        (["--decodings", "beam"], "invalid choice: 'beam'"),
        (["--limit", "-1"], "--limit: -1 is negative"),
        (["--checker-path", "nowhere"], "pip install --no-deps"),
        (["--device", "cuda:99", "--categories", "simple_python"], "--device cuda:99"),
        (["--bfcl", "nowhere"], "--bfcl: there is no folder nowhere"),
        (["--categories", "live_parallel"], "There is no .*BFCL_v4_live_parallel.json"),
    ],
)
def test_a_wrong_option_gets_one_clear_message(
    arguments: list[str],
    problem: str,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bfcl, "Caller", Parrot)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(package))
    with pytest.raises(SystemExit) as raised:
        bfcl.main([*arguments, "--out", str(tmp_path / "a.json")])
    message = capsys.readouterr().err + str(raised.value)
    assert re.search(problem, message)


def test_a_model_that_cannot_be_loaded_is_named_and_leaves_no_partial_results(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*options: str) -> Any:
        raise OSError("no config.json")

    monkeypatch.setattr(bfcl, "Caller", broken)
    options = ["--model", "nowhere", "--categories", "irrelevance", "--checker-path", str(package)]
    with pytest.raises(SystemExit, match=r"--model nowhere on --device cpu cannot be loaded: no config\.json"):
        bfcl.main([*options, "--out", str(tmp_path / "a.json")])
    assert not list(tmp_path.glob("a*"))
