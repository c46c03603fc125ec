"""The comparison asks everyone the same, reads everyone's calls alike, counts what is run, and keeps what it has."""

import importlib.util
import json
import random
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from eval import rivals
from eval.gold_choices import Shape, gold_choices, gold_tokens
from eval.schema_coverage import Refused
from eval.soak import tiny_model
from repo_package import load_repo_module
from training.data import Row, write_records

# The metrics are an extra of the training environment.
pytest.importorskip("evaluate")

from eval import compare
from eval.held_out import BFCL_FOLDER, Request

scaffolds = load_repo_module("schema_scaffold")

ENGINES = [name for name in compare.ENGINES if importlib.util.find_spec(name) is not None]
with_engines = pytest.mark.parametrize(
    "engine",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed"),
        )
        for name in compare.ENGINES
    ],
)

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 30},
    },
    "required": ["ok", "days"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": "Gets it.", "parameters": PARAMETERS}}
    for name in ("get_it", "get_more")
]
CALLS = [
    {"name": "get_it", "arguments": {"ok": True, "unit": "kelvin", "days": 12}},
    {"name": "get_more", "arguments": {"ok": False, "days": 3}},
]


@cache
def arena() -> Any:
    """A tiny random model that may finish the calls made here, with the engines that are installed."""
    model, tokenizer = tiny_model()
    model.config.max_call_tokens = 120
    return compare.Arena(model, tokenizer, ENGINES)


def made_request(number: int = 0, calls: Sequence[Any] | None = None, answers: Any = None) -> Request:
    """A request for one of the calls, or for what is given."""
    messages = [{"role": "user", "content": f"get it for 12 days in kelvin or {number}"}]
    prompt = arena().tokenizer.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    calls = CALLS[number : number + 1] if calls is None else calls
    return Request(Row(f"made {number}", "test", list(prompt), [], TOOLS, list(calls), messages), answers)


def spelled(request: Request) -> list[int]:
    """A reply that makes the gold call of a request, or refuses."""
    vocabulary = arena().bench.vocabulary
    if not request.row.calls:
        return [*vocabulary.encode("No"), vocabulary.im_end]
    (call,) = request.row.calls
    tool = next(tool for tool in TOOLS if tool["function"]["name"] == call["name"])
    found = gold_tokens(vocabulary, scaffolds.compile_scaffold(tool), call["arguments"], arena().model.config)
    assert found is not None
    return found


def answered(request: Request, chosen: Sequence[str]) -> dict[str, Any]:
    """What decodings make of a request with a base that chooses its gold reply."""
    ways = {name: way for name, way in compare.decodings(ENGINES).items() if name in chosen}
    with gold_choices(arena().model.base, len(request.row.prompt_ids), spelled(request)):
        return arena().row(request, ways, random.Random(0))


# ------------------------------------------------------------------------------------------------- decodings


def test_everyone_reads_the_same_call_out_of_the_same_choices() -> None:
    every = list(compare.decodings(ENGINES))
    row = answered(made_request(), every)
    answers = row["answers"]
    assert set(answers) == set(every)
    assert set(row["compile"]) == {"this repository", *ENGINES}
    for name, answer in answers.items():
        if not name.startswith("diffusion"):  # which writes what is drafted
            assert answer["calls"] == CALLS[:1], name
            assert answer["reply"] == spelled(made_request())[:-1], name
        assert not answer["cut"]
        assert answer["seconds"] > 0
    forwards = {name: answer["base_forwards"] for name, answer in answers.items()}
    assert forwards["raw"] == len(answers["raw"]["reply"]) + 1  # its end token is a choice too
    assert forwards["raw+lookup"] <= forwards["raw"]
    for engine in ENGINES:
        assert forwards[engine] >= forwards[f"{engine}+jump"] >= forwards[f"{engine}+jump+lookup"]
        assert forwards["raw"] > forwards[f"{engine}+jump"]
    assert forwards["verified+head"] <= forwards["ar"] < forwards["raw"]
    heads = {name: answer["head_forwards"] for name, answer in answers.items()}
    assert heads["verified+head"] > 0 == heads["ar"] == heads["raw"]


def test_everyone_may_refuse() -> None:
    request = made_request(calls=[])
    for name, answer in answered(request, list(compare.decodings(ENGINES)))["answers"].items():
        assert (answer["calls"], answer["cut"]) == ([], False), name
        assert answer["reply"] == spelled(request)[:-1], name


def test_a_reply_of_the_base_that_goes_on_is_ended_at_the_limit() -> None:
    request = made_request()
    vocabulary = arena().bench.vocabulary
    endless = vocabulary.encode("days") * 400
    for reply, tokens, cut in (
        (endless, compare.TEXT_TOKENS, False),
        ([vocabulary.call_start, *endless], 1 + arena().bench.limit, True),
    ):
        with gold_choices(arena().model.base, len(request.row.prompt_ids), reply):
            written = arena().raw(request)
        assert (len(written.tokens), written.cut) == (tokens, cut)
        assert written.arguments == (None if cut else [])


