"""The probes are right by jsonschema's judgement, the verdicts are what engines earn, and ours is never too lax."""

import json
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from eval import schema_coverage
from eval.schema_coverage import ENGINES, THIS, Lost, Matcher, Outcome, Refused, Worker, engine_judge, judge, markdown
from eval.schema_probes import PROBES, Probe
from repo_package import ROOT

RESULTS = ROOT / "eval" / "results" / "schema_coverage.json"
DOCUMENT = ROOT / "docs" / "schema_coverage.md"

KEYWORDS = """
type enum const properties required additionalProperties items prefixItems minItems maxItems minLength maxLength pattern
format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf anyOf oneOf nullable allOf $ref definitions default
uniqueItems dependentRequired dependentSchemas if not contains minContains maxContains patternProperties propertyNames
minProperties maxProperties true false {} dict float tuple any String HashMap ArrayList
"""
FORMATS = "date date-time time duration email uri uuid ipv4 ipv6 hostname"


def named(name: str) -> Probe:
    return next(probe for probe in PROBES if probe.name == name)


# ------------------------------------------------------------------------------------------------- the probes


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_jsonschema_agrees_with_the_probe(probe: Probe) -> None:
    schema = probe.standard_parameters
    Draft202012Validator.check_schema(schema)
    judge = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    arguments = [value if probe.whole else {"value": value} for value in probe.accepts]
    assert [value for value in arguments if not judge.is_valid(value)] == []
    wrong = [value if probe.whole else {"value": value} for value in probe.rejects]
    assert [value for value in wrong if judge.is_valid(value)] == []
    assert probe.accepts
    assert probe.rejects or probe.broken


@pytest.mark.parametrize("probe", [probe for probe in PROBES if probe.broken], ids=lambda probe: probe.name)
def test_what_is_called_broken_is_not_json(probe: Probe) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for text in probe.rejected_texts[len(probe.rejects) :]:
        with pytest.raises(ValueError):
            json.loads(text, parse_constant=refuse)


def test_accepted_texts_are_what_json_writes() -> None:
    texts = [text for probe in PROBES for text in probe.accepted_texts]
    assert [text for text in texts if json.dumps(json.loads(text), ensure_ascii=False) != text] == []


def test_every_keyword_and_format_has_a_probe() -> None:
    assert set(KEYWORDS.split()) - {probe.keyword for probe in PROBES} == set()
    assert set(FORMATS.split()) - {probe.variant for probe in PROBES if probe.keyword == "format"} == set()


def test_no_two_probes_share_a_name() -> None:
    assert len({probe.name for probe in PROBES}) == len(PROBES)


# ------------------------------------------------------------------------------------------------- the verdicts

_LENGTH = named("maxLength")


def _by_text(accepts: Callable[[str], bool]) -> Callable[[dict[str, Any]], Matcher]:
    return lambda parameters: accepts


def _raising(error: BaseException) -> Callable[[dict[str, Any]], Matcher]:
    def compiler(parameters: dict[str, Any]) -> Matcher:
        raise error

    return compiler


class Panic(BaseException):
    """Stands for the panic of a Rust engine."""


@pytest.mark.parametrize(
    ("compiler", "result"),
    [
        (_by_text(lambda text: text in _LENGTH.accepted_texts), "yes"),
        (_by_text(lambda text: True), "ignores"),
        (_by_text(lambda text: False), "incomplete"),
        (_by_text(lambda text: text not in _LENGTH.accepted_texts), "ignores"),
        (_raising(Refused("no maxLength")), "refuses"),
        (_raising(NotImplementedError("no maxLength")), "refuses"),
        (_raising(KeyError("maxLength")), "error"),
        (_raising(MemoryError()), "error"),
        (_raising(Panic("index out of range")), "error"),
    ],
)
def test_an_engine_gets_the_verdict_it_earns(compiler: Callable[[dict[str, Any]], Matcher], result: str) -> None:
    assert judge(compiler, _LENGTH).result == result


def test_a_verdict_names_the_texts_that_were_mistaken() -> None:
    outcome = judge(_by_text(lambda text: text == '{"value": "abcd"}'), _LENGTH)
    assert outcome.false_accepts == ('{"value": "abcd"}',)
    assert outcome.false_rejects == tuple(_LENGTH.accepted_texts)


def fragile_engine() -> Callable[[dict[str, Any]], Matcher]:
    """Accepts everything, hangs on `minLength`, dies of `pattern`."""

    def compiler(parameters: dict[str, Any]) -> Matcher:
        text = json.dumps(parameters)
        if "minLength" in text:
            time.sleep(60)
        if "pattern" in text:
            raise SystemExit(3)
        return lambda text: True

    return compiler


def test_an_engine_that_hangs_or_dies_loses_one_probe_only() -> None:
    worker = Worker(partial(engine_judge, fragile_engine), seconds=1.0)
    with pytest.raises(Lost, match="1 seconds"):
        worker.ask(named("minLength"))
    assert worker.ask(named("maxLength")).result == "ignores"
    with pytest.raises(Lost, match="died with code 3"):
        worker.ask(named("pattern: anchored"))
    assert worker.connection is None  # the next question begins another process


def test_missing_engines_are_named_and_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    absent = schema_coverage.Engine(fragile_engine, "a-distribution-that-nobody-installs")
    monkeypatch.setitem(ENGINES, "xgrammar", absent)
    schema_coverage.main(
        ["--engines", "xgrammar", "--out", str(tmp_path / "out.json"), "--doc", str(tmp_path / "doc.md")]
    )
    assert "xgrammar is missing: pip install a-distribution-that-nobody-installs" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["engines"] == {"xgrammar": None}
    assert "| xgrammar |" not in (tmp_path / "doc.md").read_text()


@pytest.mark.parametrize("name", ["llguidance", "xgrammar", "outlines", "lm-format-enforcer"])
def test_each_rival_that_is_installed_is_driven_rightly(name: str) -> None:
    if ENGINES[name].version is None:
        pytest.skip(f"{name} is not installed")
    compiler = ENGINES[name].load()
    for probe in ("type: integer", "properties", "enum: with type", "properties: nested", "items", "maxLength"):
        assert judge(compiler, named(probe)) == Outcome("yes"), probe


# ------------------------------------------------------------------------------------------------- ours


@cache
def ours() -> Any:
    return ENGINES[THIS].load()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_our_grammar_is_never_too_lax(probe: Probe) -> None:
    outcome = judge(ours(), probe)
    assert outcome.result not in ("ignores", "error"), outcome


def test_the_committed_table_is_that_of_the_committed_results() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert list(report["probes"]) == [probe.name for probe in PROBES]
    assert all(report["engines"].values())
    assert markdown(report) == DOCUMENT.read_text(encoding="utf-8")


def test_the_committed_results_are_what_our_grammar_does() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))["probes"]
    differing = [probe.name for probe in PROBES if judge(ours(), probe).result != report[probe.name][THIS]["result"]]
    assert differing == []
