"""One training run: same batches for everyone, exact losses over accumulation and processes, bit-equal resume, and
what happens when something goes wrong."""

import errno
import json
import os
import random
import shutil
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


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_processes_that_take_turns_share_the_drawing(processes: int) -> None:
    drawn: list[float] = []

    def noting(rng: random.Random, progress: float) -> list[float]:
        drawn.append(rng.random())
        return drawn[-1:]

    length = 2 * 16 * 256
    batches: dict[int, list[list[float]]] = {}
    for process in range(processes):
        dataset = BlockDataset(noting, len, 1, length, seed=0)
        batches |= {index: dataset[index] for index in range(process, length, processes)}
    assert len(drawn) == len(set(drawn)) == length
    whole = BlockDataset(noting, len, 1, length, seed=0)
    assert [batches[index] for index in range(length)] == [whole[index] for index in range(length)]
    assert {row for batch in batches.values() for (row,) in batch} == set(drawn)


@given(st.integers(1, 40000))
def test_all_rows_of_a_run_are_drawn_within_a_sixteenth_of_their_place(length: int) -> None:
    dataset: BlockDataset[float] = BlockDataset(lambda rng, progress: progress, lambda row: 1.0, 1, length, seed=0)
    for index in {0, length // 3, length // 2, length - 1}:
        ((progress,),) = [dataset[index]]
        assert 0 <= index / length - progress <= max(1 / 16, 15 / length) + 1e-9  # quotients are rounded


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
        ({"save_total_limit": 1}, "save_total_limit must be at least 2"),
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


def test_a_checkpoint_follows_each_evaluation(tmp_path: Path) -> None:
    """Whatever `save_steps` says: the best weights could not be loaded otherwise."""
    scores = iter([1.0, 3.0, 2.0])
    trainer = stage(options(tmp_path, max_steps=6, eval_steps=2, save_steps=6), lambda: {"loss": next(scores)})
    trainer.run()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 4, 6)}
    best = load_file(tmp_path / "checkpoint-2" / training.WEIGHTS_FILE)
    assert all(torch.equal(weights_of(trainer)[name], tensor) for name, tensor in best.items())


@pytest.mark.parametrize("step", [2, 6, 10])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_any_checkpoint_can_be_gone_on_from(tmp_path: Path, step: int, elsewhere: bool) -> None:
    whole = stage(options(tmp_path / "whole"))
    whole.run()
    chosen = tmp_path / "whole" / f"checkpoint-{step}"
    output = tmp_path / "again"
    if not elsewhere:
        chosen = Path(shutil.copytree(chosen, output / chosen.name))
    resumed = stage(options(output, resume_from=chosen))
    trained = counted_steps(resumed)
    resumed.run()
    assert len(trained) == 12 - step
    assert_same(weights_of(whole), weights_of(resumed))


def test_a_checkpoint_to_go_on_from_must_be_whole_and_the_latest_of_its_folder(tmp_path: Path) -> None:
    stage(options(tmp_path)).run()
    with pytest.raises(TrainingError, match=r"holds checkpoint-12, which is later than .*checkpoint-4: leave out"):
        stage(options(tmp_path, resume_from=tmp_path / "checkpoint-4")).run()
    assert load_file(tmp_path / "checkpoint-12" / training.WEIGHTS_FILE)
    (tmp_path / "checkpoint-4" / training.COMPLETE_FILE).unlink()
    with pytest.raises(TrainingError, match=r"checkpoint-4 is no whole checkpoint: it has no complete\.json"):
        stage(options(tmp_path / "other", resume_from=tmp_path / "checkpoint-4")).run()


def counted_steps(trainer: StageTrainer) -> list[int]:
    """Grows by one with each step that is trained."""
    steps: list[int] = []
    usual = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        steps.append(trainer.state.global_step)
        return usual(*args, **kwargs)

    trainer.training_step = training_step  # type: ignore[method-assign]
    return steps


