"""The ablation of decoding: what each choice changes and that nothing of it stays, lone positions, and the numbers."""

import json
import random
import re
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.gold_choices import Shape
from eval.soak import tiny_model
from repo_package import load_repo_module
from training.data import Row, write_records

# The metrics are an extra of the training environment.
pytest.importorskip("evaluate")

from eval import decoding_ablation as ablation
from eval.held_out import BFCL_FOLDER, Model, Request

drafting = load_repo_module("drafting")
grammar = load_repo_module("slot_grammar")
layouts = load_repo_module("scaffold_layout")
scaffolds = load_repo_module("schema_scaffold")

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_it",
        "description": "Gets it.",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"enum": ["one two three", "four five six"]},
                "days": {"type": "integer", "minimum": 10, "maximum": 99},
                "city": {"type": "string", "maxLength": 3},
            },
            "required": ["unit", "days", "city"],
        },
    },
}
CALL = {"name": "get_it", "arguments": {"unit": "four five six", "days": 12, "city": "Rom"}}
CHEAP = ("commit", "budgets")


@cache
def tiny() -> Model:
    """A tiny random model with its tokenizer."""
    model, tokenizer = tiny_model()
    return Model(model, tokenizer, None)


def asked(**fields: Any) -> ablation.Asked:
    messages = [{"role": "user", "content": "get it for 12 days in Rom, four five six"}]
    prompt = tiny().tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, return_dict=False)
    return ablation.Asked(tiny(), Request(Row("r", "test", list(prompt), [], [TOOL], [CALL], messages)), 0, **fields)


def canvas() -> Any:
    config = tiny().model.config
    layout = layouts.draft_layout(scaffolds.compile_scaffold(TOOL), config.array_budget)
    return grammar.build_canvas(
        tiny().vocabulary, layout, [8] * len(layout.slots), config.mask_token_id, config.null_token_id
    )


def slots() -> dict[str, Any]:
    return {slot.slot.path: slot for slot in canvas().slots}


# --------------------------------------------------------------- choices


def test_every_choice_changes_the_model_as_it_says_and_leaves_nothing_behind() -> None:
    model = tiny().model
    gate, states = model.diffusion_head.copy_gate, torch.randn(3, model.config.head_hidden_size)
    names = ("field_mask", "string_budget", "number_budget", "array_budget")

    def state() -> Any:
        shown = [getattr(model.config, name) for name in names]
        return [*shown, gate(states).tolist(), drafting.commit_slots, drafting._CanvasState]

    before = state()
    changes = ablation.chosen(list(ablation.CHANGES), model.config)
    assert len(changes) == 1 + sum(map(len, ablation.CHANGES.values())) - 1, "one field mask is the model's own"
    for name, change in changes.items():
        changed: list[bool] = []

        def fails(change: ablation.Change = change, changed: list[bool] = changed) -> None:
            with ablation.applied(model, change):
                changed += [one != other for one, other in zip(state(), before, strict=True)]
                raise KeyError

        with pytest.raises(KeyError):
            fails()
        only_options = name == ablation.DEFAULTS or bool(change.options)
        assert sum(changed) == (0 if only_options else 2 if change.alone else 1), name
        assert state() == before, name


def test_options_of_a_choice_are_none_of_the_defaults() -> None:
    for values in ablation.CHANGES.values():
        for change in values.values():
            assert all(ablation.OPTIONS[name] != value for name, value in change.options.items())


def test_budgets_are_halved_and_doubled_and_stay_above_zero() -> None:
    config = tiny().model.config
    assert ablation.CHANGES["budgets"]["array halved"].fields(config) == {"array_budget": 1}
    assert ablation.CHANGES["budgets"]["string doubled"].fields(config) == {"string_budget": 10}
    with ablation.applied(tiny().model, ablation.CHANGES["budgets"]["array halved"]):
        assert ablation.CHANGES["budgets"]["array halved"].fields(config) == {"array_budget": 1}
        assert not ablation.CHANGES["budgets"]["array halved"].differs(config)


