"""The objective of the diffusion head: what a masked position weighs, what it costs, and what is counted beside it.

Takes clean canvases, their noise and the head's log-probabilities at masked positions; gives the loss and sums that add
up over batches and processes. Runs no model and knows no schema. Source: MDLM (arXiv 2406.07524).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .configuration_smollm_diffusion import SmolLMDiffusionConfig
from .noise_schedule import build_schedule

CONFIDENCE_BINS = 10
"""Equal parts of [0, 1] in which confidence is compared with accuracy."""


@dataclass
class SchemaDiffusionOutput(ModelOutput):
    """Result of a training forward; everything but `loss` is detached.

    Args:
        loss: scalar, what is minimised.
        diffusion_loss: scalar, the weighted cross-entropy with the gold token alone.
        null_penalty: scalar, mean probability of NULL where the target is content.
        real_token_accuracy: scalar, share of masked content positions whose best token is right; NaN if there is none.
        null_accuracy: scalar, share of masked positions where NULL or content is decided rightly.
        null_prediction_rate: scalar, share of masked positions where NULL is the best token.
        masked_slots: scalar, how many masked positions were scored.
        constraint_loss: scalar, mean of -log(mass on tokens that the slot's kind allows); None without kinds.
        sums: float32 sums and counts, which add up over batches and processes; see `summary`.
    """

    loss: Tensor | None = None
    diffusion_loss: Tensor | None = None
    null_penalty: Tensor | None = None
    real_token_accuracy: Tensor | None = None
    null_accuracy: Tensor | None = None
    null_prediction_rate: Tensor | None = None
    masked_slots: Tensor | None = None
    constraint_loss: Tensor | None = None
    sums: dict[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class CleanCanvases:
    """Clean targets, one row per prompt or per noise draw.

    Args:
        ids: long [rows, scaffold], fixed text, values, NULL in the unused tails of slots.
        mask: bool [rows, scaffold], False at padding.
        slots: bool [rows, scaffold], positions that may be masked and are scored.
        weights: float32 [rows, scaffold], factor of a position's loss.
        fields: long [rows, scaffold], the slot of each position, -1 for fixed text; None under a full field mask.
        kinds: long [rows, scaffold], row of the table of allowed tokens; None without constraint loss.
        soft_ids, soft_probs: long and float32 [rows, scaffold, k], what a teacher expects at a position, all zero
            where it says nothing; None without teacher.
        features: [rows, scaffold, features], the base's at the masked scaffold; None where the head does without.
    """

    ids: Tensor
    mask: Tensor
    slots: Tensor
    weights: Tensor
    fields: Tensor | None = None
    kinds: Tensor | None = None
    soft_ids: Tensor | None = None
    soft_probs: Tensor | None = None
    features: Tensor | None = None

    def select(self, rows: Tensor) -> "CleanCanvases":
        """Pick or repeat rows (long [rows])."""
        return CleanCanvases(**{name: part[rows] for name, part in vars(self).items() if part is not None})


@dataclass(frozen=True, eq=False)
class Noise:
    """What of clean canvases is hidden.

    Args:
        times: float [rows] in (0, 1].
        masked: bool [rows, scaffold], positions that are masked.
        own: bool [rows, scaffold], positions that hold what the head itself would draft there; None = none do.
    """

    times: Tensor
    masked: Tensor
    own: Tensor | None = None


def position_weights(config: SmolLMDiffusionConfig, ids: Tensor, weights: Tensor) -> Tensor:
    """Weight of each position before noise: float32 [rows, scaffold].

    Args:
        config: gives `null_loss_weight` and the id of NULL.
        ids: long [rows, scaffold], the clean target.
        weights: float [rows, scaffold], the positions' own factors.
    """
    return weights.float() * torch.where(ids == config.null_token_id, config.null_loss_weight, 1.0)


def loss_normaliser(
    config: SmolLMDiffusionConfig, ids: Tensor, weights: Tensor, slots: Tensor, masked: Tensor
) -> Tensor:
    """What the summed loss of these rows is divided by; sums of it over batches and processes serve them together.

    Weighted rows sum to all slots in expectation, unweighted ones to the masked slots.

    Args:
        config: gives `loss_weighting`, `null_loss_weight` and the id of NULL.
        ids: long [rows, scaffold], the clean target of every noise draw.
        weights: float [rows, scaffold].
        slots: bool [rows, scaffold], without padding.
        masked: bool [rows, scaffold].

    Returns:
        Float32 scalar, 0 where nothing counts.
    """
    counted = masked if config.loss_weighting == "none" else slots
    return (position_weights(config, ids, weights) * counted).sum()


def row_weights(config: SmolLMDiffusionConfig, noise: Noise, slots: Tensor) -> Tensor:
    """Weight of each row's cross-entropy by `loss_weighting`: float [rows].

    Args:
        config: gives weighting and schedule.
        noise: times and masks.
        slots: bool [rows, scaffold].
    """
    if config.loss_weighting == "schedule":
        return build_schedule(config.noise_schedule, config.noise_eps).loss_weight(noise.times)
    if config.loss_weighting == "count":
        return slots.sum(-1) / noise.masked.sum(-1).clamp_min(1)
    return torch.ones_like(noise.times)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Targets:
    """What is scored: one entry per chosen position.

    Args:
        ids: long [n], gold tokens.
        weights: float32 [n], the weight of a position times that of its row.
        normaliser: float32 scalar, what the weighted sum is divided by.
        allowed: bool [n, vocab + 2], tokens that can occur in a slot of this kind; None without constraint loss.
        soft_ids, soft_probs: long and float32 [n, k], see `CleanCanvases`.
    """

    ids: Tensor
    weights: Tensor
    normaliser: Tensor
    allowed: Tensor | None = None
    soft_ids: Tensor | None = None
    soft_probs: Tensor | None = None


def score(config: SmolLMDiffusionConfig, log_probs: Tensor, targets: Targets) -> SchemaDiffusionOutput:
    """The loss of predictions, and what is counted of them.

    Args:
        config: weights of the parts of the loss, ids of MASK and NULL.
        log_probs: float32 [n, vocab + 2], MASK is -inf.
        targets: what they should have been.

    Returns:
        Loss, metrics of these positions alone, and `sums` of the positions.
    """
    nll = F.nll_loss(log_probs, targets.ids, reduction="none")
    cost = _distilled(config, log_probs, targets, nll)
    if config.label_smoothing > 0:
        possible = torch.cat([log_probs[:, : config.mask_token_id], log_probs[:, config.null_token_id :]], dim=-1)
        cost = torch.lerp(cost, -possible.mean(-1), config.label_smoothing)
    is_null = targets.ids == config.null_token_id
    null_probability = log_probs[:, config.null_token_id].exp().masked_fill(is_null, 0.0)
    cost = cost + config.null_prediction_penalty * null_probability
    forbidden = None
    if targets.allowed is not None:
        # Not the forbidden mass itself, whose gradient fades where nearly all mass is forbidden. Of the cross-entropy
        # -log p(token) this is the part -log p(allowed), so the weight says how much more that part counts.
        forbidden = -log_probs.masked_fill(~targets.allowed, -torch.inf).logsumexp(-1)
        cost = cost + config.constraint_loss_weight * forbidden
    # A total that is zero comes with no position that counts.
    normaliser = targets.normaliser.clamp_min(torch.finfo(torch.float32).tiny)
    total = (targets.weights * cost).sum()
    sums = {"loss": total.detach(), "diffusion_loss": (targets.weights * nll).sum().detach()}
    sums |= _counts(log_probs.detach(), targets.ids, is_null)
    sums["null_penalty"] = null_probability.sum().detach()
    if forbidden is not None:
        sums["constraint_loss"] = forbidden.sum().detach()
    return SchemaDiffusionOutput(
        loss=total / normaliser,
        diffusion_loss=sums["diffusion_loss"] / normaliser,
        null_penalty=sums["null_penalty"] / sums["content"],
        real_token_accuracy=sums["content_right"] / sums["content"],
        null_accuracy=sums["null_decisions_right"] / sums["positions"],
        null_prediction_rate=sums["nulls_predicted"] / sums["positions"],
        masked_slots=torch.tensor(len(targets.ids), device=targets.ids.device),
        constraint_loss=None if forbidden is None else sums["constraint_loss"] / sums["positions"],
        sums=sums,
    )


def _distilled(config: SmolLMDiffusionConfig, log_probs: Tensor, targets: Targets, nll: Tensor) -> Tensor:
    """Cross-entropy with the gold token, mixed with that of the teacher where it says something: float32 [n]."""
    if targets.soft_ids is None or targets.soft_probs is None or config.distill_weight == 0:
        return nll
    # A token without probability may be impossible for the head too, and 0 * -inf is not 0.
    expected = log_probs.gather(1, targets.soft_ids).masked_fill(targets.soft_probs == 0, 0.0)
    taught = -(targets.soft_probs * expected).sum(-1)
    told = targets.soft_probs.sum(-1) > 0
    return torch.where(told, torch.lerp(nll, taught, config.distill_weight), nll)


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


def _counts(log_probs: Tensor, ids: Tensor, is_null: Tensor) -> dict[str, Tensor]:
    """Sums over scored positions, float32 scalars and [CONFIDENCE_BINS]."""
    confidence, predicted = log_probs.max(-1)
    confidence = confidence.exp()
    right, null = predicted == ids, ids.new_full((), log_probs.shape[-1] - 1)
    # A bin holds its upper edge, as in eval/metrics/expected_calibration_error.
    edges = torch.arange(1, CONFIDENCE_BINS, device=ids.device) / CONFIDENCE_BINS
    bins = torch.bucketize(confidence, edges)
    empty = confidence.new_zeros(CONFIDENCE_BINS)
    return {
        "positions": empty.new_tensor(float(len(ids))),
        "right": right.float().sum(),
        "confidence": confidence.sum(),
        "content": (~is_null).float().sum(),
        "content_right": (right & ~is_null).float().sum(),
        "nulls": is_null.float().sum(),
        "nulls_right": (right & is_null).float().sum(),
        "nulls_predicted": (predicted == null).float().sum(),
        "null_decisions_right": ((predicted == null) == is_null).float().sum(),
        "bin_positions": empty.index_add(0, bins, torch.ones_like(confidence)),
        "bin_confidence": empty.index_add(0, bins, confidence),
        "bin_right": empty.index_add(0, bins, right.float()),
    }


def canvas_counts(canvases: CleanCanvases, noise: Noise, normaliser: Tensor) -> dict[str, Tensor]:
    """Sums over whole canvases, float32 scalars: `rows`, `scaffold_positions`, `slot_positions`, `masked_positions`,
    `own_positions` and the `weight` that the losses are divided by."""
    own = torch.zeros_like(noise.masked) if noise.own is None else noise.own
    return {
        "weight": normaliser.detach().float(),
        "rows": normaliser.new_tensor(float(len(canvases.ids))).float(),
        "scaffold_positions": canvases.mask.float().sum(),
        "slot_positions": canvases.slots.float().sum(),
        "masked_positions": noise.masked.float().sum(),
        "own_positions": own.float().sum(),
    }


RATIOS = {
    "diffusion_loss": ("diffusion_loss", "weight"),
    "null_penalty": ("null_penalty", "content"),
    "real_token_accuracy": ("content_right", "content"),
    "null_accuracy": ("null_decisions_right", "positions"),
    "null_recall": ("nulls_right", "nulls"),
    "null_precision": ("nulls_right", "nulls_predicted"),
    "null_prediction_rate": ("nulls_predicted", "positions"),
    "accuracy": ("right", "positions"),
    "mean_confidence": ("confidence", "positions"),
    "scaffold_size": ("scaffold_positions", "rows"),
    "slot_size": ("slot_positions", "rows"),
    "masked_count": ("masked_positions", "rows"),
    "own_count": ("own_positions", "rows"),
}
"""Metrics that are the ratio of two of an output's `sums`, named as in `eval/metrics/null_tokens`."""


def ratios(sums: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Part and whole of each metric that these `sums` hold: those of `RATIOS`, and `constraint_loss` if it was
    counted."""
    found = {name: (sums[part], sums[whole]) for name, (part, whole) in RATIOS.items()}
    if "constraint_loss" in sums:
        found["constraint_loss"] = sums["constraint_loss"], sums["positions"]
    return found


def add_sums(total: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add two outputs' `sums`; what only one of them has stays as it is."""
    added = {name: value + total[name] if name in total else value for name, value in more.items()}
    return {**total, **added}


def summary(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of any number of batches from their added `sums`; NaN where nothing was counted.

    Args:
        sums: of `SchemaDiffusionOutput`, added up with `add_sums`.

    Returns:
        What `ratios` names, `loss`, and `calibration_error` (expected calibration error over equal bins, Guo et al.,
        arXiv 1706.04599).
    """

    gaps = (sums["bin_confidence"] - sums["bin_right"]).abs().sum()
    found = {name: float(part / whole) for name, (part, whole) in ratios(sums).items()}
    found["loss"] = float(sums["loss"] / sums["weight"])
    return found | {"calibration_error": float(gaps / sums["positions"])}
