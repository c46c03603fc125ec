"""Training of the diffusion head on a frozen base.

Takes rows of `training.data` that are one call each; gives a self-contained checkpoint of base and head. The steps are
those of `training.trainer`; what is measured between them is in `training.head_evaluation`.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from repo_package import load_repo_module

from .base import draw_style
from .data import DEFAULT_DATA, MAX_MISSES, Row, RowStream, SingleCall, is_simple, single_call
from .features import FeatureCache
from .head_evaluation import HeadEvaluation, evaluation_sets
from .records import RecordError
from .stage_model import check_quantization, loading_arguments, on_device, to_saved_precision, trained_beside_its_base
from .trainer import BlockDataset, RunOptions, StageTrainer, Sums, world_size

modeling = load_repo_module("modeling_smollm_diffusion")
objective = load_repo_module("denoising_loss")
noise = load_repo_module("noise_schedule")
scaffolds = load_repo_module("schema_scaffold")
layouts = load_repo_module("scaffold_layout")
grammar = load_repo_module("slot_grammar")

logger = logging.getLogger(__name__)

STRING_BUDGETS = (8, 16, 16, 16, 32)
NUMBER_BUDGETS = (8, 12, 12)
ARRAY_BUDGETS = (2, 4, 4)
"""Budgets are drawn from these whatever the gold value's length, so that a slot's width tells nothing about it, and
anew whenever a record is drawn, so that no width belongs to a record."""
BUDGETS = ("drawn", "fixed")

MAX_SCAFFOLD = 320
"""Canvases of more positions are drawn past."""

SLOT_KINDS = ("any", "string", "integer", "number")
"""Kinds of positions that the constraint loss tells apart. Fixed text and closed slots are "any": a closed slot's
confidence is taken among its choices alone, so mass beside them does not count."""


@dataclass(frozen=True)
class ObjectiveRun(RunOptions):
    """Options of every stage that trains on the head's objective.

    Args:
        noise_samples: noise draws per prompt, which share its forward of the base.
        noise_schedule, loss_weighting, null_loss_weight, null_prediction_penalty, label_smoothing,
        constraint_loss_weight: the objective, as in the model's config. Plain cross-entropy is the default, since it
            keeps confidences calibrated, and it is confidence that the remasking reads.
        own_draft_share: part of the noise draws in which some of the tokens in place are what the head drafts itself.
        tail_share: part of the NULLs behind a value's end that is scored.
        budgets: widths of slots: "drawn" anew for every example, or "fixed" to those of the model's config.
        quantization: "4bit" or "8bit" loads the frozen base so, with bitsandbytes; "none" in float32.
        head_only: save the head alone; loading then fetches the base from where the model's config points.
        eval_rows: held-out requests of each set that the loss and one-step drafts are measured on; 0 = no evaluation.
        acceptance_rows: of those, how many are generated to see what the base accepts.
    """

    noise_samples: int = 3
    noise_schedule: str = "log_linear"
    loss_weighting: str = "none"
    null_loss_weight: float = 0.1
    null_prediction_penalty: float = 0.0
    label_smoothing: float = 0.0
    constraint_loss_weight: float = 0.0
    own_draft_share: float = 0.0
    tail_share: float = 0.15
    budgets: str = "drawn"
    quantization: str = "none"
    head_only: bool = False
    eval_rows: int = 64
    acceptance_rows: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_quantization(self.quantization)
        for name in ("own_draft_share", "tail_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        if self.budgets not in BUDGETS:
            raise ValueError(f"budgets must be one of {', '.join(BUDGETS)}, got {self.budgets!r}.")
        if self.noise_samples < 1:
            raise ValueError(f"noise_samples must be at least 1, got {self.noise_samples}.")
        if self.null_loss_weight <= 0:
            raise ValueError(
                f"null_loss_weight must be above 0, got {self.null_loss_weight}: without it the head does not learn "
                "where values end."
            )


@dataclass(frozen=True)
class HeadRun(ObjectiveRun):
    """Options of one run; each is an argument of `train_hf.py --stage head`.

    Args:
        base: folder or repo of the frozen base; "" = that of `head_from`, which is then trained on as it is: its config
            says size and limits.
        head_from: folder or repo of a trained model whose head is the start, such as that on an earlier base; None =
            fresh weights.
        head_hidden_size, head_num_layers, head_num_heads: size of the head.
        field_mask, scaffold_features: what slots see of each other, and whether the base reads the scaffold too, as in
            the model's config.
        max_value_tokens, max_call_tokens: where a generated value and a generated call come to an end, as in the
            model's config; the less a base writes on purpose, the earlier its runaway values should end.
        feature_cache: folder for features of the base, computed once; None = the base is run in every step. It saves
            nothing where `scaffold_features` is "base", since the base then reads the prompt with the scaffold.
        cached_prompts: with a feature cache, size of the fixed set of prompts that is trained on.
    """

    base: str = ""
    head_from: str | None = None
    head_hidden_size: int = 256
    head_num_layers: int = 3
    head_num_heads: int = 8
    field_mask: str = "full"
    scaffold_features: str = "head"
    max_value_tokens: int = 256
    max_call_tokens: int = 1024
    feature_cache: Path | None = None
    cached_prompts: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cached_prompts < 1:
            raise ValueError(f"cached_prompts must be at least 1, got {self.cached_prompts}.")


OBJECTIVE_FIELDS = (
    "noise_schedule",
    "loss_weighting",
    "null_loss_weight",
    "null_prediction_penalty",
    "label_smoothing",
    "constraint_loss_weight",
)
"""Options of the run that are fields of the model's config."""


