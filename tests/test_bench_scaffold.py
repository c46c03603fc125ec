"""Every call that fits can be written and drafted, independent judges agree with what is written, nothing hangs."""

import json
from decimal import Decimal, localcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from eval import bench_scaffold as bench
from eval.schema_coverage import BY_DESIGN, ENGINES
from eval.schema_probes import PROBES, Probe
from tiny_tokenizer import tiny_vocabulary

needs_data = pytest.mark.skipif(not bench.PUBLIC.exists(), reason="the BFCL data is not beside this repository")
needs_llguidance = pytest.mark.skipif(ENGINES["llguidance"].version is None, reason="llguidance is not installed")


def supported(probe: Probe) -> Any:
    """The scaffold of a probe; skips where it is refused."""
    scaffold = bench.compiled(bench.tool_of(probe.parameters))
    if scaffold is None:
        pytest.skip("the schema is refused")
    return scaffold


def every_probe() -> Any:
    return pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)


# ------------------------------------------------------------------------------------------------- gold calls


@every_probe()
def test_what_fits_a_probe_can_be_written(probe: Probe) -> None:
    supported(probe)
    tool = bench.tool_of(probe.parameters)
    problems = [bench.misfit(tiny_vocabulary(), tool, json.loads(text)) for text in probe.accepted_texts]
    if probe.name in BY_DESIGN:
        assert None in problems
    else:
        assert problems == [None] * len(problems)


def test_a_call_that_does_not_fit_is_told() -> None:
    tool = bench.tool_of(bench.value_of({"type": "integer"}))
    assert bench.misfit(tiny_vocabulary(), tool, {"value": 1}) is None
    assert bench.misfit(tiny_vocabulary(), tool, {"value": "1"}) is not None
    assert bench.misfit(tiny_vocabulary(), tool, {}) is not None
    assert bench.misfit(tiny_vocabulary(), bench.tool_of({"type": "string"}), {"value": 1}) is not None


@needs_data
@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_gold_calls_of_bfcl_that_fit_their_tool_can_be_written(step: int) -> None:
    calls = list(bench.public_calls(bench.PUBLIC))[::step]
    assert len(calls) > 1500 / step
    problems = {bench.misfit(tiny_vocabulary(), *call): call for call in calls if bench.unfit(*call) is None}
    assert list(problems) == [None]


@needs_data
@pytest.mark.slow
def test_few_gold_calls_of_bfcl_do_not_fit_their_tool_or_a_layout() -> None:
    calls = list(bench.public_calls(bench.PUBLIC))
    fitting = [call for call in calls if bench.unfit(*call) is None]
    # Variables of the request's program where the schema asks for a list, a number or an object.
    assert len(calls) - len(fitting) <= 21
    # Values of any type, and more freely named properties than a drafter has room for: those are written by the base.
    assert sum(bench.undrafted(*call) is not None for call in fitting) <= 70


@needs_data
def test_every_function_of_bfcl_compiles_in_its_own_dialect() -> None:
    tools = bench.public_tools(bench.PUBLIC)
    assert len(tools) > 1500
    assert [tool["function"]["name"] for tool in tools if bench.compiled(tool) is None] == []


# ------------------------------------------------------------------------------------------------- random calls


@cache
def texts_of(name: str, count: int) -> list[str]:
    """Arguments of a probe that random logits write, one token after another and all at once."""
    probe = next(probe for probe in PROBES if probe.name == name)
    tool, generator = bench.tool_of(probe.parameters), torch.Generator().manual_seed(0)
    calls = [bench.random_call(tiny_vocabulary(), supported(probe), generator) for _ in range(count)]
    drafts = [bench.random_draft(tiny_vocabulary(), tool, generator) for _ in range(count)]
    return calls + [text for text in drafts if text is not None]


few_or_many = pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])


def exact(text: str) -> Any:
    """JSON with decimals as they are written: in binary, 8.13 is no multiple of 0.01."""
    return json.loads(text, parse_float=Decimal)


@every_probe()
@few_or_many
def test_random_calls_are_valid_by_jsonschema(probe: Probe, count: int) -> None:
    texts = texts_of(probe.name, count)
    schema = exact(json.dumps(probe.standard_parameters))
    judge = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    with localcontext(prec=1000):
        assert [text for text in texts if not judge.is_valid(exact(text))] == []


@pytest.mark.parametrize("name", ["propertyNames: enum", "uniqueItems: of an enum", "$ref: recursive, tree"])
def test_random_calls_never_run_into_a_dead_end(name: str) -> None:
    probe = next(probe for probe in PROBES if probe.name == name)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        json.loads(bench.random_call(tiny_vocabulary(), supported(probe), generator))


@needs_llguidance
@every_probe()
@few_or_many
def test_random_calls_are_accepted_by_llguidance(probe: Probe, count: int) -> None:
    texts = texts_of(probe.name, count)
    if not bench.llguidance_guarantees(probe):
        pytest.skip("llguidance does not guarantee this schema")
    verdicts = {text: bench.llguidance_says(bench.tool_of(probe.parameters), text) for text in texts}
    assert [text for text, verdict in verdicts.items() if verdict not in ("accepted", "explained")] == []


@needs_data
@needs_llguidance
def test_calls_of_bfcl_are_accepted_by_llguidance() -> None:
    report = bench.bench_truth(tiny_vocabulary(), list(bench.public_calls(bench.PUBLIC))[::40], seed=0)
    assert report["gold_calls"] > 40
    assert report["misfits"] == report["rejected"] == 0, report["examples"]
    assert report["llguidance"]["gold"] == {"accepted": report["gold_calls"] - report["unfit"]}


# ------------------------------------------------------------------------------------------------- hostile schemas


@pytest.mark.slow
def test_hostile_schemas_end_soon() -> None:
    rows = bench.bench_hostile(3000)
    assert set(rows) == set(bench.HOSTILE)
    # Processor time, for a busy machine takes longer.
    assert {name: row for name, row in rows.items() if row.get("cpu_seconds", row["seconds"]) > 2.0} == {}
    assert {name: row for name, row in rows.items() if row["result"].startswith("FAILED")} == {}


# ------------------------------------------------------------------------------------------------- the command


def test_failures_are_what_misses_a_target() -> None:
    fine = {"n": 10, "p50_ms": 0.5, "p99_ms": 1.0, "max_ms": 1.0}
    report = {
        "compile": {"a": {"compile again": fine}, "b": {"compile again": fine | {"p99_ms": 21.0}}},
        "many": {"seconds": 0.6},
        "commits": [{"kind": "date", "target": "closed"} | fine, {"kind": "string", "target": "open", "p50_ms": 4.0}],
        "hostile": {"x": {"seconds": 1.0, "result": "compiled"}, "y": {"seconds": 1.0, "result": "FAILED: KeyError"}},
        "truth": {"gold": {"gold_calls": 2, "misfits": 1, "undrafted": 0, "rejected": 0}},
    }
    missed = bench.failures(report)
    assert [line.split(":")[0] for line in missed] == ["compile, b", "300 tools", "commit of a string", "y", "gold"]


def test_the_command_saves_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    chosen = ["--sections", "many", "commits", "masks", "--vocabulary", "2000", "--limit", "5", "--rounds", "2"]
    bench.main([*chosen, "--data", str(tmp_path / "absent"), "--out", str(out)])
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["data"] == "eval/schema_probes.py"
    assert report["many"]["tools"] == 300
    assert {row["kind"] for row in report["commits"]} == set(bench.COMMITTED)
    assert report["masks"]["tokens"] > 10
    assert "commits" in capsys.readouterr().out