def getting_worse(run: RunOptions) -> StageTrainer:
    """A run whose first evaluation is its best."""
    trainer: StageTrainer = stage(run, lambda: {"loss": float(trainer.state.global_step)})
    return trainer


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    scores = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    trainer = stage(options(tmp_path, patience=2), lambda: {"loss": next(scores)})
    trainer.run()
    assert trainer.state.global_step == 6


def test_early_stopping_goes_on_counting_after_an_interruption(tmp_path: Path) -> None:
    whole = getting_worse(options(tmp_path / "whole", patience=3))
    whole.run()
    assert whole.state.global_step == 8
    with pytest.raises(KeyboardInterrupt):
        failing(getting_worse(options(tmp_path / "cut", patience=3)), 5, KeyboardInterrupt()).run()
    resumed = getting_worse(options(tmp_path / "cut", patience=3))
    resumed.run()
    assert resumed.state.global_step == 8
    assert_same(weights_of(whole), weights_of(resumed))


def test_a_run_that_was_stopped_early_is_not_trained_further(tmp_path: Path) -> None:
    first = getting_worse(options(tmp_path, patience=2))
    first.run()
    again = getting_worse(options(tmp_path, patience=2))
    trained = counted_steps(again)
    again.run()
    assert not trained
    assert again.state.global_step == 6
    assert_same(weights_of(first), weights_of(again))
    more = getting_worse(options(tmp_path, patience=4))
    trained = counted_steps(more)
    more.run()
    assert trained == [6, 7, 8, 9]


def test_patience_can_be_asked_for_later(tmp_path: Path) -> None:
    getting_worse(options(tmp_path, max_steps=4)).run()
    later = getting_worse(options(tmp_path, patience=2))
    later.run()
    assert later.state.global_step == 8


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
    trainer.sums = {"error": torch.tensor([3.0, 4.0])}
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


def test_tokens_are_those_of_prompt_and_scaffold(tmp_path: Path) -> None:
    class Canvas(Line):
        def forward(self, scaffold_ids: Tensor, field_ids: Tensor, **inputs: Tensor) -> ModelOutput:  # type: ignore[override]
            return super().forward(**inputs)

    def with_canvas(rows: list[list[float]]) -> dict[str, Tensor]:
        canvas = torch.zeros(len(rows), 50, dtype=torch.long)
        return collate(rows) | {"scaffold_ids": canvas, "field_ids": canvas}

    run = options(tmp_path, max_steps=1)
    dataset = BlockDataset(draw, len, 4, 1, 0)
    trainer = StageTrainer(Canvas(), run, dataset, with_canvas)
    counts: list[tuple[int, int]] = []
    usual = trainer.throughput.count
    trainer.throughput.count = lambda rows, tokens: (counts.append((rows, tokens)), usual(rows, tokens))[1]  # type: ignore[func-returns-value, method-assign]
    trainer.run()
    shape = collate(dataset[0])["input_ids"].shape
    assert counts == [(shape[0], shape.numel() + shape[0] * 50)]


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_disk_that_is_full_before_the_optimizer_is_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = torch.save

    def full(state: Any, path: str, *args: Any, **kwargs: Any) -> None:
        usual(state, "/dev/full" if "checkpoint-6" in str(path) else path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"No space left.*checkpoint-4 is whole"):
        stage(options(tmp_path)).run()


def test_a_disk_that_is_full_at_the_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, path: str) -> None:
        if "checkpoint" not in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(self, path)

    usual = training.TrainerState.save_to_json
    monkeypatch.setattr(training.TrainerState, "save_to_json", full)
    with pytest.raises(TrainingError, match=r"No space left.*checkpoint-12 is whole"):
        stage(options(tmp_path)).run()


def test_an_interruption_says_where_to_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        failing(stage(options(tmp_path)), 5, KeyboardInterrupt()).run()
    assert "interrupted at step 5" in caplog.text
    assert "checkpoint-4 is whole" in caplog.text


