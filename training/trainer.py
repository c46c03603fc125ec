"""One training run on the HF `Trainer`, for every stage: options, reproducible batches, optimizers, schedules,
evaluation, checkpoints, throughput and clear errors.

Takes a module whose forward returns an output with `loss`, and a function that draws one example. Knows no stage.
"""

import errno
import json
import logging
import math
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerState, TrainingArguments

from .optimizers import MuonAdamW, cosine, trapezoid
from .records import OnError
from .release import release

logger = logging.getLogger(__name__)

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("trapezoid", "cosine", "one_cycle")
REPORTERS = ("none", "tensorboard", "wandb", "trackio")
MAX_WARMUP_SHARE = 0.1
"""A longer warm-up wastes steps of a short run at learning rates that teach nothing."""
GROUPS_PER_BLOCK = 16
MAX_SPREAD = 16
"""Blocks that neighbouring batches come from: as many processes can draw without drawing the same rows."""
WEIGHTS_FILE = "trainable.safetensors"
STATE_FILE = "trainer_state.json"
COMPLETE_FILE = "complete.json"
"""Written last into a checkpoint; a folder without it was interrupted and is never resumed from."""
TOKENS = ("input_ids", "scaffold_ids")
"""Inputs of a forward that count as its tokens, padding included."""

COUNTER = "early_stopping_patience_counter"
"""Name that transformers keeps the count of early stopping under."""

Example = TypeVar("Example")
Sums = dict[str, tuple[Tensor, Tensor]]
"""Metric name -> (sum, count), which are added up over the batches of all processes between two log lines."""


class TrainingError(RuntimeError):
    """A run cannot go on; the message says why, what is safe and what to do."""


@dataclass(frozen=True)
class RunOptions:
    """Options that every stage has; a stage's own dataclass extends them.

    Args:
        output: folder of checkpoints, logs and result.
        data: folders with `train/`, `text/` and `dev/`; empty = the one beside the repository.
        leave_out: file of records that are not drawn, as `python -m training.audit overlap --drop` writes it.
        on_error: what to do with lines of record files that are no records: "refuse" or "skip".
        max_steps: optimizer steps of the whole run; curriculum and learning rate follow the done part of them.
        rows_per_batch: rows of one forward on average: batches hold rows of similar length at similar cost.
        gradient_accumulation_steps: forwards of one optimizer step, on each process.
        optimizer: "muon" (Muon for matrices, AdamW for the rest) or "adamw".
        schedule: "trapezoid" (up, level, down to zero), "cosine" or "one_cycle".
        lr: peak learning rate of Muon; unused with "adamw".
        adam_lr: peak learning rate of AdamW.
        weight_decay: decoupled.
        warmup_share: part of the steps with rising learning rate, at most 0.1.
        max_grad_norm: gradients are clipped to this norm.
        logging_steps: steps between log lines.
        eval_steps: steps between evaluations; a checkpoint follows each, so that the best one can be loaded.
        save_steps: steps between checkpoints of a run that has no evaluation.
        save_total_limit: checkpoints that are kept, at least 2; the best one is always among them.
        patience: evaluations without a better result after which the run ends; 0 = never.
        bf16: autocast to bfloat16.
        gradient_checkpointing: recompute activations in the backward pass.
        num_workers: processes that draw rows ahead; 0 = draw between the steps. A power of two up to 16, times the
            processes of the run, shares the drawing; other numbers draw some rows more than once.
        seed: of weights, draws and noise.
        threads: CPU threads; 0 = torch's choice.
        report_to: "none", or "tensorboard", "wandb", "trackio" where it is installed.
        resume: go on from the newest whole checkpoint in `output`; false = refuse a folder that has one.
        resume_from: checkpoint to go on from instead, in `output` or elsewhere; `output` must not hold a later one.
        push_to_hub: repo that the result is uploaded to; its README.md is never overwritten.
    """

    output: Path
    data: list[Path] = field(default_factory=list)
    leave_out: Path | None = None
    on_error: OnError = "refuse"
    max_steps: int = 1000
    rows_per_batch: int = 16
    gradient_accumulation_steps: int = 1
    optimizer: str = "muon"
    schedule: str = "trapezoid"
    lr: float = 0.01
    adam_lr: float = 2e-3
    weight_decay: float = 0.0
    warmup_share: float = 0.03
    max_grad_norm: float = 1.0
    logging_steps: int = 25
    eval_steps: int = 250
    save_steps: int = 250
    save_total_limit: int = 2
    patience: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    num_workers: int = 0
    seed: int = 0
    threads: int = 0
    report_to: str = "none"
    resume: bool = True
    resume_from: Path | None = None
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "rows_per_batch", "gradient_accumulation_steps", "eval_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.save_total_limit < 2:
            # The oldest checkpoint is removed before the newest is marked as whole.
            raise ValueError(f"save_total_limit must be at least 2, got {self.save_total_limit}.")
        if self.optimizer not in OPTIMIZERS or self.schedule not in SCHEDULES:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)} (got {self.optimizer!r}) and schedule one of "
                f"{', '.join(SCHEDULES)} (got {self.schedule!r})."
            )
        if self.report_to not in REPORTERS:
            raise ValueError(f"report_to must be one of {', '.join(REPORTERS)}, got {self.report_to!r}.")
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise ValueError(
                f"report_to={self.report_to!r} needs a package that is missing: pip install {self.report_to}."
            )
        if not 0 <= self.warmup_share <= MAX_WARMUP_SHARE:
            raise ValueError(f"warmup_share must be from 0 to {MAX_WARMUP_SHARE}, got {self.warmup_share}.")


