"""Each metric has a card in the sections of `evaluate`'s cards; its names, ranges and example are the true ones."""

import doctest
import inspect
import json
import re
from functools import cache
from typing import Any

import pytest

from repo_package import ROOT

# Metrics are an extra of the training environment.
pytest.importorskip("evaluate")
pytest.importorskip("datasets")

from eval.load_metrics import METRICS, load_metric, metric_names

SECTIONS = [
    "Metric Description",
    "How to Use",
    "Inputs",
    "Output Values",
    "Examples",
    "Edge Cases",
    "Limitations and Bias",
    "Citation",
    "Further References",
]
CALL, NONE, BROKEN = '[{"name": "f", "arguments": {"a": 1}}]', "[]", "[{"
TOOLS = json.dumps([{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}])
SAMPLES: dict[str, dict[str, list[Any]]] = {
    "ast_accuracy": {"predictions": [CALL, BROKEN, NONE], "references": ['[{"f": {"a": [1]}}]', NONE, NONE]},
    "call_match": {"predictions": [CALL, BROKEN, NONE], "references": [CALL, NONE, NONE]},
    "call_validity": {"predictions": [CALL, BROKEN, NONE], "tools": [TOOLS] * 3},
    "decision_roc": {"predictions": [0.9, 0.2, 0.6], "references": [1, 0, 1]},
    "draft_acceptance": {
        "kinds": [["string", "number"], [], ["string"]],
        "drafted_slots": [[2, 1], [], [1]],
        "accepted_slots": [[1, 1], [], [0]],
        "drafted_tokens": [[6, 1], [], [2]],
        "accepted_tokens": [[4, 1], [], [1]],
        "calls": [2, 0, 1],
        "base_forwards": [4, 1, 3],
        "head_forwards": [2, 0, 1],
    },
    "expected_calibration_error": {"predictions": [0.9, 0.2, 0.6], "references": [1, 0, 1]},
    "hallucination_rate": {
        "predictions": [CALL, BROKEN, CALL],
        "tools": [TOOLS] * 3,
        "conversations": [NONE, NONE, '[{"role": "user", "content": "one"}]'],
    },
    "null_tokens": {
        "predictions": [[1, 9], [9], [1]],
        "references": [[1, 9], [1], [9]],
        "slots": [[0, 0], [0], [0]],
        "masked": [[1, 1], [1], [1]],
    },
    "relevance": {"predictions": [CALL, BROKEN, NONE], "references": [CALL, NONE, NONE]},
    "slot_match": {"predictions": ["1", '"a"', ""], "references": ["1", '"b"', "2"], "kinds": ["number", "x", "x"]},
}
OPTIONS = {"null_tokens": {"null_id": 9}}


@cache
def metric(name: str) -> Any:
    return load_metric(name)


@cache
def card(name: str) -> dict[str, str]:
    """The sections of a card, by heading and in order."""
    text = (METRICS / name / "README.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^#+ (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(section: str) -> list[list[str]]:
    """The cells of the rows of a table, without its head."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return found[2:]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("name", metric_names())
def test_a_card_has_the_sections_and_something_in_each(name: str) -> None:
    title, *headings = card(name)
    assert title.startswith("Metric Card: ")
    assert headings == SECTIONS
    empty = [heading for heading in headings if len(card(name)[heading].strip()) < 20]
    assert not empty


@pytest.mark.parametrize("name", metric_names())
def test_a_card_names_every_input(name: str) -> None:
    named = [input_name for row in rows(card(name)["Inputs"]) for input_name in quoted(row[0])]
    taken = [*metric(name).features, *list(inspect.signature(metric(name)._compute).parameters)]
    assert named == list(dict.fromkeys(taken))


@pytest.mark.parametrize("name", metric_names())
def test_a_card_names_every_output_and_its_range(name: str) -> None:
    found = metric(name).compute(**SAMPLES[name], **OPTIONS.get(name, {}))
    ranges = {key: row[1] for row in rows(card(name)["Output Values"]) for key in quoted(row[0])}
    assert list(ranges) == list(found)
    for key, value in found.items():
        assert value is not None or "None" in ranges[key], key
        if ranges[key].startswith("0 to 1"):
            assert value is None or (isinstance(value, float) and 0 <= value <= 1), (key, value)
        elif ranges[key].endswith(("more", "more, None")):
            assert value is None or value >= int(ranges[key][0]), (key, value)
        elif ranges[key] in ("list of bool", "dict", "list of dict", "list of lists of str"):
            assert type(value) is {"d": dict, "l": list}[ranges[key][0]], (key, value)
        else:
            assert ranges[key] in ("any", "any, None"), (key, ranges[key])


@pytest.mark.parametrize("name", metric_names())
def test_the_example_of_a_card_is_the_one_that_is_tested(name: str) -> None:
    """The module's own is run by `test_metrics.py`."""
    parse = doctest.DocTestParser().get_examples
    blocks = re.findall(r"```python\n(>>> .*?)```", card(name)["Examples"], flags=re.DOTALL)
    shown = [(one.source, one.want) for block in blocks for one in parse(block)]
    tested = [(one.source, one.want) for one in parse(metric(name).inputs_description)]
    assert shown == tested
    assert shown


@pytest.mark.parametrize("name", metric_names())
def test_results_as_a_whole_and_in_batches_are_the_same(name: str) -> None:
    columns, options = SAMPLES[name], OPTIONS.get(name, {})
    whole = metric(name).compute(**columns, **options)
    metric(name).add_batch(**{column: values[:2] for column, values in columns.items()})
    metric(name).add_batch(**{column: values[2:] for column, values in columns.items()})
    assert metric(name).compute(**options) == whole


@pytest.mark.parametrize("name", metric_names())
def test_a_column_that_is_left_out_is_an_error(name: str) -> None:
    *kept, _ = SAMPLES[name]
    with pytest.raises((ValueError, TypeError)):
        metric(name).compute(**{column: SAMPLES[name][column] for column in kept}, **OPTIONS.get(name, {}))


def test_the_list_of_metrics_names_each_and_what_it_takes() -> None:
    listed = rows((METRICS / "README.md").read_text(encoding="utf-8"))
    assert [quoted(row[0])[0] for row in listed] == metric_names()
    for name, row in zip(metric_names(), listed, strict=True):
        assert f"({name}/README.md)" in row[0]
        assert (ROOT / "eval" / "metrics" / name / "README.md").is_file()
        assert quoted(row[2]) == list(metric(name).features)