def test_a_shut_gate_copies_nothing_and_an_open_one_writes_nothing() -> None:
    model = tiny().model
    prompt = torch.tensor([[7, 8, 9, 7]])
    mask = torch.ones_like(prompt).bool()
    with torch.no_grad():
        memory = model.diffusion_head.encode_prompt(model.base_features(prompt, mask), prompt, mask)
    ids = torch.full((1, 4), model.config.mask_token_id)
    inputs = (memory, ids, torch.ones_like(ids), torch.arange(4)[None], torch.ones(1))

    def probabilities(change: ablation.Change) -> torch.Tensor:
        with ablation.applied(model, change), torch.no_grad():
            return model.draft_log_probs(*inputs)[0].exp()

    shut, usual, open_ = (probabilities(ablation.Change(gate=gate)) for gate in (ablation.SHUT, None, ablation.OPEN))
    in_prompt = torch.zeros(model.config.null_token_id + 1, dtype=torch.bool)
    in_prompt[prompt[0]] = True
    assert torch.allclose(open_[:, in_prompt].sum(1), torch.ones(4))
    assert (usual[:, in_prompt].sum(1) > shut[:, in_prompt].sum(1)).all()
    assert (usual[:, in_prompt].sum(1) < 1).all()


# --------------------------------------------------------------- positions by themselves


def test_what_can_occur_at_a_position_is_what_some_string_has_there() -> None:
    vocabulary, null = tiny().vocabulary, tiny().model.config.null_token_id
    found = {path: ablation.possible_tokens(slot, null) for path, slot in slots().items()}
    for path, text in (("/unit", "one two three"), ("/unit", "four five six"), ("/days", "47"), ("/city", "Rom")):
        tokens = canvas().tokens_of(slots()[path], text)
        assert found[path].gather(1, tokens[:, None]).all(), (path, text)
    (digit,), (zero,), (letter,) = (vocabulary.encode(text) for text in ("3", "0", "z"))
    assert found["/days"][0, digit]
    assert not found["/days"][0, [zero, letter, null]].any(), "two digits, the first of them no zero"
    assert found["/days"][1, [digit, zero]].all()
    assert not found["/days"][:, letter].any()
    assert found["/city"][0, null]
    other = vocabulary.encode("one two three")[0]
    assert set(found["/unit"][0].nonzero()[:, 0].tolist()) == {other, vocabulary.encode("four five six")[0]}


def test_lone_positions_splice_what_the_joint_commit_does_not() -> None:
    null, slot = tiny().model.config.null_token_id, slots()["/unit"]
    first, second = slot.choices
    differing = (first != second).nonzero()[:, 0]
    assert len(differing) > 1
    log_probs = torch.full((slot.length, null + 1), -20.0)
    for place in range(slot.length):
        log_probs[place, first[place]], log_probs[place, second[place]] = -1.0, -2.0
    log_probs[differing[-1], second[differing[-1]]] = -0.5
    free = torch.full((slot.length,), -1)
    (joint,) = grammar.commit_slots([slot], [log_probs], [free], null)
    (alone,) = ablation.commit_alone([slot], [log_probs], [free], null)
    assert ablation.is_value(slot, joint.tokens.tolist(), null)
    assert not ablation.is_value(slot, alone.tokens.tolist(), null)
    assert alone.tokens[differing[-1]] == second[differing[-1]]
    assert alone.confidence[differing[-1]] == pytest.approx(torch.tensor(-0.5).exp().item())
    fixed = free.clone()
    fixed[differing[0]] = second[differing[0]]
    (kept,) = ablation.commit_alone([slot], [log_probs], [fixed], null)
    assert kept.tokens[differing[0]] == second[differing[0]]
    assert kept.confidence[differing[0]] == 1


@pytest.mark.parametrize(
    ("path", "text", "tail", "is_one"),
    [
        ("/days", "12", "", True),
        ("/days", "1", "", False),
        ("/days", "1z", "", False),
        ("/city", "Rom", "", True),
        ("/city", "", "", True),
        ("/city", "Rome", "", False),
        ("/city", "R", "o", False),
        ("/unit", "four five six", "", True),
        ("/unit", "four", "", False),
    ],
)
def test_a_value_is_told_from_what_is_none(path: str, text: str, tail: str, is_one: bool) -> None:
    null, slot, encode = tiny().model.config.null_token_id, slots()[path], tiny().vocabulary.encode
    tokens = [*encode(text), *([null, *encode(tail)] if tail else [])]
    tokens += [null] * (slot.length - len(tokens))
    assert ablation.is_value(slot, tokens, null) == is_one


