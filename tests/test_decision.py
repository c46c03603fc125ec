"""The decision to call: what is scored is what routes, thresholds and probes are what they claim, the base stays."""

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eval import decision as decision_eval
from test_generation import WEATHER, respond, tiny_model
from tiny_models import SmolLMDiffusionForCausalLM, random_ids
from tiny_models import tiny_model as plain_model
from tiny_tokenizer import tiny_tokenizer
from training import decision
from training.data import Row
from training.decision import DecisionRun

CALL = tiny_tokenizer().convert_tokens_to_ids("<tool_call>")


def tool(name: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }


def rows_of(count: int) -> list[Row]:
    """Prompts of many lengths, every second of which wants a call of a tool of its own."""
    draw, rows = random.Random(0), []
    for index in range(count):
        prompt = [draw.randrange(3, 300) for _ in range(draw.randrange(2, 30))]
        call = {"name": f"tool_{index}", "arguments": {}}
        calls = [call] if index % 2 else []
        rows.append(Row(str(index), "tiny", prompt, [], [tool(f"tool_{index}")], calls, []))
    return rows


def probe_of(model: Any, seed: int = 0) -> torch.Tensor:
    width = model.config.get_text_config().hidden_size
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def weights_hash(module: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().float().numpy().tobytes() for p in module.parameters())).hexdigest()


# ------------------------------------------------------------------------------------------------- scores


def test_scores_of_a_batch_are_those_of_each_prompt_alone_in_order() -> None:
    model, rows = tiny_model(seed=1, scale=1.0), rows_of(7)
    model.set_decision_head(probe_of(model), 0.3)
    scores = decision.decision_scores(model, rows, tiny_tokenizer(), rows_per_batch=3)
    assert scores.wanted.tolist() == [bool(row.calls) for row in rows]
    for index, row in enumerate(rows):
        output = model.base(torch.tensor([row.prompt_ids]), output_hidden_states=True)
        logits, hidden = output.logits[0, -1].detach(), output.hidden_states[-1][0, -1].detach()
        assert scores.base_probabilities[index] == pytest.approx(float(logits.softmax(-1)[CALL]), abs=1e-5)
        assert bool(scores.base_calls[index]) == (int(logits.argmax()) == CALL)
        assert torch.allclose(scores.hidden[index], hidden, atol=1e-4)
        odds = float(hidden @ probe_of(model)) + 0.3
        assert scores.probabilities[index] == pytest.approx(1 / (1 + 2.718281828**-odds), abs=1e-4)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        decision.decision_scores(tiny_model(), [], tiny_tokenizer())


# ------------------------------------------------------------------------------------------------- thresholds

SCORES = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=2).filter(
    lambda rows: len({wanted for _, wanted in rows}) == 2
)


def rates(rows: list[tuple[float, bool]], threshold: float) -> tuple[float, float]:
    calls = [score >= threshold for score, wanted in rows if wanted]
    silent = [score < threshold for score, wanted in rows if not wanted]
    return sum(calls) / len(calls), sum(silent) / len(silent)


@settings(max_examples=40, deadline=None)
@given(SCORES)
def test_no_threshold_has_a_better_balanced_accuracy(rows: list[tuple[float, bool]]) -> None:
    scores, wanted = (torch.tensor(part) for part in zip(*rows, strict=True))
    chosen = decision.choose_threshold(scores, wanted)
    assert 0 <= chosen <= 1
    for other in (step / 64 for step in range(65)):
        assert sum(rates(rows, chosen)) >= sum(rates(rows, other)) - 1e-9


@settings(max_examples=40, deadline=None)
@given(SCORES, st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]))
def test_a_threshold_reaches_the_minima_or_says_that_none_does(
    rows: list[tuple[float, bool]], relevance: float, irrelevance: float
) -> None:
    scores, wanted = (torch.tensor(part) for part in zip(*rows, strict=True))
    reached = [rates(rows, step / 64) for step in range(65)]
    if any(one >= relevance and other >= irrelevance for one, other in reached):
        one, other = rates(rows, decision.choose_threshold(scores, wanted, relevance, irrelevance))
        assert one >= relevance
        assert other >= irrelevance
    else:
        with pytest.raises(ValueError, match="irrelevance is at most"):
            decision.choose_threshold(scores, wanted, relevance, irrelevance)