# ---------------------------------------------------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadExample:
    """One prompt and the clean canvas of its call.

    Args:
        prompt_ids: int64 [prompt].
        scaffold_ids: int64 [positions], fixed text, values and NULL.
        slot_mask: bool [positions], the slots.
        loss_weights: float32 [positions].
        field_ids: int64 [positions], the number of the slot that a position belongs to, -1 for fixed text.
        slot_kinds: int64 [positions], index into `SLOT_KINDS`.
        seed: of the example's noise.
        soft_ids, soft_probs: int64 and float32 [positions, k], what a teacher expects; None without teacher.
    """

    prompt_ids: Tensor
    scaffold_ids: Tensor
    slot_mask: Tensor
    loss_weights: Tensor
    field_ids: Tensor
    slot_kinds: Tensor
    seed: int
    soft_ids: Tensor | None = None
    soft_probs: Tensor | None = None


def draw_canvas(
    call: SingleCall, vocabulary: Any, config: Any, rng: random.Random, fixed: bool = False
) -> tuple[Any, list[str | None]] | None:
    """The canvas of a call with drawn budgets, and the gold text of each slot.

    Args:
        call: prompt, tool and gold arguments.
        vocabulary: `slot_grammar.Vocabulary` of the tokenizer.
        config: the model's config: ids of MASK and NULL, fixed budgets.
        rng: draws the budgets.
        fixed: take the budgets of the config instead.

    Returns:
        Canvas and texts (None where a slot is not alive), or None where the schema or the arguments are not supported.
    """
    tool = {"type": "function", "function": {"name": call.name, "parameters": call.schema}}
    try:
        array_budget = config.array_budget if fixed else rng.choice(ARRAY_BUDGETS)
        layout = layouts.draft_layout(scaffolds.compile_scaffold(tool), array_budget)
        texts = layout.texts(call.arguments) if layout is not None else []
    except ValueError:
        return None
    if not texts:
        return None
    strings = (config.string_budget,) if fixed else STRING_BUDGETS
    numbers = (config.number_budget,) if fixed else NUMBER_BUDGETS
    budgets = [rng.choice(strings if slot.leaf.kind == "string" else numbers) for slot in layout.slots]
    return grammar.build_canvas(vocabulary, layout, budgets, config.mask_token_id, config.null_token_id), texts