class BlockDataset(Dataset[list[Example]], Generic[Example]):
    """Batches of examples of similar cost, each a pure function of (seed, index): a resumed run and one on several
    processes see the same ones.

    A block of rows is drawn at once, sorted by cost and cut into 16 batches so that the dearest batch is as cheap as
    possible; the batches of a block come in random order. Of a long run, neighbouring batches come from up to 16 blocks
    in turn: processes that take every n-th batch then draw blocks of their own.

    Args:
        draw: makes one example; gets the block's source of randomness and the done part of the run in [0, 1).
        cost: of an example, such as its tokens; a batch costs its rows times its dearest row.
        rows_per_batch: on average.
        length: batches.
        seed: of all draws.
    """

    def __init__(
        self,
        draw: Callable[[random.Random, float], Example],
        cost: Callable[[Example], float],
        rows_per_batch: int,
        length: int,
        seed: int,
    ) -> None:
        self.draw, self.cost, self.rows_per_batch, self.length, self.seed = draw, cost, rows_per_batch, length, seed
        self.spread = 1  # a sixteenth of the run at most, since all these blocks are drawn at the same progress
        while self.spread < MAX_SPREAD and length >= 2 * self.spread * 16 * GROUPS_PER_BLOCK:
            self.spread *= 2
        self._blocks: dict[int, list[list[Example]]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Example]:
        part, within = divmod(index, GROUPS_PER_BLOCK * self.spread)
        place, block = divmod(within, self.spread)
        number = part * self.spread + block
        if number not in self._blocks:
            self._blocks = {known: rows for known, rows in self._blocks.items() if known // self.spread == part}
            self._blocks[number] = self._draw_block(number)
        return self._blocks[number][place]

    def _draw_block(self, number: int) -> list[list[Example]]:
        rng = random.Random(f"{self.seed}/{number}")
        progress = min(number // self.spread * self.spread * GROUPS_PER_BLOCK / self.length, 1.0)
        examples = [self.draw(rng, progress) for _ in range(GROUPS_PER_BLOCK * self.rows_per_batch)]
        examples.sort(key=self.cost)
        groups = balanced_groups([self.cost(example) for example in examples], GROUPS_PER_BLOCK)
        rng.shuffle(groups)
        return [examples[group] for group in groups]


def balanced_groups(costs: Sequence[float], count: int) -> list[slice]:
    """Cut a rising sequence into neighbouring groups of similar cost.

    Args:
        costs: cost of each item, rising; a group costs its length times its last item.
        count: groups, at most as many as items.

    Returns:
        `count` slices, none empty.
    """

    def cut(limit: float) -> list[slice]:
        groups: list[slice] = []
        start = 0
        for end in range(2, len(costs) + 1):
            enough_left = len(costs) - end + 1 >= count - len(groups) - 1
            must_start = len(costs) - end + 1 <= count - len(groups) - 1
            if enough_left and (must_start or (end - start) * costs[end - 1] > limit):
                groups.append(slice(start, end - 1))
                start = end - 1
        return [*groups, slice(start, len(costs))]

    low, high = 0.0, len(costs) * float(costs[-1])
    for _ in range(30):  # the least limit that needs no further group
        middle = (low + high) / 2
        low, high = (middle, high) if len(cut(middle)) > count else (low, middle)
    return cut(high)


class EarlyStop(EarlyStoppingCallback):
    """Ends a run that gets no better; a resumed run goes on counting where its checkpoint was."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the count of the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = evaluations_in_vain(state)
        # A checkpoint of a run without patience has no place for the count.
        state.stateful_callbacks.setdefault(EarlyStop.__name__, self.state())


def evaluations_in_vain(state: TrainerState) -> int:
    """Evaluations in a row that brought no better result, as a checkpoint counts them."""
    return int(state.stateful_callbacks.get(EarlyStop.__name__, {}).get("attributes", {}).get(COUNTER, 0))


class StageTrainer(Trainer):
    """`Trainer` for one stage: exact losses over accumulation and processes, own evaluation, small checkpoints.

    Args:
        model: its forward takes a collated batch with `loss_normaliser` replaced by the total of all batches of the
            optimizer step, and returns an output with `loss`. Only parameters that need gradients are trained and
            saved in checkpoints.
        options: of the run.
        dataset: batches.
        collate: makes the keyword arguments of the forward out of a batch of examples; `loss_normaliser` (float
            scalar) is the sum of its weights.
        evaluate: measures the model as it stands; None = never.
        best_metric: name in its result that the best checkpoint has the highest of, with a leading "-" the lowest.
        metric_sums: sums and counts out of a forward's output, logged as means.
    """

    optimizer: Any  # transformers declares the three so that no check of types sees it
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: nn.Module,
        options: RunOptions,
        dataset: BlockDataset[Any],
        collate: Callable[[list[Any]], dict[str, Any]],
        evaluate: Callable[[], dict[str, float]] | None = None,
        best_metric: str = "-loss",
        metric_sums: Callable[[Any], Sums] = lambda output: {},
    ) -> None:
        self.options, self.measure, self.metric_sums = options, evaluate, metric_sums
        self.sums: dict[str, Tensor] = {}
        self.throughput = Throughput()
        torch.manual_seed(options.seed)
        if options.threads:
            torch.set_num_threads(options.threads)
        arguments = training_arguments(options, evaluate is not None, best_metric)
        stop_early = [EarlyStop(options.patience)] if options.patience and evaluate is not None else []
        config = getattr(model, "config", None)
        fields = dict(vars(config)) if config is not None else {}
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=[] if evaluate is not None else None,
            data_collator=lambda batches: collate(batches[0]),
            callbacks=stop_early,
        )
        if config is not None:
            # transformers turns the cache off in the config, which is saved; our forwards say what they need.
            vars(config).pop("use_cache", None)
            vars(config).update({name: value for name, value in fields.items() if name == "use_cache"})
        if options.gradient_checkpointing:
            recompute_activations(model)
        # compute_loss divides by the total of the whole optimizer step; where this is False, training_step divides by
        # the number of accumulated forwards once more.
        self.loss_is_scaled_for_ga = True

    # ------------------------------------------------------------------ batches and loss

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # The dataset is random by itself; its order must be the same for any number of processes.
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        start = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = sum(batch["loss_normaliser"] for batch in batches)
        if batches and self.args.world_size > 1:
            total = self.accelerator.gather(total.to(device)).sum()
        self.throughput.add("data", time.perf_counter() - start)
        return batches, total

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one forward as its share of the whole optimizer step.

        Args:
            model: the model, wrapped when there are several processes.
            inputs: a collated batch.
            return_outputs: also return the output.
            num_items_in_batch: the normaliser of all forwards of this step on all processes; None = of this batch.
        """
        total = inputs["loss_normaliser"] if num_items_in_batch is None else num_items_in_batch
        start = moment()
        output = model(**{**inputs, "loss_normaliser": torch.as_tensor(total, device=self.args.device).clamp_min(1e-6)})
        self.throughput.add("forward", moment() - start)
        for name, pair in self.metric_sums(output).items():
            kept = self.sums.setdefault(name, torch.zeros(2, device=self.args.device))  # read at log lines only
            kept += torch.stack([part.detach().float().to(kept.device) for part in pair])
        # Gradients of several processes are averaged, shares are to be summed.
        loss = output.loss * self.args.world_size
        return (loss, output) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        start = moment()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        tokens = sum(inputs[name].numel() for name in TOKENS if name in inputs)
        self.throughput.count(rows=len(inputs["input_ids"]), tokens=tokens)
        self.throughput.add("step", moment() - start)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the metrics and the throughput since the last line, of all processes together."""
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise self._diverged(f"The loss is {loss}")
        if loss is not None:
            logs = logs | self._means() | self.throughput.flush()
        super().log(logs, *args, **kwargs)

    def _means(self) -> dict[str, float]:
        """Means of the metrics over all processes; this process then counts the rows and tokens of all."""
        sums = {name: kept.tolist() for name, kept in self.sums.items()}
        parts = gather_object([(sums, self.throughput.rows, self.throughput.tokens)])
        self.throughput.rows, self.throughput.tokens = (sum(part[index] for part in parts) for index in (1, 2))
        self.sums.clear()
        totals: dict[str, list[float]] = {}
        for found, _, _ in parts:
            for name, (value, count) in found.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0], total[1] = total[0] + value, total[1] + count
        return {name: round(value / max(count, 1e-9), 4) for name, (value, count) in totals.items()}

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.state.global_step}: the run diverged. Lower lr and adam_lr; "
            f"{self._safe_checkpoint()}"
        )

    def _check_weights(self) -> None:
        """Refuse to evaluate or save a diverged model, which log lines, being fewer than steps, may not have shown."""
        trained = [split_part(p).isfinite().all() for p in self.model.parameters() if p.requires_grad]
        if not torch.stack(trained).all():
            raise self._diverged("Some weights are not finite")

    # ------------------------------------------------------------------ optimizer and schedule

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Muon + AdamW, or AdamW alone, over the parameters that need gradients."""
        if self.optimizer is None:
            options = self.options
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            if not named:
                raise ValueError("No parameter of the model needs gradients, so there is nothing to train.")
            if options.optimizer == "muon":
                if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                    raise TrainingError(
                        "Muon turns whole matrices, and FSDP and DeepSpeed give each process a part of them: pass "
                        "--optimizer adamw."
                    )
                self.optimizer = MuonAdamW(named, options.lr, options.adam_lr, weight_decay=options.weight_decay)
            else:
                parameters = [parameter for _, parameter in named]
                self.optimizer = torch.optim.AdamW(
                    parameters, options.adam_lr, betas=(0.9, 0.95), weight_decay=options.weight_decay
                )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """The learning-rate shape of the options over the steps of the run."""
        if self.lr_scheduler is None:
            optimizer, warmup = optimizer or self.optimizer, self.options.warmup_share
            if self.options.schedule == "one_cycle":
                peaks = [group["lr"] for group in optimizer.param_groups]
                self.lr_scheduler = OneCycleLR(
                    optimizer, peaks, num_training_steps + 1, pct_start=max(warmup, 1e-3), cycle_momentum=False
                )
            else:
                cosinal = self.options.schedule == "cosine"

                def factor(step: int) -> float:
                    progress = (step + 1) / (num_training_steps + 1)
                    return cosine(progress, warmup) if cosinal else trapezoid(progress, warmup, hold=0.4)

                self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Run the stage's own evaluation, log it and tell the callbacks, such as early stopping."""
        if self.measure is None:
            raise ValueError("This run has no evaluation; pass `evaluate` to StageTrainer.")
        self._check_weights()
        start = time.perf_counter()
        mode = self.model.training
        self.model.eval()
        with torch.no_grad():
            found = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        self.model.train(mode)
        self.log(found | {f"{metric_key_prefix}_seconds": round(time.perf_counter() - start, 1)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # ------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        states = state_dict if state_dict is not None else self.model.state_dict()
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        save_file({n: t.detach().cpu().contiguous() for n, t in states.items() if n in trained}, folder / WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_trained(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("best checkpoint: %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        self._load_trained(Path(self.state.best_model_checkpoint))

    def _load_trained(self, folder: Path) -> None:
        states = load_file(folder / WEIGHTS_FILE)
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        shapes = {(name, tuple(tensor.shape)) for name, tensor in states.items()}
        differing = sorted(shapes ^ {(name, tuple(parameter.shape)) for name, parameter in parameters.items()})
        if differing:
            name, shape = differing[0]
            raise TrainingError(
                f"{folder / WEIGHTS_FILE} does not fit this model: {len(differing)} parameters stand on one side only, "
                f"first {name} {list(shape)}. Use the options of the run that wrote it, or another --output."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(split_like(states[name], parameter))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._check_weights()
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE_FILE).write_text(json.dumps({"step": self.state.global_step}), encoding="utf-8")

    def _safe_checkpoint(self) -> str:
        last = last_checkpoint(Path(self.args.output_dir))
        if last is None:
            return "no checkpoint was written yet."
        command = "the same command" + (" without resume_from" if self.options.resume_from else "")
        return f"{last} is whole, and {command} goes on from it."

    def push_to_hub(self, repo_id: str | None = None) -> str | None:
        """Release what the stage has saved in `output/final`; of several processes the first one does.

        transformers' own would upload the folder of the run: the trained part without its code, logs, and the options
        as a pickle.

        Args:
            repo_id: "owner/name"; None = `push_to_hub` of the options.

        Returns:
            Address of the release, on the process that made it.

        Raises:
            FileNotFoundError, ValueError: as in `training.release.release`, or no repo is named.
        """
        repo_id = repo_id or self.options.push_to_hub
        if repo_id is None:
            raise ValueError("No repo to push to is named: pass repo_id, or set push_to_hub of the options.")
        if not self.is_world_process_zero():
            return None
        return release(Path(self.args.output_dir) / "final", repo_id)

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train from the newest whole checkpoint, or the one that is asked for, to the end, and load the best weights.

        Raises:
            TrainingError: no memory, no disk space, a diverged loss, or checkpoints that do not fit.
        """
        output, start = Path(self.args.output_dir), self._start()
        if self.args.should_save:
            remove_partial(output)
        self.accelerator.wait_for_everyone()
        with self._explained():
            if start is None or not self._ended_early(start):
                self.train(resume_from_checkpoint=str(start) if start is not None else None)
            if self.is_fsdp_enabled:
                gather_parameters(self.model)
            if self.args.should_save:
                self.state.save_to_json(str(output / STATE_FILE))

    def _start(self) -> Path | None:
        """The checkpoint to go on from; None = the beginning."""
        output, chosen = Path(self.args.output_dir), self.options.resume_from
        last = last_checkpoint(output)
        if last is not None and not self.options.resume:
            raise TrainingError(f"{output} holds {last.name}, and resume is off: use another --output or remove it.")
        if chosen is None:
            return last
        if not (chosen / COMPLETE_FILE).exists():
            raise TrainingError(f"{chosen} is no whole checkpoint: it has no {COMPLETE_FILE}. Name another folder.")
        if last is not None and step_of(last) > step_of(chosen):
            raise TrainingError(
                f"{output} holds {last.name}, which is later than {chosen}: leave out --resume_from to go on from it, "
                "or use another --output."
            )
        return chosen

    def _ended_early(self, start: Path) -> bool:
        """Whether early stopping had ended the run at this checkpoint; its best weights are loaded then."""
        state = TrainerState.load_from_json(str(start / STATE_FILE))
        stops = any(isinstance(callback, EarlyStop) for callback in self.callback_handler.callbacks)
        if not stops or evaluations_in_vain(state) < self.options.patience or state.best_model_checkpoint is None:
            return False
        logger.info(
            "the run ended at step %d: no better result in %d evaluations", state.global_step, self.options.patience
        )
        self.state = state
        self._load_best_model()
        return True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what usually ends a run into a message that says what is safe and what to do."""
        try:
            yield
        except KeyboardInterrupt:
            logger.error("interrupted at step %d; %s", self.state.global_step, self._safe_checkpoint())
            raise
        except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise TrainingError(
                    f"Out of memory at step {self.state.global_step}: lower rows_per_batch "
                    f"({self.options.rows_per_batch}) and raise gradient_accumulation_steps "
                    f"({self.options.gradient_accumulation_steps}) by the same factor, or switch on bf16 or "
                    f"gradient_checkpointing; {self._safe_checkpoint()}"
                ) from error
            if is_disk_full(error):
                raise TrainingError(
                    f"No space left on the disk of {self.args.output_dir} at step {self.state.global_step}: free some "
                    f"or lower save_total_limit ({self.options.save_total_limit}); {self._safe_checkpoint()}"
                ) from error
            raise


def training_arguments(options: RunOptions, evaluates: bool, best_metric: str) -> TrainingArguments:
    """The options in the words of `TrainingArguments`."""
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.max_steps,
        per_device_train_batch_size=1,  # an item of the dataset is a whole batch
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        max_grad_norm=options.max_grad_norm,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a diverged run ends
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.eval_steps,
        save_steps=options.eval_steps if evaluates else options.save_steps,
        save_total_limit=options.save_total_limit,
        load_best_model_at_end=evaluates,
        metric_for_best_model=best_metric.lstrip("-") if evaluates else None,
        greater_is_better=not best_metric.startswith("-") if evaluates else None,
        bf16=options.bf16,
        dataloader_num_workers=options.num_workers,
        report_to=options.report_to,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if world_size() > 1 and not torch.cuda.is_available() else None,
        seed=options.seed,
    )
    # Several devices are several processes; threads that share one model would split batches that must stay whole.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def recompute_activations(model: nn.Module) -> None:
    """Switch on gradient checkpointing in the transformers models of a module, under the name their version has."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            enable()


def split_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of a parameter: all of it, unless FSDP split the parameter."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def split_part(parameter: Tensor) -> Tensor:
    """What this process has of a parameter: all of it, unless FSDP split the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def gather_parameters(model: nn.Module) -> None:
    """Turn a model that FSDP split into a plain one, on every process; it can be saved, but not trained further."""
    whole: dict[Tensor, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    whole[parameter] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                setattr(module, name, whole[parameter])
        if isinstance(module, FSDPModule):
            # Its own class refuses to change the dtype of parameters that it has not split.
            own: Any = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
            module.__class__ = own


class Throughput:
    """Counts rows, tokens and where the seconds of this process go between two log lines."""

    def __init__(self) -> None:
        self.start, self.rows, self.tokens = time.perf_counter(), 0, 0
        self.seconds: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        """Count seconds of a part: "data", "forward" or "step" (forward and backward)."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def count(self, rows: int, tokens: int) -> None:
        """Count rows of one forward and its tokens: prompt and scaffold once each, padding included."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens

    def flush(self) -> dict[str, float]:
        """Rates since the last call, the share of each part in percent and the peak memory in MiB; starts anew."""
        passed = max(time.perf_counter() - self.start, 1e-9)
        parts = {name: round(100 * seconds / passed) for name, seconds in self.seconds.items()}
        step, forward = parts.pop("step", 0), parts.get("forward", 0)
        shares = parts | {"backward": step - forward}
        shares["rest"] = max(0, 100 - sum(shares.values()))  # optimizer, evaluation, checkpoints
        found = {
            "tokens_per_second": round(self.tokens / passed),
            "rows_per_second": round(self.rows / passed, 2),
            "peak_mib": round(peak_memory() / 2**20),
            **{f"percent_{name}": share for name, share in shares.items()},
        }
        self.__init__()  # type: ignore[misc]
        return found


def moment() -> float:
    """Seconds of a clock, read when a GPU has finished what it was given; else its work would count as a later part."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def own_device() -> torch.device:
    """The GPU of this process, or else the CPU, before a trainer moves the model there."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def world_size() -> int:
    """Processes of this run, as `torchrun` and `accelerate launch` tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def peak_memory() -> int:
    """Most memory used so far in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a folder that was written to its end."""
    whole = [folder for folder in output.glob("checkpoint-*") if (folder / COMPLETE_FILE).exists()]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def step_of(checkpoint: Path) -> int:
    """Steps behind a whole checkpoint."""
    return int(json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))["step"])


def remove_partial(output: Path) -> None:
    """Remove checkpoints that were interrupted while they were written."""
    for folder in output.glob("checkpoint-*"):
        if not (folder / COMPLETE_FILE).exists():
            logger.warning("%s was not written to its end and is removed", folder)
            shutil.rmtree(folder)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU, whose allocator raises a plain RuntimeError."""
    text = str(error).lower()
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or "out of memory" in text or "can't allocate memory" in text


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because no space, or no quota, is left; torch's writer of archives names no errno."""
    numbers, words = (errno.ENOSPC, errno.EDQUOT), ("no space left", "unexpected pos ", "iostream error")
    return getattr(error, "errno", None) in numbers or any(part in str(error).lower() for part in words)