def test_broken_values_are_counted_and_the_shortest_stands_in_their_place() -> None:
    made, counts = canvas(), Counter[str]()
    null, encode = tiny().model.config.null_token_id, tiny().vocabulary.encode
    state = ablation.AloneState(counts, made, [None] * len(made.slots), drafting.Denoising())
    for slot, text in zip(made.slots, ("four", "z1", "Rom"), strict=True):
        tokens = list(encode(text))
        state.ids[slot.positions] = torch.tensor(tokens + [null] * (slot.length - len(tokens)))
    assert state.draft().arguments == {"unit": "one two three", "days": 10, "city": "Rom"}
    assert counts == {"values": 3, "broken": 2}


def test_a_broken_value_that_fills_its_slot_is_not_taken_to_go_on_behind_it() -> None:
    made, counts = canvas(), Counter[str]()
    state = ablation.AloneState(counts, made, [None] * len(made.slots), drafting.Denoising())
    null, letter = tiny().model.config.null_token_id, tiny().vocabulary.encode("R")[0]
    for slot in made.slots:
        state.ids[slot.positions] = torch.tensor([null] * (slot.length - 1) + [letter])
    draft = state.draft()
    assert counts["broken"] == 3
    assert draft.overflowing == []


def test_replies_of_lone_positions_are_valid_all_the_same_and_verified_writes_what_ar_does() -> None:
    one = asked()
    row = one.row(ablation.chosen(CHEAP, tiny().model.config), random.Random(0))
    assert list(row)[:2] == [ablation.DEFAULTS, "commit per position"]
    ablation.judge([one.request], [row])
    alone = row["commit per position"]
    assert alone["values"] == 3
    assert alone["broken"] > 0, "a random head splices"
    assert (alone["valid"], alone["right"]) == (False, False)
    for name, outcome in row.items():
        assert outcome["same"], name
        assert outcome["values_wanted"] == 3
        assert [call["name"] for call in outcome["calls"]] == ["get_it"]
        if name != "commit per position":
            assert (outcome["valid"], outcome["broken"], outcome["values"]) == (True, 0, 0)
    assert row[ablation.DEFAULTS]["head_forwards"] > 0


def test_noise_is_drawn_from_the_seed() -> None:
    change, one = ablation.CHANGES["draft_temperature"]["1.0"], asked()
    reference, _, _ = one.reply("ar", ablation.OPTIONS)
    first, again = (one.outcome(change, reference) for _ in range(2))
    assert first["calls"] == again["calls"]
    assert first["same"]


# --------------------------------------------------------------- numbers


def outcome(**fields: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "values_right": 1,
        "values_wanted": 2,
        "values": 0,
        "broken": 0,
        "drafted": 4,
        "accepted": 1,
    }
    plain |= {"base_forwards": 3, "head_forwards": 2, "same": True, "diffusion_ms": 10.0, "verified_ms": 20.0}
    return plain | {"calls": [CALL], "right": True, "valid": True} | fields


def test_numbers_are_shares_of_sums_with_paired_differences() -> None:
    better = [outcome(values_right=2, verified_ms=5.0), outcome(values_right=1, accepted=4, broken=1, values=2)]
    rows = [{ablation.DEFAULTS: outcome(), "better": one, "equal": outcome()} for one in better * 10]
    found = ablation.numbers(rows, 0)
    right = found["better"]["values right"]
    assert (found[ablation.DEFAULTS]["values right"]["value"], right["value"], right["difference"]) == (0.5, 0.75, 0.25)
    low, high = right["difference_interval"]
    assert 0 < low < 0.25 < high
    assert found["better"]["values accepted"]["value"] == 0.625
    assert found["better"]["verified ms"]["value"] == 12.5
    assert found["better"]["broken_values"] == [10, 20]
    assert found["equal"]["values right"]["difference_interval"] == [0, 0]
    assert "difference" not in found[ablation.DEFAULTS]["values right"]
    assert ablation.numbers(rows, 0) == found
    lines = {line.split(" | ")[0].strip("| "): line for line in ablation.table(found).splitlines()}
    assert "| 75.0% (" in lines["better"]
    assert "*" in lines["better"]
    assert "*" not in lines["equal"]
    assert "*" not in lines[ablation.DEFAULTS]