def canvas_example(
    prompt_ids: Sequence[int],
    canvas: Any,
    texts: Sequence[str | None],
    config: Any,
    rng: random.Random,
    tail_share: float = ObjectiveRun.tail_share,
) -> HeadExample:
    """The clean canvas that the head learns to restore.

    Args:
        prompt_ids: tokens up to and including the generation prompt.
        canvas: `slot_grammar.Canvas` of the call.
        texts: gold text of each of its slots, None where it is not alive.
        config: the model's config: ids of MASK and NULL, weight of NULL.
        rng: draws which NULLs are scored, and the seed of the noise.
        tail_share: part of the NULLs behind a value's end that is scored.
    """
    scaffold_ids = canvas.token_ids.clone()
    slot_mask = scaffold_ids == config.mask_token_id
    loss_weights, field_ids = torch.ones(len(scaffold_ids)), torch.full_like(scaffold_ids, -1)
    slot_kinds = torch.zeros_like(scaffold_ids)
    for index, (slot, text) in enumerate(zip(canvas.slots, texts, strict=True)):
        tokens = canvas.tokens_of(slot, text)
        scaffold_ids[slot.positions] = tokens
        field_ids[slot.positions] = index
        if slot.slot.leaf.kind in SLOT_KINDS:
            slot_kinds[slot.positions] = SLOT_KINDS.index(slot.slot.leaf.kind)
        content = int((tokens != config.null_token_id).sum())
        # The first NULL ends the value and counts like content. Of the tail behind it, most of the canvas, a part
        # stands for the whole.
        for position in range(slot.start + content, slot.start + slot.length):
            ends = text is not None and position == slot.start + content
            kept = ends or rng.random() < tail_share
            loss_weights[position] = 1 / config.null_loss_weight if ends else float(kept)
    return HeadExample(
        prompt_ids=torch.tensor(prompt_ids),
        scaffold_ids=scaffold_ids,
        slot_mask=slot_mask,
        loss_weights=loss_weights,
        field_ids=field_ids,
        slot_kinds=slot_kinds,
        seed=rng.getrandbits(48),
    )


def head_example(
    call: SingleCall, vocabulary: Any, config: Any, rng: random.Random, run: ObjectiveRun
) -> HeadExample | None:
    """Lay a call out as an example; see `draw_canvas` and `canvas_example`.

    Returns:
        The example, or None where the schema or the arguments are not supported, or the canvas is too long.
    """
    drawn = draw_canvas(call, vocabulary, config, rng, run.budgets == "fixed")
    if drawn is None or len(drawn[0].token_ids) > MAX_SCAFFOLD:
        return None
    return canvas_example(call.prompt_ids, *drawn, config, rng, run.tail_share)


def first_example(draw: Callable[[], tuple[Any, "HeadExample | None"]]) -> tuple[Any, "HeadExample"]:
    """Draw until there is an example.

    Args:
        draw: gives what was drawn, and its example if it has one.

    Raises:
        RecordError: of `MAX_MISSES` draws none has an example.
    """
    for _ in range(MAX_MISSES):
        drawn, example = draw()
        if example is not None:
            return drawn, example
    raise RecordError(
        f"of {MAX_MISSES} drawn calls none can be drafted: their schemas are not supported, or their canvases are "
        f"longer than {MAX_SCAFFOLD} positions; use other data"
    )


def call_stream(run: ObjectiveRun, tokenizer: PreTrainedTokenizerFast) -> RowStream:
    """The rows of the run's data that are one call each."""
    return RowStream(
        run.data or DEFAULT_DATA, tokenizer, keep=is_simple, leave_out=run.leave_out, on_error=run.on_error
    )