def test_of_equal_thresholds_the_one_in_the_middle_of_the_gap_near_one_half_is_chosen() -> None:
    assert decision.choose_threshold(torch.tensor([0.2, 0.9]), torch.tensor([False, True])) == pytest.approx(0.55)


def test_what_is_measured_of_a_perfect_decision() -> None:
    chances, wanted = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, True, False])
    found = decision.measured(chances, chances >= 0.5, wanted)
    assert found["auc"] == found["relevance"] == found["irrelevance"] == found["accuracy"] == 1
    assert found["ece_10"] == found["ece_15"] == 0
    silent = decision.measured(chances, torch.zeros(3, dtype=torch.bool), wanted)
    assert (silent["relevance"], silent["irrelevance"], silent["balanced_accuracy"]) == (0, 1, 0.5)


# ------------------------------------------------------------------------------------------------- the probe


def test_a_probe_finds_what_separates_and_keeps_it_small_under_decay() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.arange(200) % 2 == 0
    hidden = torch.randn(200, 6, generator=generator) * 3 + 7
    hidden[:, 2] += 8 * wanted
    probe = decision.fit_probe(hidden, wanted, 0.01)
    calls = probe.log_odds(hidden) > 0
    assert (calls == wanted).float().mean() > 0.85
    assert int(probe.weight.abs().argmax()) == 2
    strong = decision.fit_probe(hidden, wanted, 10.0)
    assert strong.weight.norm() < probe.weight.norm() / 5
    again = decision.fit_probe(hidden, wanted, 0.01)
    assert torch.equal(again.weight, probe.weight)


def test_a_probe_is_at_the_minimum_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, wanted = torch.randn(60, 4, generator=generator), torch.arange(60) % 3 == 0
    probe = decision.fit_probe(hidden, wanted, 0.1)
    scale = hidden.double().std(0, correction=0)

    def loss(weight: torch.Tensor, bias: float) -> float:
        odds = hidden.double() @ weight + bias
        fit = torch.nn.functional.binary_cross_entropy_with_logits(odds, wanted.double())
        return float(fit + 0.05 * (weight * scale).square().sum())

    least = loss(probe.weight, probe.bias)
    for place in range(4):
        for step in (-1e-3, 1e-3):
            moved = probe.weight.clone()
            moved[place] += step
            assert loss(moved, probe.bias) >= least - 1e-9
    assert loss(probe.weight, probe.bias + 1e-3) >= least - 1e-9


def test_a_prompt_is_scored_by_a_probe_that_saw_none_of_its_folds_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(60)
    hidden = torch.arange(60.0)[:, None].repeat(1, 2)
    fitted: list[set[int]] = []
    original = decision.fit_probe

    def note(part: torch.Tensor, wanted: torch.Tensor, weight_decay: float) -> decision.Probe:
        fitted.append({int(value) for value in part[:, 0]})
        return original(part, wanted, weight_decay)

    monkeypatch.setattr(decision, "fit_probe", note)
    found = decision.cross_fitted(hidden, rows, 1.0)
    assert found.shape == (60,)
    folds = [decision.fold_of(row.tools[0]["function"]["name"]) for row in rows]
    for fold, used in zip(sorted(set(folds)), fitted, strict=True):
        assert used == {index for index, own in enumerate(folds) if own != fold}


def test_too_few_tools_for_a_probe_are_refused() -> None:
    rows = [row for row in rows_of(60) if decision.fold_of(row.tools[0]["function"]["name"]) == 0]
    with pytest.raises(ValueError, match="Too few prompts for a probe"):
        decision.cross_fitted(torch.zeros(len(rows), 2), rows, 1.0)


