"""Pre-training of the base on tiny records made here: what is predicted, what copies before training, what resumes."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast, SmolLM3ForCausalLM

from repo_package import ROOT
from tiny_records import record
from training import base as pretraining
from training import data as rows_module
from training import head_evaluation
from training.base import BaseObjective, BaseRun, TokenRow
from training.data import PromptStyle, Record, Row, build_row
from training.trainer import TrainingError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty natural calls, some of them held out, and a few tools for evaluation."""

    def write(path: Path, records: list[Record]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(item) + "\n" for item in records)

    data = tmp_path / "data"
    write(data / "train" / "snips.jsonl.gz", [record(index) for index in range(40)])
    write(data / "dev" / "dev.jsonl.gz", [record(400 + i) for i in range(5)])
    monkeypatch.setattr(rows_module, "SOURCE_WEIGHTS", {"train/snips": 1.0})
    monkeypatch.setattr(rows_module, "HELD_OUT_SOURCES", ("snips",))
    held_out = [record(i) for i in range(4)]
    monkeypatch.setattr(rows_module, "held_out_records", lambda data, count=200: held_out)
    monkeypatch.setattr(head_evaluation, "held_out_records", lambda data: held_out)
    return data


def options(folder: Path, output: Path, **changes: Any) -> BaseRun:
    usual: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "max_steps": 8,
        "rows_per_batch": 2,
        "eval_steps": 4,
        "logging_steps": 1,
        "eval_rows": 4,
        "save_total_limit": 5,
    }
    return BaseRun(output=output, data=[folder], **(usual | changes))


def make_row(prompt: int, target: int, follow_ups: int = 0) -> Row:
    extra = [([5, 5], [6, 6]) for _ in range(follow_ups)]
    return Row("r", "s", [3] * prompt, [4] * target, [], [], [], extra)


def test_whole_replies_and_a_share_of_the_prompt_are_predicted() -> None:
    made = pretraining.token_row(make_row(400, 4, 1), random.Random(0), 0.25, 0.5)
    assert made.ids.shape == (408,)
    assert set(made.ids[1:][made.is_target].tolist()) == {4, 6}
    assert made.is_target.sum() == 4 + 2
    assert set(made.weights[made.is_target].tolist()) == {1.0}
    assert 60 < (made.weights == 0.5).sum() < 140


def test_padding_is_never_predicted() -> None:
    rows = [pretraining.token_row(make_row(n, 2), random.Random(0), 0.0, 0.5) for n in (9, 3)]
    batch = pretraining.collate(rows, pad_id=0)
    assert batch["input_ids"].shape == (2, 11)
    assert batch["weights"][batch["input_ids"][:, 1:] == 0].sum() == 0
    assert batch["loss_normaliser"] == 4