def kind_tokens(vocabulary: Any) -> Tensor:
    """Tokens that can occur in a slot of each kind: bool [len(SLOT_KINDS), vocab + 2], NULL among them.

    They are those that the automaton of the kind's unrestricted schema accepts in some state; patterns and bounds of a
    schema forbid more, which only the commit knows.
    """
    allowed = torch.ones(len(SLOT_KINDS), vocabulary.size + 2, dtype=torch.bool)
    allowed[:, vocabulary.size] = False  # MASK
    for index, kind in enumerate(SLOT_KINDS[1:], start=1):
        schema = {"type": "object", "properties": {"value": {"type": kind}}, "required": ["value"]}
        tool = {"type": "function", "function": {"name": "kinds", "parameters": schema}}
        (slot,) = layouts.draft_layout(scaffolds.compile_scaffold(tool), 1).slots
        lifted = vocabulary.lift(slot.leaf.automaton)
        allowed[index, : vocabulary.size] = torch.from_numpy(lifted.token_class != 0)
    return allowed


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadCollator:
    """Pads examples on the right into the keyword arguments of the model's training forward, noise included.

    Args:
        config: the model's config.
        pad_id: token at padding.
        noise_samples: noise draws per example.
        own_draft_share: part of the draws with own drafts in them.
        kinds: from `kind_tokens`; None without constraint loss.
        features: features of all prompts; None = the model runs its base.
    """

    config: Any
    pad_id: int
    noise_samples: int
    own_draft_share: float = 0.0
    kinds: Tensor | None = None
    features: FeatureCache | None = None

    def __call__(self, examples: Sequence[HeadExample]) -> dict[str, Any]:
        """One batch; a function of the examples alone."""
        prompts = [example.prompt_ids for example in examples]
        batch: dict[str, Any] = {
            "input_ids": _pad(prompts, self.pad_id),
            "attention_mask": _pad([torch.ones_like(prompt) for prompt in prompts], 0),
            "scaffold_ids": _pad([example.scaffold_ids for example in examples], self.pad_id),
            "scaffold_mask": _pad([torch.ones_like(example.slot_mask) for example in examples], False),
            "slot_mask": _pad([example.slot_mask for example in examples], False),
            "loss_weights": _pad([example.loss_weights for example in examples], 0.0),
            "field_ids": _pad([example.field_ids for example in examples], -1),
            "noise_samples": self.noise_samples,
        }
        batch |= self._noise(examples)
        if self.kinds is not None:
            batch |= {
                "slot_kinds": _pad([example.slot_kinds for example in examples], 0),
                "kind_tokens": self.kinds,
            }
        if any(example.soft_ids is not None for example in examples):
            batch |= _soft_targets(examples)
        if self.features is not None:
            batch["prompt_features"] = _pad([self.features.get(prompt.tolist()) for prompt in prompts], 0.0)
        drawn = {name: batch[name].repeat_interleave(self.noise_samples, dim=0) for name in _NORMALISED}
        batch["loss_normaliser"] = objective.loss_normaliser(
            self.config, *(drawn[name] for name in _NORMALISED), batch["noise_mask"]
        )
        return batch

    def _noise(self, examples: Sequence[HeadExample]) -> dict[str, Tensor]:
        """Noise of each example; its times are spread over the batch, all else is drawn by its own seed."""
        schedule = noise.build_schedule(self.config.noise_schedule, self.config.noise_eps)
        drawn = [
            noise.example_noise(
                example.slot_mask,
                self.noise_samples,
                schedule,
                self.config.noise_eps,
                noise.low_discrepancy(index, examples[0].seed),
                example.seed,
                self.own_draft_share,
            )
            for index, example in enumerate(examples)
        ]
        found = {
            "noise_times": torch.cat([one.times for one in drawn]),
            "noise_mask": _pad([row for one in drawn for row in one.masked], False),
        }
        if self.own_draft_share > 0:
            found["own_mask"] = _pad([row for one in drawn for row in one.own], False)
        return found


_NORMALISED = ("scaffold_ids", "loss_weights", "slot_mask")


def _pad(tensors: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)


def _soft_targets(examples: Sequence[HeadExample]) -> dict[str, Tensor]:
    """`soft_ids` and `soft_probs` of a batch; an example without them says nothing."""
    width = max(example.soft_ids.shape[1] for example in examples if example.soft_ids is not None)
    ids, probs = [], []
    for example in examples:
        if example.soft_ids is None or example.soft_probs is None:
            ids.append(torch.zeros(len(example.scaffold_ids), width, dtype=torch.long))
            probs.append(torch.zeros(len(example.scaffold_ids), width))
        else:
            missing = (0, width - example.soft_ids.shape[1])
            ids.append(torch.nn.functional.pad(example.soft_ids, missing))
            probs.append(torch.nn.functional.pad(example.soft_probs, missing))
    return {"soft_ids": _pad(ids, 0), "soft_probs": _pad(probs, 0.0)}


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

ExampleDraw = Callable[[random.Random, float], HeadExample]
"""Draws an example at a point of the run in [0, 1)."""