# ------------------------------------------------------------------------------------------------- in the model


def test_a_model_without_a_probe_has_no_weights_of_one(tmp_path: Path) -> None:
    model = plain_model()
    assert model.decision_head is None
    model.save_pretrained(tmp_path)
    assert not any("decision_head" in key for key in load_file(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["decision_head"]  # as checkpoints were before there were probes
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SmolLMDiffusionForCausalLM.from_pretrained(tmp_path).decision_head is None


@pytest.mark.parametrize("head_only", [False, True])
def test_a_probe_is_saved_and_loaded_in_float32_and_frozen(tmp_path: Path, head_only: bool) -> None:
    plain_model().base.save_pretrained(tmp_path / "base")
    model = SmolLMDiffusionForCausalLM.from_base(
        tmp_path / "base", head_hidden_size=32, head_num_layers=2, head_num_heads=2, dtype=torch.bfloat16
    )
    before = weights_hash(model.base)
    model.set_decision_head(probe_of(model), -0.123456)
    assert weights_hash(model.base) == before
    model.save_pretrained(tmp_path / "saved", head_only=head_only)
    keys = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert {"decision_head.weight", "decision_head.bias"} <= keys
    assert any(key.startswith("base.") for key in keys) != head_only
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(loaded.decision_head.weight[0], probe_of(model))
    assert loaded.decision_head.bias.item() == pytest.approx(-0.123456)
    assert not any(parameter.requires_grad for parameter in loaded.decision_head.parameters())
    assert weights_hash(loaded.base) == before


def test_a_head_only_checkpoint_that_lacks_its_probe_is_refused(tmp_path: Path) -> None:
    plain_model().base.save_pretrained(tmp_path / "base")
    model = SmolLMDiffusionForCausalLM.from_base(
        tmp_path / "base", head_hidden_size=32, head_num_layers=2, head_num_heads=2
    )
    model.set_decision_head(probe_of(model))
    model.save_pretrained(tmp_path / "saved", head_only=True)
    path = tmp_path / "saved" / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "decision" not in key}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['decision_head.bias', 'decision_head.weight'\]"):
        SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_probe_can_be_taken_away_and_must_fit_the_base() -> None:
    model = plain_model()
    model.set_decision_head(probe_of(model))
    assert model.config.decision_head
    model.set_decision_head(None)
    assert model.decision_head is None
    assert not model.config.decision_head
    with pytest.raises(ValueError, match=r"the base needs \(32,\)"):
        model.set_decision_head(torch.zeros(3))


def test_a_probe_changes_no_logits() -> None:
    model, ids = plain_model(), random_ids(2, 9)
    before = model(ids).logits
    model.set_decision_head(probe_of(model))
    assert torch.equal(model(ids).logits, before)


# ------------------------------------------------------------------------------------------------- routing

AUTO = {"tool_choice": "auto", "max_new_tokens": 2, "max_tool_calls": 1, "output_trace": True}


@pytest.mark.parametrize("decoding", ["ar", "verified", "diffusion"])
@pytest.mark.parametrize(("bias", "mode"), [(50.0, "tool"), (-50.0, "chat")])
def test_the_probe_decides_where_a_threshold_is_given(decoding: str, bias: float, mode: str) -> None:
    model = tiny_model(seed=1)
    model.set_decision_head(torch.zeros(model.config.get_text_config().hidden_size), bias)
    reply = respond(model, [WEATHER], decoding=decoding, tool_call_threshold=0.5, **AUTO)
    assert reply.mode == mode
    assert reply.trace[0].data["probability"] == pytest.approx(float(bias > 0))


def test_without_a_threshold_the_base_decides_and_no_probe_is_asked() -> None:
    plain, probed = tiny_model(seed=1), tiny_model(seed=1)
    probed.set_decision_head(torch.zeros(probed.config.get_text_config().hidden_size), 50.0)
    replies = [respond(model, [WEATHER], **AUTO) for model in (plain, probed)]
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].trace[0].data == replies[1].trace[0].data