def test_without_a_draft_there_is_no_share_of_it() -> None:
    found = ablation.numbers([{ablation.DEFAULTS: outcome(drafted=0, accepted=0)}] * 3, 0)
    cell = found[ablation.DEFAULTS]["values accepted"]
    assert (cell["value"], cell["interval"]) == (None, None)
    assert "%" in ablation.table(found)


# --------------------------------------------------------------- the command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A category with two requests for one call and one for two."""
    folder = tmp_path / "data"
    records = [
        {
            "id": f"record-{number}",
            "source": "test",
            "messages": [{"role": "user", "content": f"get it for 12 days in Rom, four five six, {number}"}],
            "tools": [TOOL],
            "calls": [CALL] * (1 + (number == 2)),
        }
        for number in range(3)
    ]
    write_records(folder / BFCL_FOLDER / "simple_python.jsonl.gz", records)
    return folder


def command(data: Path, out: Path, *options: str) -> None:
    given = ["--data", str(data), "--out", str(out), "--sets", "simple_python", "--threads", "1"]
    ablation.main([*given, "--factors", "commit", *options])


def test_the_command_writes_what_it_shows_and_goes_on_where_it_was_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablation, "load", lambda *_: Shape("tiny", tiny().model, tiny().tokenizer))
    out, original, done = tmp_path / "out.json", ablation.Asked.row, list[str]()

    def row(self: Any, *given: Any, stops: bool) -> Any:
        if stops and done:
            raise KeyboardInterrupt
        done.append(self.request.row.id)
        return original(self, *given)

    monkeypatch.setattr(ablation.Asked, "row", lambda self, *given: row(self, *given, stops=True))
    with pytest.raises(SystemExit, match="Interrupted: 1 requests are kept"):
        command(data, out)
    with pytest.raises(SystemExit, match="another seed"):
        command(data, out, "--seed", "1")
    monkeypatch.setattr(ablation.Asked, "row", lambda self, *given: row(self, *given, stops=False))
    command(data, out)
    assert len(done) == len(set(done)) == 2
    report = json.loads(out.read_text(encoding="utf-8"))
    found = report["sets"]["simple_python"]
    assert (found["requests"], found["left out"], found["not one call"]) == (2, 0, 1)
    assert found["choices"] == report["together"]["choices"], "of the only set"
    assert list(found["choices"]) == [ablation.DEFAULTS, "commit per position"]
    for name in (ablation.DEFAULTS, "commit per position"):
        assert found["choices"][name]["same as ar"]["value"] == 1
    assert found["choices"][ablation.DEFAULTS]["calls valid"]["value"] == 1
    assert found["choices"]["commit per position"]["calls valid"]["value"] < 1
    assert set(report) >= {"command", "versions", "threads", "device", "defaults", "bootstrap_draws"}
    printed = capsys.readouterr().out
    assert ablation.table(report["together"]["choices"]) in printed
    broken, values = found["choices"]["commit per position"]["broken_values"]
    assert f"commit per position: {broken} of {values} drafted values" in printed
    assert "WARNING" not in printed
    assert [path.name for path in tmp_path.glob("out*")] == ["out.json"]


def test_verified_that_differs_from_ar_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = ablation.numbers([{ablation.DEFAULTS: outcome(same=False)}], 0)
    ablation.show({"sets": {}, "together": {"choices": found}})
    assert "WARNING: defaults: verified differs from ar" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sets", "unseen"], "there is no .*dev.jsonl.gz; name the folder"),
        (["--sets", "parallel"], "invalid choice: 'parallel'"),
        (["--factors", "luck"], "invalid choice: 'luck'"),
        (["--limit", "-1"], "numbers from 0"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(
    data: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(data, tmp_path / "out.json", *options)
    assert re.search(message, capsys.readouterr().err)


def test_a_model_that_is_not_there_is_said_in_one_line_and_leaves_no_file(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"eval\.decoding_ablation: .*nowhere"):
        command(data, tmp_path / "out.json", "--model", str(tmp_path / "nowhere"))
    assert not list(tmp_path.glob("out*"))


def test_a_set_without_a_request_for_one_call_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "load", lambda *_: Shape("tiny", tiny().model, tiny().tokenizer))
    monkeypatch.setattr(ablation, "requests", partial(lambda *_: ([], 3)))
    with pytest.raises(SystemExit, match="none of 3 records wants one call"):
        command(data, tmp_path / "out.json")