class GoldExamples:
    """Draws gold calls in the mixed prompt styles of the base's curriculum.

    Args:
        run: data and seed.
        tokenizer: the model's tokenizer.
        vocabulary: `slot_grammar.Vocabulary` of it.
        config: the model's config.
        fixed: size of a fixed set of prompts, as a feature cache needs it; 0 = each draw is a fresh one.
    """

    def __init__(
        self, run: ObjectiveRun, tokenizer: PreTrainedTokenizerFast, vocabulary: Any, config: Any, fixed: int = 0
    ) -> None:
        self.run, self.vocabulary, self.config = run, vocabulary, config
        self.stream = call_stream(run, tokenizer)
        rng = random.Random(f"{run.seed}/prompts")
        self.rows = [self._row(rng)[0] for _ in range(fixed)]

    def __call__(self, rng: random.Random, progress: float) -> HeadExample:
        """Draw one; its prompt style does not follow the progress, since the base knows all of them."""
        if not self.rows:
            return self._row(rng)[1]
        return first_example(lambda: self._with_example(rng.choice(self.rows), rng))[1]

    def _row(self, rng: random.Random) -> tuple[Row, HeadExample]:
        return first_example(lambda: self._with_example(self.stream.draw(draw_style(rng, rng.random()), rng), rng))

    def _with_example(self, row: Row, rng: random.Random) -> tuple[Row, HeadExample | None]:
        call = single_call(row)
        return row, None if call is None else head_example(call, self.vocabulary, self.config, rng, self.run)


def example_cost(example: HeadExample) -> int:
    """What an example costs: the base reads its prompt, the head its canvas several times."""
    return len(example.prompt_ids) + 2 * len(example.scaffold_ids)


def metric_sums(output: Any) -> Sums:
    """Sums and counts of what is logged while training."""
    return dict(objective.ratios(output.sums))


OF_CONFIG = (
    "head_hidden_size",
    "head_num_layers",
    "head_num_heads",
    "field_mask",
    "scaffold_features",
    "max_value_tokens",
    "max_call_tokens",
)
"""Options of the run that a new model's config takes over."""


def fresh_model(run: HeadRun) -> Any:
    """The model to train, in float32: a head on the run's base, fresh or that of `head_from`, or all of `head_from`.

    Raises:
        ValueError: the run names no model to start from, or the head of `head_from` has another shape.
    """
    if not run.base:
        return known_model(run)
    torch.manual_seed(run.seed)
    model = modeling.SmolLMDiffusionForCausalLM.from_base(
        run.base, **loading_arguments(run.quantization, run.bf16), **{name: getattr(run, name) for name in OF_CONFIG}
    )
    if run.head_from is not None:
        trained = modeling.SmolLMDiffusionForCausalLM.from_pretrained(run.head_from, dtype=torch.float32)
        try:
            model.diffusion_head.load_state_dict(trained.diffusion_head.state_dict())
        except RuntimeError as error:
            raise ValueError(f"The head of {run.head_from} has another shape than this run's: {error}") from error
    return model


def known_model(run: HeadRun) -> Any:
    """The model of `head_from`, whose config and generation config stay.

    Raises:
        ValueError: the run asks for another size or limit than the model has.
    """
    if run.head_from is None:
        raise ValueError("A head needs a base: pass --base with its folder or repo, or --head_from with a whole model.")
    arguments = loading_arguments(run.quantization, run.bf16)
    model = modeling.SmolLMDiffusionForCausalLM.from_pretrained(run.head_from, **arguments)
    defaults = {field.name: field.default for field in fields(run)}
    for name in OF_CONFIG:
        asked, found = getattr(run, name), getattr(model.config, name)
        if asked not in (defaults[name], found):
            raise ValueError(f"{run.head_from} has {name} {found}, not {asked}: leave it out, or pass --base too.")
    return model