def test_what_routes_is_what_was_scored() -> None:
    model = tiny_model(seed=1, scale=1.0)
    prompt = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "weather in Paris?"}], tools=[WEATHER], add_generation_prompt=True
    )["input_ids"]
    row = Row("0", "tiny", list(prompt), [], [WEATHER], [], [])
    for probe in (None, 0.05 * probe_of(model)):
        model.set_decision_head(probe)
        scored = decision.decision_scores(model, [row], tiny_tokenizer()).probabilities.item()
        output = model.generate(
            torch.tensor([prompt]),
            tools=[WEATHER],
            tokenizer=tiny_tokenizer(),
            tool_call_threshold=0.9,
            return_dict_in_generate=True,
            **{**AUTO, "max_new_tokens": 1},
        )
        assert output.trace[0][0].data["probability"] == pytest.approx(scored, abs=1e-5)


def test_the_probe_speaks_behind_a_thought() -> None:
    model = tiny_model(seed=1)
    model.set_decision_head(torch.zeros(model.config.get_text_config().hidden_size), 50.0)
    reply = respond(model, [WEATHER], enable_thinking=True, tool_call_threshold=0.5, **AUTO)
    assert reply.mode == "tool"
    assert "reasoning_content" in reply.message


# ------------------------------------------------------------------------------------------------- the run


def write_data(folder: Path, requests: int = 120) -> None:
    """Requests that name a tool, each with that tool and others."""
    names = [f"find_{word}_{number}" for word in ("city", "day", "unit", "name") for number in range(6)]
    draw, lines = random.Random(0), []
    for index in range(requests):
        chosen = draw.sample(names, 3)
        lines.append(
            {
                "id": f"r{index}",
                "source": "tiny",
                "license": "Apache-2.0",
                "messages": [{"role": "user", "content": f"call {chosen[0]} for Paris number {index}"}],
                "tools": [tool(name) for name in chosen],
                "calls": [{"name": chosen[0], "arguments": {"city": "Paris"}}],
            }
        )
    (folder / "train").mkdir(parents=True)
    with gzip.open(folder / "train" / "tiny.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes options of a run on tiny data and a tiny model in bfloat16."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path / "data")
    model = tiny_model(seed=2, scale=1.0)
    model.config.get_text_config().max_position_embeddings = 2048
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")

    def make(**options: Any) -> DecisionRun:
        fields = {"output": tmp_path / "out", "model": str(tmp_path / "model"), "data": [tmp_path / "data"]}
        return DecisionRun(**{**fields, "calls": 24, "threads": 1, **options})

    return make


def test_draws_hold_both_kinds_once_and_repeat_with_the_seed(run_of: Any) -> None:
    stream = decision.decision_stream(run_of(), tiny_tokenizer())
    rows = decision.draw_decisions(stream, 20, random.Random(5))
    assert sum(bool(row.calls) for row in rows) == 20 == len(rows) - 20
    assert len({tuple(row.prompt_ids) for row in rows}) == 40
    again = decision.draw_decisions(stream, 20, random.Random(5))
    assert [row.prompt_ids for row in again] == [row.prompt_ids for row in rows]
    for row in rows:
        named = {name for name in row.messages[-1]["content"].split() if name.startswith("find_")}
        shown = {entry["function"]["name"] for entry in row.tools}
        assert bool(row.calls) == bool(named & shown)
    with pytest.raises(ValueError, match="too few different prompts"):
        decision.draw_decisions(_OneRow(rows[0]), 3, random.Random(0))  # type: ignore[arg-type]


