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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments

from .optimizers import MuonAdamW, cosine, trapezoid
from .records import OnError

logger = logging.getLogger(__name__)

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("trapezoid", "cosine", "one_cycle")
REPORTERS = ("none", "tensorboard", "wandb", "trackio")
MAX_WARMUP_SHARE = 0.1
"""A longer warm-up wastes steps of a short run at learning rates that teach nothing."""
GROUPS_PER_BLOCK = 16
WEIGHTS_FILE = "trainable.safetensors"
COMPLETE_FILE = "complete.json"
"""Written last into a checkpoint; a folder without it was interrupted and is never resumed from."""

Example = TypeVar("Example")
Sums = dict[str, tuple[Tensor, Tensor]]
"""Metric name -> (sum, count), so that batches and processes add up."""


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
        logging_steps, eval_steps, save_steps: steps between log lines, evaluations and checkpoints; checkpoints fall
            on evaluations.
        save_total_limit: checkpoints that are kept; the best one is always among them.
        patience: evaluations without a better result after which the run ends; 0 = never.
        bf16: autocast to bfloat16.
        gradient_checkpointing: recompute activations in the backward pass.
        num_workers: processes that draw rows ahead; 0 = draw between the steps.
        seed: of weights, draws and noise.
        threads: CPU threads; 0 = torch's choice.
        report_to: "none", or "tensorboard", "wandb", "trackio" where it is installed.
        resume: go on from the newest whole checkpoint in `output`; false = refuse a folder that has one.
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
    save_steps: int = 500
    save_total_limit: int = 2
    patience: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    num_workers: int = 0
    seed: int = 0
    threads: int = 0
    report_to: str = "none"
    resume: bool = True
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "rows_per_batch", "gradient_accumulation_steps", "eval_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
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
        if self.save_steps % self.eval_steps:
            raise ValueError(
                f"save_steps ({self.save_steps}) must be a multiple of eval_steps ({self.eval_steps}), since the best "
                "checkpoint is chosen by its evaluation."
            )


class BlockDataset(Dataset[list[Example]], Generic[Example]):
    """Batches of examples of similar cost, each a pure function of (seed, index): a resumed run and one on several
    processes see the same ones.

    A block of rows is drawn at once, sorted by cost and cut into 16 batches so that the dearest batch is as cheap as
    possible; the batches of a block come in random order.

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
        self._block: tuple[int, list[list[Example]]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Example]:
        number, place = divmod(index, GROUPS_PER_BLOCK)
        if self._block[0] != number:
            self._block = (number, self._draw_block(number))
        return self._block[1][place]

    def _draw_block(self, number: int) -> list[list[Example]]:
        rng = random.Random(f"{self.seed}/{number}")
        progress = min(number * GROUPS_PER_BLOCK / self.length, 1.0)
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
        self.sums: dict[str, list[Tensor]] = {}
        self.throughput = Throughput()
        torch.manual_seed(options.seed)
        if options.threads:
            torch.set_num_threads(options.threads)
        arguments = training_arguments(options, evaluate is not None, best_metric)
        stop_early = [EarlyStoppingCallback(options.patience)] if options.patience and evaluate is not None else []
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=[] if evaluate is not None else None,
            data_collator=lambda batches: collate(batches[0]),
            callbacks=stop_early,
        )
        if options.gradient_checkpointing:
            recompute_activations(model)
        # The loss is divided by the total of the whole optimizer step, so nothing is left to scale.
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
        start = time.perf_counter()
        output = model(**{**inputs, "loss_normaliser": torch.as_tensor(total, device=self.args.device).clamp_min(1e-6)})
        self.throughput.add("forward", time.perf_counter() - start)
        for name, (value, count) in self.metric_sums(output).items():
            kept = self.sums.setdefault(name, [torch.zeros(()), torch.zeros(())])
            kept[0] += value.detach().float().cpu()
            kept[1] += count.detach().float().cpu()
        # Gradients of several processes are averaged, shares are to be summed.
        loss = output.loss * self.args.world_size
        return (loss, output) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        start = time.perf_counter()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim >= 2]
        self.throughput.count(rows=len(tensors[0]), tokens=inputs["input_ids"].numel())
        self.throughput.add("step", time.perf_counter() - start)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the metrics and the throughput since the last line."""
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss} at step {self.state.global_step}: the run diverged. Lower lr and adam_lr; "
                f"{self._safe_checkpoint()}"
            )
        if loss is not None:
            means = {name: float(value / count.clamp_min(1e-9)) for name, (value, count) in self.sums.items()}
            logs = logs | {name: round(mean, 4) for name, mean in means.items()} | self.throughput.flush()
            self.sums.clear()
        super().log(logs, *args, **kwargs)

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
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE_FILE).write_text(json.dumps({"step": self.state.global_step}), encoding="utf-8")

    def _safe_checkpoint(self) -> str:
        last = last_checkpoint(Path(self.args.output_dir))
        if last is None:
            return "no checkpoint was written yet."
        return f"{last} is whole, and the same command goes on from it."

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train from the newest whole checkpoint to the end, with the best weights loaded there.

        Raises:
            TrainingError: no memory, no disk space, a diverged loss, or checkpoints that do not fit.
        """
        output = Path(self.args.output_dir)
        last = last_checkpoint(output)
        if last is not None and not self.options.resume:
            raise TrainingError(f"{output} holds {last.name}, and resume is off: use another --output or remove it.")
        if self.args.should_save:
            remove_partial(output)
        self.accelerator.wait_for_everyone()
        with self._explained():
            self.train(resume_from_checkpoint=str(last) if last is not None else None)
        if self.is_fsdp_enabled:
            gather_parameters(self.model)
        if self.args.should_save:
            self.state.save_to_json(str(output / "trainer_state.json"))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what usually ends a run into a message that says what is safe and what to do."""
        try:
            yield
        except KeyboardInterrupt:
            logger.error("interrupted at step %d; %s", self.state.global_step, self._safe_checkpoint())
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"Out of memory at step {self.state.global_step}: lower rows_per_batch "
                f"({self.options.rows_per_batch}) and raise gradient_accumulation_steps "
                f"({self.options.gradient_accumulation_steps}) by the same factor, or switch on bf16 or "
                f"gradient_checkpointing; {self._safe_checkpoint()}"
            ) from error
        except (OSError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            raise TrainingError(
                f"No space left on the disk of {self.args.output_dir} at step {self.state.global_step}: free some or "
                f"lower save_total_limit ({self.options.save_total_limit}); {self._safe_checkpoint()}"
            ) from error


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
        save_steps=options.save_steps,
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
    """Counts rows, tokens and where the seconds go between two log lines."""

    def __init__(self) -> None:
        self.start, self.rows, self.tokens = time.perf_counter(), 0, 0
        self.seconds: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        """Count seconds of a part: "data", "forward" or "step" (forward and backward)."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def count(self, rows: int, tokens: int) -> None:
        """Count rows and padded tokens of one forward."""
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
    """Whether a write failed because no space, or no quota, is left."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or "no space left" in str(error).lower()