def generation_defaults(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """How a trained model generates where the caller says nothing."""
    return GenerationConfig(
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        max_new_tokens=256,  # transformers would end a text reply after 20
        decoding="verified",
        # A small head is right less often than a look-up where the conversation says the value: `eval.bench_decoding`.
        drafter="mixed",
        num_diffusion_steps=4,
        max_tool_calls=8,
        # A call's first token is one, a text's are many: the argmax calls long before a call is the likelier reply.
        tool_call_threshold=0.5,
    )


def train_head(run: HeadRun, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Train a head on a frozen base and save the model in bfloat16 under `output/final`.

    Args:
        run: the options.
        tokenizer: tokenizer of the base.

    Returns:
        The trained model.
    """
    model = fresh_model(run)
    if run.base:
        model.generation_config = generation_defaults(tokenizer)
    if run.feature_cache is None:
        return fit_head(model, run, tokenizer)
    gold = GoldExamples(run, tokenizer, _vocabulary(model, tokenizer), model.config, fixed=run.cached_prompts)
    on_device(model)
    cache = FeatureCache(run.feature_cache, model, torch.bfloat16 if run.bf16 else torch.float32)
    cache.ensure(row.prompt_ids for row in gold.rows)
    return fit_head(model, run, tokenizer, gold, cache)


def _vocabulary(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    return grammar.Vocabulary(tokenizer, model.config.get_text_config().vocab_size)


def fit_head(
    model: Any,
    run: ObjectiveRun,
    tokenizer: PreTrainedTokenizerFast,
    draw: ExampleDraw | None = None,
    features: FeatureCache | None = None,
) -> Any:
    """Train whatever of a model needs gradients on the head's objective, and save the model in bfloat16.

    Args:
        model: a `SmolLMDiffusionForCausalLM` in float32, its base may be quantised; its config gets the objective of
            the run.
        run: the options.
        tokenizer: tokenizer of the base.
        draw: draws the examples; None = fresh ones of `GoldExamples`.
        features: of the base, of every prompt that is drawn; None = the base is run.

    Returns:
        The model with the weights of the best evaluation, see `HeadEvaluation.best_metric`.
    """
    for name in OBJECTIVE_FIELDS:
        setattr(model.config, name, getattr(run, name))
    model.config.check_fields()
    vocabulary = _vocabulary(model, tokenizer)
    draw = draw or GoldExamples(run, tokenizer, vocabulary, model.config)
    batches = run.max_steps * run.gradient_accumulation_steps * world_size()
    dataset = BlockDataset(draw, example_cost, run.rows_per_batch, batches, run.seed)
    collate = HeadCollator(
        config=model.config,
        pad_id=tokenizer.pad_token_id,
        noise_samples=run.noise_samples,
        own_draft_share=run.own_draft_share,
        kinds=kind_tokens(vocabulary) if model.config.constraint_loss_weight > 0 else None,
        features=features,
    )
    if features is not None:
        report_feature_cache(model, collate, dataset[0], features)
    plain = replace(collate, own_draft_share=0.0, features=None)
    sets = evaluation_sets(run.data or [DEFAULT_DATA], tokenizer, run.eval_rows)
    measure = HeadEvaluation(model, tokenizer, vocabulary, plain, sets, run.acceptance_rows, canvas_example)
    with trained_beside_its_base(model):
        trainer = StageTrainer(
            model,
            run,
            dataset,
            collate,
            evaluate=measure if measure.sets else None,
            best_metric=measure.best_metric,
            metric_sums=metric_sums,
        )
    trainer.run()
    if trainer.args.should_save:
        final = run.output / "final"
        to_saved_precision(model).save_pretrained(final, head_only=run.head_only)
        tokenizer.save_pretrained(final)
        logger.info("model saved to %s", final)
    return model


def report_feature_cache(
    model: Any, collate: HeadCollator, examples: Sequence[HeadExample], cache: FeatureCache
) -> dict[str, float]:
    """Measure and log what one batch costs with the cache and without.

    Returns:
        Seconds of collating with features and without, of a forward of the base over the batch, and the number of
        batches after which building the cache has paid, infinite where it never does.
    """

    def seconds(work: Callable[[], Any]) -> float:
        work()  # the first time files are read and memory is claimed
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    batch = replace(collate, features=None)(examples)
    cached, plain = seconds(lambda: collate(examples)), seconds(lambda: replace(collate, features=None)(examples))
    with torch.no_grad():
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        base = seconds(lambda: model.base_features(ids, mask).cpu())
    saved = base - (cached - plain)
    pays = cache.build_seconds / saved if saved > 0 else float("inf")
    logger.info(
        "features per batch: %.4f s from the base, %.4f s from the cache, which took %.1f s to make: it pays after "
        "%.0f batches",
        *(base, cached - plain, cache.build_seconds, pays),
    )
    return {"collate_cached": cached, "collate": plain, "base": base, "pays_after": pays}