class _OneRow:
    """A stream that knows one row."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def draw(self, *_: Any) -> Row:
        return self.row


@pytest.mark.parametrize("probe", [False, True])
def test_a_run_saves_threshold_and_probe_and_leaves_all_else(
    run_of: Any, probe: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(probe=probe)
    decision.train_decision(run, tiny_tokenizer())
    printed = capsys.readouterr().out
    assert "48 prompts, 24 of which want a call" in printed
    assert printed.count("relevance") == 2 * printed.count("irrelevance") == 2 * printed.count("ece_15") == 6
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(run.output / "final" / "model.safetensors")
    assert {key for key in after if key not in before} == (
        {"decision_head.weight", "decision_head.bias"} if probe else set()
    )
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(run.output / "final")
    assert 0 <= loaded.generation_config.tool_call_threshold <= 1
    assert (loaded.decision_head is not None) == probe


def test_the_same_run_gives_the_same_and_one_without_a_probe_drops_it(run_of: Any, tmp_path: Path) -> None:
    first = decision.train_decision(run_of(probe=True, calls=12), tiny_tokenizer())
    saved = str(tmp_path / "out" / "final")
    again = decision.train_decision(run_of(probe=True, calls=12, model=saved, output=tmp_path / "2"), tiny_tokenizer())
    assert torch.equal(first.decision_head.weight, again.decision_head.weight)
    assert first.generation_config.tool_call_threshold == again.generation_config.tool_call_threshold
    bare = decision.train_decision(run_of(calls=12, model=saved, output=tmp_path / "3"), tiny_tokenizer())
    assert bare.decision_head is None


@pytest.mark.parametrize("options", [{"calls": 0}, {"min_relevance": 1.5}, {"min_irrelevance": -0.1}])
def test_impossible_options_are_named(run_of: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        run_of(**options)


# ------------------------------------------------------------------------------------------------- the report


def test_records_can_be_left_out_and_lines_that_are_none_passed_over(run_of: Any, tmp_path: Path) -> None:
    data = tmp_path / "data" / "train" / "tiny.jsonl.gz"
    with gzip.open(data, "at") as file:
        file.write('{"id": "broken"}\n')
    with pytest.raises(ValueError, match=r"tiny\.jsonl\.gz"):
        decision.decision_stream(run_of(), tiny_tokenizer())
    whole = decision.decision_stream(run_of(on_error="skip"), tiny_tokenizer())
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps({"file": "train/tiny", "line": 8, "id": "r7"}) + "\n")
    part = decision.decision_stream(run_of(on_error="skip", leave_out=out), tiny_tokenizer())
    counts = [sum(len(pool) for pool in stream.pools.values()) for stream in (whole, part)]
    assert counts == [120, 119]


def test_several_processes_are_refused(run_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        run_of()


def test_scoring_says_how_fast_it_was(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "training.decision")
    decision.decision_scores(tiny_model(), rows_of(3), tiny_tokenizer())
    assert "rows_per_second" in caplog.text
    assert "peak_mib" in caplog.text


def test_the_report_compares_three_ways_on_balanced_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path / "data")
    model = tiny_model(seed=2, scale=1.0)
    model.set_decision_head(probe_of(model))
    model.generation_config.tool_call_threshold = 0.4
    final = str(tmp_path / "probed")
    model.save_pretrained(final)
    tiny_tokenizer().save_pretrained(final)
    with gzip.open(tmp_path / "data" / "train" / "tiny.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    (tmp_path / "data" / "dev").mkdir()
    for record in records[::3]:
        record["tools"], record["calls"] = record["tools"][1:], []
    with gzip.open(tmp_path / "data" / "dev" / "dev.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    out = tmp_path / "decision.json"
    sets = ["--data", str(tmp_path / "data"), "--sets", "unseen", "--limit", "20"]
    decision_eval.main(["--models", final, *sets, "--threads", "1", "--out", str(out)])
    found = json.loads(out.read_text())["models"][final]
    assert found["probe"]
    assert found["sets"]["unseen"]["prompts"] == 40
    for way in ("base", "0.5", "shipped"):
        values = found["sets"]["unseen"][way]
        assert values["accuracy"] == pytest.approx(values["balanced_accuracy"], abs=1e-3)
        assert values["roc"][0] == [0.0, 0.0]
        assert values["roc"][-1] == [1.0, 1.0]
        assert sum(one["count"] for one in values["bins"]) == 40
