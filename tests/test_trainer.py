"""One training run: same batches for everyone, exact losses over accumulation and processes, bit-equal resume, and
what happens when something goes wrong."""

import errno
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

from repo_package import ROOT
from training import trainer as training
from training.trainer import (
    BlockDataset,
    RunOptions,
    StageTrainer,
    Throughput,
    TrainingError,
    balanced_groups,
    is_disk_full,
    is_out_of_memory,
    last_checkpoint,
)


class Line(nn.Module):
    """Learns y = 3 x from rows of different length; one part is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Linear(1, 4, bias=False)
        self.sum = nn.Linear(4, 1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, input_ids: Tensor, weights: Tensor, loss_normaliser: Tensor) -> ModelOutput:
        errors = (self.sum(self.slope(input_ids[..., None].float()))[..., 0] - 3 * input_ids) ** 2
        return ModelOutput(loss=(errors * weights).sum() / loss_normaliser, errors=errors.detach())


def draw(rng: random.Random, progress: float) -> list[float]:
    return [rng.uniform(-1, 1) for _ in range(rng.randint(1, 6))]


def collate(rows: list[list[float]]) -> dict[str, Tensor]:
    values = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    weights = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    return {"input_ids": values, "weights": weights, "loss_normaliser": weights.sum()}


def metric_sums(output: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {"error": (output.errors.sum(), torch.tensor(float(output.errors.numel())))}


def options(output: Path, **changes: Any) -> RunOptions:
    usual: dict[str, Any] = {
        "max_steps": 12,
        "rows_per_batch": 4,
        "optimizer": "adamw",
        "adam_lr": 0.05,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 20,
    }
    return RunOptions(output=output, **(usual | changes))


def stage(run: RunOptions, evaluate: Any = None, batches: int | None = None, **arguments: Any) -> StageTrainer:
    torch.manual_seed(run.seed)
    count = run.max_steps * run.gradient_accumulation_steps if batches is None else batches
    dataset = BlockDataset(draw, len, run.rows_per_batch, count, run.seed)
    return StageTrainer(Line(), run, dataset, collate, evaluate, "-loss", metric_sums, **arguments)


def weights_of(trainer: StageTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---------------------------------------------------------------------- batches


def test_a_batch_is_a_pure_function_of_seed_and_index() -> None:
    first, second = (BlockDataset(draw, len, 4, 64, seed=1) for _ in range(2))
    in_order = [first[index] for index in range(64)]
    backwards = [second[index] for index in reversed(range(64))]
    assert in_order == backwards[::-1]
    assert in_order != [BlockDataset(draw, len, 4, 64, seed=2)[index] for index in range(64)]


def test_a_block_is_cut_into_batches_of_similar_length() -> None:
    dataset = BlockDataset(draw, len, 8, 16, seed=0)
    spreads = [max(map(len, batch)) - min(map(len, batch)) for batch in (dataset[i] for i in range(16))]
    assert sum(len(dataset[i]) for i in range(16)) == 128
    assert sum(spreads) / 16 <= 1


def test_the_progress_of_the_run_reaches_the_draw() -> None:
    seen: list[float] = []

    def noting(rng: random.Random, progress: float) -> list[float]:
        seen.append(progress)
        return [0.0]

    dataset = BlockDataset(noting, len, 1, 64, seed=0)
    for index in range(64):
        dataset[index]
    assert sorted(set(seen)) == [0.0, 0.25, 0.5, 0.75]


@given(st.lists(st.integers(1, 400), min_size=16, max_size=300))
def test_groups_cover_everything_once_and_none_is_dear(costs: list[int]) -> None:
    costs.sort()
    groups = balanced_groups(costs, 16)
    assert [index for group in groups for index in range(len(costs))[group]] == list(range(len(costs)))
    assert len(groups) == 16
    assert all(group.stop > group.start for group in groups)
    dearest = max((group.stop - group.start) * costs[group.stop - 1] for group in groups)
    # No cut can be cheaper than an equal share of the whole, nor than the dearest item.
    assert dearest <= max(costs[-1], 2 * sum(costs) / 16 + costs[-1])


# ---------------------------------------------------------------------- losses and optimizers


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulated_batches_are_one_large_batch(tmp_path: Path, optimizer: str) -> None:
    """Rows of different length: a mean of means would weigh them wrongly."""
    whole = stage(options(tmp_path / "whole", max_steps=3, optimizer=optimizer, lr=0.05))
    rows = [whole.train_dataset[index] for index in range(3)]
    whole.run()

    class Halves(BlockDataset[list[float]]):
        def __getitem__(self, index: int) -> list[list[float]]:
            step, half = divmod(index, 2)
            return rows[step][:1] if half == 0 else rows[step][1:]

    run = options(tmp_path / "halves", max_steps=3, optimizer=optimizer, lr=0.05, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    halves = StageTrainer(Line(), run, Halves(draw, len, 4, 6, 0), collate)
    halves.run()
    for name, tensor in weights_of(whole).items():
        torch.testing.assert_close(weights_of(halves)[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["trapezoid", "cosine", "one_cycle"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_optimizer_and_schedule_lowers_the_loss(tmp_path: Path, optimizer: str, schedule: str) -> None:
    trainer = stage(options(tmp_path, max_steps=60, optimizer=optimizer, schedule=schedule, lr=0.03))
    trainer.run()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert max(rates) > 5 * rates[-1]
    assert rates.index(max(rates)) <= 0.1 * 60


def test_a_long_warmup_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"warmup_share must be from 0 to 0\.1"):
        options(tmp_path, warmup_share=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of muon, adamw"),
        ({"schedule": "step"}, "schedule one of trapezoid"),
        ({"save_steps": 3}, "multiple of eval_steps"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
    ],
)
def test_options_that_make_no_run_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **changes)


# ---------------------------------------------------------------------- resume, best checkpoint, early stop


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    whole = stage(options(tmp_path / "whole", optimizer=optimizer))
    whole.run()

    class Stop(Exception):
        pass

    broken = stage(options(tmp_path / "broken", optimizer=optimizer))
    step = broken.training_step

    def stopping(*args: Any, **kwargs: Any) -> Tensor:
        if broken.state.global_step == 7:
            raise Stop
        return step(*args, **kwargs)

    broken.training_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stop):
        broken.run()
    assert last_checkpoint(tmp_path / "broken").name == "checkpoint-6"  # type: ignore[union-attr]
    resumed = stage(options(tmp_path / "broken", optimizer=optimizer))
    resumed.run()
    assert resumed.state.global_step == 12
    assert_same(weights_of(whole), weights_of(resumed))


def test_a_checkpoint_holds_only_what_is_trained(tmp_path: Path) -> None:
    trainer = stage(options(tmp_path))
    frozen = trainer.model.frozen.weight.clone()
    trainer.run()
    saved = load_file(tmp_path / "checkpoint-12" / training.WEIGHTS_FILE)
    assert set(saved) == {"slope.weight", "sum.weight", "sum.bias"}
    assert torch.equal(trainer.model.frozen.weight, frozen)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    scores = iter([5.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    at: dict[float, dict[str, Tensor]] = {}

    def evaluate() -> dict[str, float]:
        score = next(scores)
        at[score] = weights_of(trainer)
        return {"loss": score}

    trainer = stage(options(tmp_path), evaluate)
    trainer.run()
    assert_same(weights_of(trainer), at[1.0])


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    scores = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    trainer = stage(options(tmp_path, patience=2), lambda: {"loss": next(scores)})
    trainer.run()
    assert trainer.state.global_step == 6


def test_a_folder_with_checkpoints_is_refused_where_resume_is_off(tmp_path: Path) -> None:
    stage(options(tmp_path)).run()
    with pytest.raises(TrainingError, match="holds checkpoint-12, and resume is off"):
        stage(options(tmp_path, resume=False)).run()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    stage(options(tmp_path)).run()
    weights = tmp_path / "checkpoint-12" / training.WEIGHTS_FILE
    save_file({**load_file(weights), "other.weight": torch.zeros(1)}, weights)
    with pytest.raises(TrainingError, match=r"does not fit this model.*other\.weight"):
        stage(options(tmp_path, max_steps=14)).run()


# ---------------------------------------------------------------------- log lines


def test_a_log_line_says_how_fast_and_what_dominates(tmp_path: Path) -> None:
    trainer = stage(options(tmp_path))
    trainer.run()
    line = next(entry for entry in trainer.state.log_history if "tokens_per_second" in entry)
    assert line["tokens_per_second"] > line["rows_per_second"] > 0
    assert line["peak_mib"] > 10
    shares = [line[f"percent_{part}"] for part in ("data", "forward", "backward", "rest")]
    assert 95 <= sum(shares) <= 105
    assert line["error"] > 0


def test_metrics_are_means_over_all_rows_not_over_batches(tmp_path: Path) -> None:
    trainer = stage(options(tmp_path))
    trainer.sums = {"error": [torch.tensor(3.0), torch.tensor(4.0)]}
    logged: list[dict[str, float]] = []
    trainer.add_callback(_Listener(logged))
    trainer.log({"loss": 1.0})
    assert logged[0]["error"] == 0.75


class _Listener(training.EarlyStoppingCallback):
    def __init__(self, logged: list[dict[str, float]]) -> None:
        super().__init__()
        self.logged = logged

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logged.append(logs)


def test_throughput_starts_anew_after_each_line() -> None:
    throughput = Throughput()
    throughput.count(rows=2, tokens=50)
    assert throughput.flush()["tokens_per_second"] > 0
    assert throughput.flush()["tokens_per_second"] == 0


# ---------------------------------------------------------------------- failures


def failing(trainer: StageTrainer, step: int, error: BaseException) -> StageTrainer:
    usual = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        if trainer.state.global_step == step:
            raise error
        return usual(*args, **kwargs)

    trainer.training_step = training_step  # type: ignore[method-assign]
    return trainer


def test_out_of_memory_says_what_to_lower_and_what_is_safe(tmp_path: Path) -> None:
    trainer = failing(stage(options(tmp_path)), 5, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    with pytest.raises(TrainingError, match=r"lower rows_per_batch \(4\).*checkpoint-4 is whole"):
        trainer.run()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = training.save_file

    def full(tensors: Any, path: Path) -> None:
        if "checkpoint-6" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(tensors, path)

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(TrainingError, match=r"No space left.*checkpoint-4 is whole"):
        stage(options(tmp_path)).run()
    assert (tmp_path / "checkpoint-6").exists()  # half of one
    monkeypatch.undo()
    resumed = stage(options(tmp_path))
    resumed.run()
    whole = stage(options(tmp_path / "whole"))
    whole.run()
    assert_same(weights_of(whole), weights_of(resumed))


def test_an_interruption_says_where_to_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        failing(stage(options(tmp_path)), 5, KeyboardInterrupt()).run()
    assert "interrupted at step 5" in caplog.text
    assert "checkpoint-4 is whole" in caplog.text


def test_a_diverged_run_ends(tmp_path: Path) -> None:
    trainer = stage(options(tmp_path))
    trainer.model.sum.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the run diverged\. Lower lr"):
        trainer.run()


def test_other_errors_are_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        failing(stage(options(tmp_path)), 1, RuntimeError("shape mismatch")).run()
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert not is_disk_full(OSError(errno.EACCES, "no"))


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    trainer = stage(options(tmp_path))
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        trainer.run()


# ---------------------------------------------------------------------- several processes


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path: Path) -> None:
    """Two gloo processes on one batch each against one process that accumulates two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(tmp_path / "two")]
    shared = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()[-2000:]
    one = stage(options(tmp_path / "one", max_steps=4, gradient_accumulation_steps=2))
    one.run()
    two = load_file(tmp_path / "two" / "checkpoint-4" / training.WEIGHTS_FILE)
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, weights_of(one)[name], rtol=1e-5, atol=1e-6)
    history = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(losses, rel=1e-2)