def test_an_interrupted_run_that_began_elsewhere_goes_on_from_its_own_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage(options(tmp_path / "first", max_steps=2)).run()
    run = options(tmp_path / "second", resume_from=tmp_path / "first" / "checkpoint-2")
    with pytest.raises(KeyboardInterrupt):
        failing(stage(run), 5, KeyboardInterrupt()).run()
    assert "checkpoint-4 is whole, and the same command without resume_from goes on from it" in caplog.text


def test_a_diverged_run_ends(tmp_path: Path) -> None:
    trainer = stage(options(tmp_path))
    trainer.model.sum.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the run diverged\. Lower lr"):
        trainer.run()


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_diverged_model_is_never_saved(tmp_path: Path, evaluated: bool) -> None:
    """Though no log line falls between the step that diverges and its checkpoint."""
    run = options(tmp_path, logging_steps=5)
    trainer = getting_worse(run) if evaluated else stage(run)
    usual = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = usual(*args, **kwargs)
        if trainer.state.global_step == 7:
            trainer.model.sum.weight.grad.fill_(float("nan"))
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=r"weights are not finite at step 8: the run diverged.*checkpoint-6 is whole"
    ):
        trainer.run()
    assert not (tmp_path / "checkpoint-8").exists()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / training.WEIGHTS_FILE).values())


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


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two gloo processes made, each on one batch of every step."""
    import two_processes as program

    folder = tmp_path_factory.mktemp("processes")
    program.save_base(folder / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(folder)]
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
    return folder


def logged(output: Path, name: str) -> list[float]:
    history = json.loads((output / training.STATE_FILE).read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_two_processes_equal_one_with_the_same_global_batch(two_processes: Path, tmp_path: Path) -> None:
    """The other one accumulates two batches."""
    one = stage(options(tmp_path, max_steps=4, gradient_accumulation_steps=2))
    one.run()
    two = load_file(two_processes / "two" / "checkpoint-4" / training.WEIGHTS_FILE)
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, weights_of(one)[name], rtol=1e-5, atol=1e-6)
    for name in ("loss", "error"):
        assert logged(two_processes / "two", name) == pytest.approx(logged(tmp_path, name), rel=1e-2)


def test_two_processes_log_the_rows_and_tokens_of_both(two_processes: Path) -> None:
    """Rates over time would tell nothing here, but one process alone has another number of tokens for a row."""
    rates = zip(*(logged(two_processes / "two", f"{name}_per_second") for name in ("tokens", "rows")), strict=True)
    run = options(two_processes, max_steps=4)
    dataset = BlockDataset(draw, len, run.rows_per_batch, 8, run.seed)
    for step, (tokens, rows) in enumerate(rates):
        batches = [collate(dataset[index])["input_ids"] for index in (2 * step, 2 * step + 1)]
        assert tokens / rows == pytest.approx(sum(map(torch.numel, batches)) / sum(map(len, batches)), rel=0.05)


def test_two_processes_train_the_head_as_one_does(
    two_processes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise of each example, own drafts, evaluation, early stop and the best checkpoint."""
    import two_processes as program

    program.train_head(two_processes / "base", tmp_path, patch=monkeypatch.setattr, gradient_accumulation_steps=2)
    output = two_processes / "two_head"
    for name in ("loss", "diffusion_loss", "eval_seen_loss"):
        assert len(logged(output, name)) == len(logged(tmp_path, name)) == (2 if "eval" in name else 4)
        assert logged(output, name) == pytest.approx(logged(tmp_path, name), rel=2e-3)
    for step in (2, 4):
        file = Path(f"checkpoint-{step}", training.WEIGHTS_FILE)
        one, two = load_file(tmp_path / file), load_file(output / file)
        for name, tensor in two.items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-5)
    best, last = (load_file(output / f"checkpoint-{step}" / training.WEIGHTS_FILE) for step in (2, 4))
    for rank in range(2):
        held = load_file(two_processes / f"head_of_{rank}.safetensors")
        for name, tensor in held.items():
            assert torch.equal(tensor.bfloat16(), best[f"diffusion_head.{name}"].bfloat16())
        assert any(not torch.equal(t.bfloat16(), last[f"diffusion_head.{name}"].bfloat16()) for name, t in held.items())