def test_padding_does_not_change_a_rows_loss(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    objective = BaseObjective(fresh(tokenizer, tmp_path))
    rows = [row for i in range(3) if (row := build_row(record(i), tokenizer, PromptStyle(i + 1), random.Random(i)))]
    pad = tokenizer.pad_token_id
    together = pretraining.evaluate(objective, rows, pad)["loss"]
    alone = [pretraining.evaluate(objective, [row], pad)["loss"] * len(row.target_ids) for row in rows]
    assert together == pytest.approx(sum(alone) / sum(len(row.target_ids) for row in rows), rel=1e-5)


def fresh(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, **changes: Any) -> SmolLM3ForCausalLM:
    torch.manual_seed(0)
    return SmolLM3ForCausalLM(pretraining.base_config(tokenizer, BaseRun(output=tmp_path, **changes)))


def test_the_loss_is_that_of_transformers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = fresh(tokenizer, tmp_path)
    ids = torch.randint(0, len(tokenizer), (2, 12))
    weights = torch.ones(2, 11)
    ours = BaseObjective(model)(ids, weights, weights.bool(), weights.sum()).loss
    torch.testing.assert_close(ours, model(input_ids=ids, labels=ids).loss)


def test_planted_heads_copy_before_any_training(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = fresh(tokenizer, tmp_path)
    rng = random.Random(1)
    batch = pretraining.collate([pretraining.repeated_tokens(len(tokenizer), 128, rng) for _ in range(4)], 0)

    def accuracy() -> float:
        with torch.no_grad():
            return float(BaseObjective(model)(**batch).hits.float().mean())

    assert accuracy() < 0.02
    pretraining.plant_induction(model, torch.Generator().manual_seed(0))
    assert accuracy() > 0.25


def test_repeated_tokens_are_predicted_from_the_second_round_on() -> None:
    made = pretraining.repeated_tokens(100, 64, random.Random(3))
    assert isinstance(made, TokenRow)
    first = int(made.is_target.nonzero()[0]) + 1  # index into ids
    period = next(p for p in range(8, 33) if torch.equal(made.ids[p:], made.ids[:-p]))
    assert first == period + 1


def test_a_run_saves_a_loadable_base(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    run = options(folder, tmp_path / "out")
    pretraining.train_base(run, tokenizer)
    model = SmolLM3ForCausalLM.from_pretrained(run.output / "final")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(run.output / "final").chat_template == tokenizer.chat_template
    history = json.loads((run.output / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_seen_loss" in entry]
    assert len(evaluations) == 2
    assert {"eval_unseen_loss", "eval_seen_exact", "eval_unseen_token"} <= set(evaluations[0])
    assert evaluations[1]["eval_seen_loss"] < evaluations[0]["eval_seen_loss"]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretraining.train_base(options(folder, tmp_path / "whole"), tokenizer)

    class Stop(Exception):
        pass

    usual = BaseObjective.forward
    calls: list[int] = []

    def stopping(self: BaseObjective, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            calls.append(1)
            if len(calls) == 7:
                raise Stop
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(BaseObjective, "forward", stopping)
    with pytest.raises(Stop):
        pretraining.train_base(options(folder, tmp_path / "broken"), tokenizer)
    monkeypatch.setattr(BaseObjective, "forward", usual)
    pretraining.train_base(options(folder, tmp_path / "broken"), tokenizer)
    first, second = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "broken"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("eval_rows", "measured"), [(0, []), (3, [3, 3])])
def test_evaluations_have_as_many_rows_as_asked(
    folder: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    eval_rows: int,
    measured: list[int],
) -> None:
    seen: list[int] = []

    def evaluate(objective: BaseObjective, rows: list[Row], pad_id: int) -> dict[str, float]:
        seen.append(len(rows))
        return {"loss": 1.0}

    monkeypatch.setattr(pretraining, "evaluate", evaluate)
    pretraining.train_base(options(folder, tmp_path / "out", max_steps=1, eval_rows=eval_rows), tokenizer)
    assert seen == measured


def test_training_goes_on_from_a_trained_base(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = options(folder, tmp_path / "first")
    pretraining.train_base(first, tokenizer)
    started = pretraining.start_weights(
        options(folder, tmp_path / "second", init_from=str(first.output / "final")), tokenizer
    )
    saved = SmolLM3ForCausalLM.from_pretrained(first.output / "final", dtype=torch.float32)
    assert torch.equal(started.model.embed_tokens.weight, saved.model.embed_tokens.weight)
    assert all(parameter.requires_grad for parameter in started.parameters())
    assert started.dtype == torch.float32


def test_a_base_with_another_vocabulary_is_refused(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = fresh(tokenizer, tmp_path, hidden_size=64, num_heads=4, num_key_value_heads=2, num_layers=2)
    other.resize_token_embeddings(len(tokenizer) + 8)
    other.save_pretrained(tmp_path / "other")
    run = options(folder, tmp_path / "out", init_from=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="has a vocabulary of 8200 tokens"):
        pretraining.train_base(run, tokenizer)


def test_a_checkpoint_of_another_size_is_refused(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pretraining.train_base(options(folder, tmp_path / "out", max_steps=4), tokenizer)
    with pytest.raises(TrainingError, match="does not fit this model"):
        pretraining.train_base(options(folder, tmp_path / "out", num_layers=5), tokenizer)
