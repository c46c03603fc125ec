"""Noise schedules of masked diffusion: how likely a slot position is masked at time t, and how its loss is weighted.

Takes times in [0, 1] (0 = clean, 1 = all masked) and slot masks; gives probabilities, weights and masks,
and the noise of single examples from seeds. It knows no tokens' meaning and no model. Source: MDLM (arXiv 2406.07524),
section 3 and appendix on schedules.
"""

import math
import random
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NoiseSchedule(Protocol):
    """What every schedule offers; all methods are elementwise and keep the shape of `t`."""

    def total_noise(self, t: Tensor) -> Tensor:
        """sigma(t), the integral of the rate from 0 to t."""

    def rate_noise(self, t: Tensor) -> Tensor:
        """d sigma / d t."""

    def mask_probability(self, t: Tensor) -> Tensor:
        """P(a slot position is masked at t) = 1 - exp(-sigma(t))."""

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight of the cross-entropy that makes it a likelihood bound: rate / expm1(sigma) = p'(t) / p(t)."""


@dataclass(frozen=True)
class LogLinear:
    """Masking probability linear in t: sigma(t) = -log(1 - (1 - eps) t). The default of MDLM.

    Args:
        eps: probability of a clean token at t = 1; keeps sigma finite.
    """

    eps: float = 1e-3

    def total_noise(self, t: Tensor) -> Tensor:
        """sigma(t), in [0, -log eps]."""
        return -torch.log1p(-(1 - self.eps) * t)

    def rate_noise(self, t: Tensor) -> Tensor:
        """(1 - eps) / (1 - (1 - eps) t)."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def mask_probability(self, t: Tensor) -> Tensor:
        """(1 - eps) t."""
        return (1 - self.eps) * t

    def loss_weight(self, t: Tensor) -> Tensor:
        """1 / t: the factor (1 - eps) cancels."""
        return 1 / t


@dataclass(frozen=True)
class Cosine:
    """Few masks early, most of them late: a clean token survives with probability eps + (1 - eps) cos(pi t / 2).

    Args:
        eps: probability of a clean token at t = 1; keeps sigma finite.
    """

    eps: float = 1e-3

    def total_noise(self, t: Tensor) -> Tensor:
        """sigma(t) = -log P(clean at t)."""
        return -torch.log(self._clean(t))

    def rate_noise(self, t: Tensor) -> Tensor:
        """-P'(clean at t) / P(clean at t)."""
        return self._slope(t) / self._clean(t)

    def mask_probability(self, t: Tensor) -> Tensor:
        """(1 - eps) (1 - cos(pi t / 2))."""
        return 1 - self._clean(t)

    def loss_weight(self, t: Tensor) -> Tensor:
        """p'(t) / p(t) = (pi / 2) sin(pi t / 2) / (1 - cos(pi t / 2)) = (pi / 2) / tan(pi t / 4), exact near 0 too."""
        return (math.pi / 2) / torch.tan(math.pi * t / 4)

    def _clean(self, t: Tensor) -> Tensor:
        return self.eps + (1 - self.eps) * torch.cos(math.pi * t / 2)

    def _slope(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * (math.pi / 2) * torch.sin(math.pi * t / 2)


@dataclass(frozen=True)
class Linear:
    """Constant rate: sigma(t) = -log(eps) t, so a clean token survives with probability eps ** t.

    Args:
        eps: probability of a clean token at t = 1.
    """

    eps: float = 1e-3

    def total_noise(self, t: Tensor) -> Tensor:
        """sigma(t), in [0, -log eps]."""
        return -math.log(self.eps) * t

    def rate_noise(self, t: Tensor) -> Tensor:
        """-log eps, at every t."""
        return torch.full_like(t, -math.log(self.eps))

    def mask_probability(self, t: Tensor) -> Tensor:
        """1 - eps ** t."""
        return -torch.expm1(-self.total_noise(t))

    def loss_weight(self, t: Tensor) -> Tensor:
        """-log(eps) / expm1(sigma(t))."""
        return self.rate_noise(t) / torch.expm1(self.total_noise(t))


SCHEDULES: dict[str, type[LogLinear] | type[Cosine] | type[Linear]] = {
    "log_linear": LogLinear,
    "cosine": Cosine,
    "linear": Linear,
}


def build_schedule(name: str, eps: float) -> NoiseSchedule:
    """Look a schedule up by the name that configs use.

    Args:
        name: "log_linear", "cosine" or "linear".
        eps: probability of a clean token at t = 1, in (0, 1).

    Raises:
        ValueError: no schedule has this name, or eps is out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"noise_schedule {name!r} is unknown; use one of {', '.join(SCHEDULES)}.")
    if not 0 < eps < 1:
        raise ValueError(f"noise_eps must be strictly between 0 and 1, got {eps}.")
    return SCHEDULES[name](eps)


def sample_times(
    count: int, eps: float, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Draw one time per row, stratified: the unit interval is cut in `count` equal parts and every part is hit once.

    Args:
        count: rows.
        eps: smallest time, so that weights such as 1 / t stay finite.
        device: where the result lives.
        generator: source of randomness, on any device; None = torch's global one.

    Returns:
        Float tensor [count] in [eps, 1), in random order, so that rows of one prompt are not sorted by noise.
    """
    source = generator.device if generator is not None else device
    offset = torch.rand(count, device=source, generator=generator)
    order = torch.randperm(count, device=source, generator=generator)
    uniform = (order + offset) / count
    return (eps + (1 - eps) * uniform).to(device)


def sample_mask(
    slot_mask: Tensor, t: Tensor, schedule: NoiseSchedule, generator: torch.Generator | None = None
) -> Tensor:
    """Forward process: decide independently for every slot position whether it is masked at time t.

    Args:
        slot_mask: bool [batch, scaffold], the positions that may be masked; fixed text and padding are False.
        t: float [batch] in [0, 1].
        schedule: gives the probability.
        generator: source of randomness, on any device; None = torch's global one.

    Returns:
        Bool [batch, scaffold]; True only where `slot_mask` is.
    """
    source = generator.device if generator is not None else slot_mask.device
    draw = torch.rand(slot_mask.shape, device=source, generator=generator).to(slot_mask.device)
    return slot_mask & (draw < schedule.mask_probability(t)[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Noise of single examples, the same in any batch and any process
# ---------------------------------------------------------------------------------------------------------------------

# The fractional parts of its multiples fill the unit interval evenly, however many are taken.
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class ExampleNoise:
    """Noise draws of one clean canvas.

    Args:
        times: float32 [samples] in [eps, 1).
        masked: bool [samples, scaffold].
        own: bool [samples, scaffold], unmasked slot positions that were masked at a later time of the same draw; there
            the head's own draft stands in place of the gold token.
    """

    times: Tensor
    masked: Tensor
    own: Tensor


def low_discrepancy(index: int, seed: int) -> float:
    """An offset in [0, 1) for example number `index`: those of neighbours, and of any run of them, lie evenly apart.

    Source: the additive recurrence of the golden ratio, Weyl 1916.
    """
    return (random.Random(seed).random() + index * _GOLDEN) % 1.0


def example_noise(
    slot_mask: Tensor, samples: int, schedule: NoiseSchedule, eps: float, offset: float, seed: int, own_share: float
) -> ExampleNoise:
    """Draw the noise of one example, stratified over its draws: each hits another one of `samples` equal parts.

    Args:
        slot_mask: bool [scaffold], the positions that may be masked.
        samples: noise draws.
        schedule: gives probabilities.
        eps: smallest time.
        offset: in [0, 1), shifts the times; see `low_discrepancy`.
        seed: of everything else.
        own_share: share of draws with positions that hold the head's own draft.

    Returns:
        The noise; a function of the arguments alone.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = (offset + torch.arange(samples, dtype=torch.float64) / samples) % 1.0
    times = (eps + (1 - eps) * spread).float().clamp(eps, 1 - 2**-24)
    level = torch.rand(samples, len(slot_mask), generator=generator)
    masked = slot_mask & (level < schedule.mask_probability(times)[:, None])
    drafts, later = torch.rand(2, samples, generator=generator)
    # The same levels at a later time mask a superset, as if the draft had gone on from there.
    later_probability = schedule.mask_probability(times + later * (1 - times))[:, None]
    own = slot_mask & ~masked & (level < later_probability) & (drafts < own_share)[:, None]
    return ExampleNoise(times, masked, own)