@with_engines
def test_an_engine_that_refuses_the_tools_sits_out(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(tools: Any) -> Any:
        raise Refused("no")

    monkeypatch.setattr(arena().loaded[engine], "compile_calls", refuses)
    row = answered(made_request(), [engine, f"{engine}+jump", "ar"])
    assert set(row["answers"]) == {"ar"}
    assert engine not in row["compile"]


# ------------------------------------------------------------------------------------------------- free replies


def begun(engine: str | None) -> Any:
    vocabulary = arena().bench.vocabulary
    tools = [(tool["function"]["name"], PARAMETERS) for tool in TOOLS]
    begin = None if engine is None else arena().loaded[engine].compile_calls(tools)
    return compare.FreeReply(vocabulary, begin, arena().bench.limit)


@with_engines
def test_a_reply_is_free_until_it_calls_and_behind_the_call(engine: str) -> None:
    vocabulary, reply = arena().bench.vocabulary, begun(engine)
    text = vocabulary.encode("Well")
    assert reply.accept(text) == len(text)
    assert reply.allowed().all()
    assert reply.forced() == []
    assert reply.accept([vocabulary.call_start]) == 1
    assert reply.unfinished
    spoils = vocabulary.encode("Well")
    assert reply.accept(spoils) == 0
    assert not reply.allowed()[spoils[0]]
    inner = vocabulary.encode('\n{"name": "get_more", "arguments": {"ok": true, "days": 3}}\n')
    assert reply.accept([*inner, vocabulary.call_start]) == len(inner)
    assert reply.forced() == reply.allowed().nonzero().flatten().tolist() == [vocabulary.call_end]
    assert reply.accept([vocabulary.call_end, *text, vocabulary.im_end, *text]) == 2 + len(text)
    assert reply.complete
    assert not reply.unfinished


@with_engines
def test_what_is_taken_back_never_was(engine: str) -> None:
    vocabulary, reply = arena().bench.vocabulary, begun(engine)
    opening = [vocabulary.call_start, *vocabulary.encode('\n{"name": "get_')]
    assert reply.accept(opening) == len(opening)
    before = reply.allowed()
    rest = [*vocabulary.encode('it", "arguments": {"ok": false, "days": 1}}\n'), vocabulary.call_end, vocabulary.im_end]
    for _ in range(2):
        assert reply.accept(rest) == len(rest)
        assert reply.complete
        reply.take_back(len(rest))
        assert (reply.allowed() == before).all()
    reply.take_back(len(opening))
    assert reply.allowed().all()


@with_engines
def test_the_grammar_knows_the_tools_that_are_offered_and_no_other(engine: str) -> None:
    vocabulary = arena().bench.vocabulary
    for name, fits in (("get_it", True), ("get_more", True), ("get_all", False)):
        tokens = [vocabulary.call_start, *vocabulary.encode(f'\n{{"name": "{name}", "arguments": {{"ok": ')]
        assert (begun(engine).accept(tokens) == len(tokens)) == fits


@with_engines
def test_text_that_all_calls_begin_with_is_forced(engine: str) -> None:
    vocabulary, reply = arena().bench.vocabulary, begun(engine)
    reply.accept([vocabulary.call_start])
    forced = vocabulary.spell(reply.forced()).decode()
    assert forced.startswith('\n{"name": "')
    assert '\n{"name": "get_'.startswith(forced)


def test_a_call_of_the_base_alone_is_free_and_ends_at_its_end() -> None:
    vocabulary, reply = arena().bench.vocabulary, begun(None)
    tokens = [vocabulary.call_start, *vocabulary.encode("nonsense")]
    assert reply.accept(tokens) == len(tokens)
    assert reply.allowed().all()
    assert reply.unfinished
    for _ in range(compare.MAX_CALLS):
        assert not reply.complete
        reply.accept([vocabulary.call_end, vocabulary.call_start])
    assert reply.unfinished
    reply.take_back(1)
    assert reply.complete


def test_calls_are_read_where_all_of_a_reply_can_be() -> None:
    vocabulary = arena().bench.vocabulary

    def reply(*texts: str) -> list[int]:
        calls = [[vocabulary.call_start, *vocabulary.encode(text), vocabulary.call_end] for text in texts]
        return [token for call in calls for token in call]

    good = '\n{"name": "f", "arguments": {"a": [1]}}\n'
    call = {"name": "f", "arguments": {"a": [1]}}
    assert compare.read_calls(vocabulary, vocabulary.encode("No.")) == []
    assert compare.read_calls(vocabulary, [*vocabulary.encode("Well"), *reply(good, good)]) == [call, call]
    assert compare.read_calls(vocabulary, reply(good)[:-1]) is None
    faulty = ('{"name": "f"', '{"name": "f"}', '{"name": 1, "arguments": {}}', '{"name": "f", "arguments": []}', "[]")
    for text in faulty:
        assert compare.read_calls(vocabulary, reply(good, text)) is None, text


# ------------------------------------------------------------------------------------------------- the report


def made_answer(calls: Any, base: int = 4, seconds: float = 0.1, **fields: Any) -> dict[str, Any]:
    costs = {"base_forwards": base, "head_forwards": 1, "seconds": seconds}
    return {"calls": calls, "reply": [1, 2], "cut": False, **costs, **fields}


def test_right_wrong_and_costs_are_counted() -> None:
    answer = {"get_it": {"ok": [True], "unit": ["kelvin", ""], "days": [12]}}
    todo = [made_request(0, answers=[answer]), made_request(1), made_request(2, calls=[])]
    shorter = {"name": "get_it", "arguments": {"ok": True, "days": 12}}
    invented = {"name": "get_more", "arguments": {"ok": False, "days": 30, "wind": 1}}
    rows: list[dict[str, Any]] = [
        {"compile": {"this repository": 0.001}, "answers": {"ar": one, "raw": other, "verified+head": third}}
        for one, other, third in (
            (made_answer([shorter]), made_answer([CALLS[0]], 20, 0.3), made_answer([shorter], 2)),
            (made_answer([CALLS[1]], 6, 0.2), made_answer([invented], 30, 0.5), made_answer([CALLS[1]], reply=[3])),
            (made_answer([CALLS[0]]), made_answer(None), made_answer([])),
        )
    ]
    del rows[0]["answers"]["verified+head"]
    found = compare.set_report(todo, rows, ["ar", "raw", "verified+head"])
    assert (found["requests"], found["answered_by_all_with_a_call"]) == (3, 1)
    assert found["hallucinated_gold"] == round(1 / 5, 4)  # nobody said 3
    assert found["compile_ms"] == {"this repository": {"mean": 1.0, "p50": 1.0, "p95": 1.0}}
    ar, raw, verified = found["decodings"].values()
    assert (ar["exact"], ar["calls_exact"], ar["calls_wanted"]) == (1, 1, 2)
    assert (ar["ast"], ar["ast_of"], raw["ast"], verified["ast_of"]) == (1, 1, 1, 0)
    assert (ar["calls_unwanted"], raw["calls_unwanted"], raw["unread"]) == (1, 0, 1)
    assert (ar["relevance"], ar["irrelevance"], raw["irrelevance"]) == (1, 0, 0)
    assert (ar["valid"], raw["valid"]) == (3, 2)
    assert (raw["arguments"], raw["unknown_names"], raw["unsupported_values"]) == (6, 1, 1)
    assert raw["hallucination_rate"] == round(2 / 6, 4)
    assert (verified["requests"], verified["refused"]) == (2, 1)
    assert (ar["same_tokens_as_ar"], verified["same_tokens_as_ar"], raw["same_tokens_as_ar"]) == (3, 1, None)
    assert (ar["base_forwards_per_call"], raw["base_forwards_per_call"]) == (6, 30)
    assert ar["ms"] == {"mean": 200.0, "p50": 200.0, "p95": 200.0}
    assert ar["ms_of_all_requests"]["p50"] == 100.0
    assert raw["tokens"]["mean"] == 2


def test_a_decoding_that_no_request_was_put_to_has_a_line_without_numbers() -> None:
    rows = [{"compile": {}, "answers": {"ar": made_answer([])}}]
    found = compare.set_report([made_request(calls=[])], rows, ["ar", "xgrammar"])
    assert found["decodings"]["xgrammar"] == {"requests": 0, "refused": 1}
    assert found["decodings"]["ar"]["ms"] is found["decodings"]["ar"]["base_forwards_per_call"] is None
    lines = compare.table({"made": found}).splitlines()
    assert lines[-1].startswith("| made | `xgrammar` |  |")
    assert len(lines) == 4


def test_the_plot_is_drawn_where_matplotlib_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    rows = [{"compile": {}, "answers": {"ar": made_answer([CALLS[0]]), "raw": made_answer([])}}]
    found = compare.set_report([made_request()], rows, ["ar", "raw"])
    assert compare.plot({"made": found}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------- the command

FEW = ["raw", "ar", "verified+head"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of three requests, one of them for no call."""
    folder = tmp_path_factory.mktemp("data")
    records = [
        {
            "id": f"made {number}",
            "source": "test",
            "messages": [{"role": "user", "content": f"get it for 12 days in kelvin or {number}"}],
            "tools": TOOLS,
            "calls": calls,
        }
        for number, calls in enumerate(([CALLS[0]], [CALLS[1]], []))
    ]
    write_records(folder / BFCL_FOLDER / "simple_python.jsonl.gz", records)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command runs a tiny model that chooses the gold replies; ids of the requests that are put to it."""
    ids: list[str] = []
    original = compare.Arena.row

    def row(self: Any, request: Request, chosen: Any, chance: Any) -> Any:
        ids.append(request.row.id)
        with gold_choices(self.model.base, len(request.row.prompt_ids), spelled(request)):
            return original(self, request, chosen, chance)

    monkeypatch.setattr(compare.Arena, "row", row)
    monkeypatch.setattr(compare, "load", lambda *_: Shape("tiny", arena().model, arena().tokenizer))
    return ids


def command(data: Path, out: Path, *options: str) -> None:
    given = ["--data", str(data), "--out", str(out), "--sets", "simple_python", "--decodings", *FEW, "--jobs", "1"]
    compare.main([*given, *options])


def test_the_command_writes_what_it_shows_and_goes_on_where_it_was_stopped(
    data: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.json"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    def stops(self: Any, request: Request) -> dict[str, float]:
        if len(asked) == 3:  # the first one twice, to warm up
            raise KeyboardInterrupt
        return prepare(self, request)

    prepare = compare.Arena.prepare
    with monkeypatch.context() as patch:
        patch.setattr(compare.Arena, "prepare", stops)
        with pytest.raises(SystemExit, match="Interrupted: 1 requests are kept"):
            command(data, out)
    first = asked[0]
    asked.clear()
    command(data, out)
    assert first not in asked
    assert len(asked) == 1 + 2  # one to warm up
    report = json.loads(out.read_text(encoding="utf-8"))
    found = report["sets"]["simple_python"]
    assert (found["requests"], found["left_out"], found["answered_by_all_with_a_call"]) == (3, 0, 2)
    for name in FEW:
        row = found["decodings"][name]
        assert (row["exact"], row["valid"], row["calls_exact"], row["refused"]) == (3, 3, 2, 0)
        assert row["ms"]["p95"] >= row["ms"]["p50"] > 0
    assert found["decodings"]["verified+head"]["same_tokens_as_ar"] == 3
    assert set(report) >= {"command", "versions", "threads", "device", "dtype", "notes"}
    assert "--sets simple_python" in report["command"]
    printed = capsys.readouterr()
    assert compare.table(report["sets"]) in printed.out
    assert all(version in printed.out for version in report["versions"].values())
    assert "compare.png is not drawn: pip install matplotlib" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]


@pytest.mark.slow
def test_processes_that_share_the_requests_give_the_same_rows(data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    arena().model.save_pretrained(model)
    arena().tokenizer.save_pretrained(model)
    found = {}
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.json"
        command(data, out, "--model", str(model), "--jobs", jobs)
        report = json.loads(out.read_text(encoding="utf-8"))
        assert report["jobs"] == int(jobs)
        rows = report["sets"]["simple_python"]["decodings"]
        timed = ("ms", "ms_of_all_requests")
        found[jobs] = {name: {key: row[key] for key in row if key not in timed} for name, row in rows.items()}
    assert found["1"] == found["2"]
    assert found["1"]["ar"]["requests"] == 3


def test_verified_that_differs_from_ar_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"ar": made_answer([]), "verified+head": made_answer([], reply=[7])}
    found = compare.set_report([made_request(calls=[])], [{"compile": {}, "answers": answers}], list(answers))
    compare.show({"made": {"left_out": 0, **found}}, {})
    assert "WARNING: verified+head differs from ar on 1 of 1 requests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sets", "unseen"], "there is no .*dev.jsonl.gz; name the folder"),
        (["--sets", "simple"], "invalid choice: 'simple'"),
        (["--decodings", "raw"], "must hold ar"),
        (["--decodings", "ar", "xgrammar+jump"], "xgrammar is not installed: pip install xgrammar"),
        (["--limit", "-1"], "numbers from 0"),
        (["--jobs", "-1"], "numbers from 0"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(
    data: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "installed", lambda names: {})
    with pytest.raises(SystemExit):
        command(data, tmp_path / "compare.json", *options)
    assert re.search(message, capsys.readouterr().err)


def test_a_model_that_is_not_there_is_said_in_one_line(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"eval\.compare: .*nowhere"):
        command(data, tmp_path / "compare.json", "--model", str(tmp_path / "nowhere"))


def test_engines_are_those_of_the_other_comparison() -> None:
    assert list(compare.ENGINES) == list(rivals.ENGINES)
