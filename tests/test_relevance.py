"""Relevance is the share of calls where one is wanted, irrelevance that of refusals where none is."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# Metrics are an extra of the training environment.
pytest.importorskip("evaluate")

from eval.load_metrics import load_metric

CALL = json.dumps([{"name": "f", "arguments": {}}])
NONE = "[]"
FAULTY = (
    "",
    "[",
    "{}",
    "[1]",
    '[{"name": "f"}]',
    '[{"name": 1, "arguments": {}}]',
    '[{"name": "f", "arguments": {"a": NaN}}]',
    '[{"name": "f", "arguments": {}, "arguments": {}}]',
    "[" * 100_000,
)


@cache
def metric() -> Any:
    return load_metric("relevance")


def share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([CALL, NONE, "[{"]), st.booleans()), min_size=1, max_size=8))
def test_the_rates_are_their_definitions(replies: list[tuple[str, bool]]) -> None:
    made, wants = map(list, zip(*replies, strict=True))
    found = metric().compute(predictions=made, references=[CALL if want else NONE for want in wants])
    relevance = share([text == CALL for text, want in replies if want])
    irrelevance = share([text == NONE for text, want in replies if not want])
    assert (found["relevance"], found["irrelevance"]) == (relevance, irrelevance)
    both = relevance is not None and irrelevance is not None
    assert found["balanced_accuracy"] == ((relevance + irrelevance) / 2 if both else None)  # type: ignore[operator]
    assert found["calls_missing"] == replies.count((NONE, True))
    assert found["calls_unwanted"] == replies.count((CALL, False))
    assert (found["unread"], found["calls_wanted"], found["requests"]) == (made.count("[{"), sum(wants), len(made))


@pytest.mark.parametrize("text", FAULTY)
def test_what_is_no_list_of_calls_is_neither_a_call_nor_a_refusal(text: str) -> None:
    found = metric().compute(predictions=[text, text], references=[CALL, NONE])
    assert (found["relevance"], found["irrelevance"], found["unread"]) == (0, 0, 2)
    assert found["calls_missing"] == found["calls_unwanted"] == 0


def test_one_kind_of_request_has_one_rate() -> None:
    found = metric().compute(predictions=[CALL, NONE], references=[CALL, CALL])
    assert (found["relevance"], found["irrelevance"], found["balanced_accuracy"]) == (0.5, None, None)
    found = metric().compute(predictions=[NONE], references=[NONE])
    assert (found["relevance"], found["irrelevance"], found["calls_wanted"]) == (None, 1.0, 0)


def test_a_call_of_another_tool_is_a_call() -> None:
    other = json.dumps([{"name": "g", "arguments": {"a": 1}}] * 2)
    assert metric().compute(predictions=[other], references=[CALL])["relevance"] == 1


@pytest.mark.parametrize("text", FAULTY)
def test_faulty_gold_calls_are_an_error_that_names_them(text: str) -> None:
    with pytest.raises(ValueError, match="Reference 1 is no JSON list"):
        metric().compute(predictions=[CALL, CALL], references=[CALL, text])
