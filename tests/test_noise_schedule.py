"""The schedules are what their formulas say, and only slot positions are ever masked."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_package import load_repo_module

noise = load_repo_module("noise_schedule")
SCHEDULES = [build(eps) for build in noise.SCHEDULES.values() for eps in (1e-3, 0.1)]
TIMES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_nothing_is_masked_at_zero_and_almost_all_at_one(schedule: Any) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(schedule.mask_probability(ends), torch.tensor([0.0, 1 - schedule.eps], dtype=torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_mask_probability_grows_and_follows_total_noise(schedule: Any) -> None:
    probability = schedule.mask_probability(TIMES)
    assert (probability.diff() > 0).all()
    assert torch.allclose(probability, 1 - torch.exp(-schedule.total_noise(TIMES)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rate_is_the_derivative_of_total_noise(schedule: Any) -> None:
    step = 1e-6
    numerical = (schedule.total_noise(TIMES + step) - schedule.total_noise(TIMES - step)) / (2 * step)
    assert torch.allclose(schedule.rate_noise(TIMES), numerical, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_loss_weight_is_rate_over_expm1_of_total_noise(schedule: Any) -> None:
    expected = schedule.rate_noise(TIMES) / torch.expm1(schedule.total_noise(TIMES))
    assert torch.allclose(schedule.loss_weight(TIMES), expected, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_weights_are_finite_in_float32_at_the_smallest_time(schedule: Any) -> None:
    assert schedule.loss_weight(torch.tensor([1e-3])).isfinite().all()


def test_log_linear_weight_is_one_over_t() -> None:
    assert torch.equal(noise.LogLinear().loss_weight(TIMES), 1 / TIMES)


@pytest.mark.parametrize(("name", "eps"), [("log-linear", 1e-3), ("linear", 0.0), ("cosine", 1.0)])
def test_unknown_schedules_and_eps_are_refused(name: str, eps: float) -> None:
    with pytest.raises(ValueError, match=r"noise_(schedule|eps)"):
        noise.build_schedule(name, eps)


@given(count=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_times_hit_every_part_of_the_interval_once(count: int, seed: int) -> None:
    times = noise.sample_times(count, 1e-3, generator=torch.Generator().manual_seed(seed))
    assert (times >= 1e-3).all()
    assert (times < 1).all()
    parts = ((times.double() - 1e-3) / (1 - 1e-3) * count + 1e-4).floor().long().sort().values
    assert torch.equal(parts.clamp(0, count - 1), torch.arange(count))


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_only_slots_are_masked(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.rand(4, 20, generator=generator) < 0.5
    times = noise.sample_times(4, 1e-3, generator=generator)
    masked = noise.sample_mask(slots, times, noise.LogLinear(), generator)
    assert masked.dtype == torch.bool
    assert not (masked & ~slots).any()


@pytest.mark.parametrize("schedule", SCHEDULES[::2], ids=str)
def test_masked_share_is_the_probability(schedule: Any) -> None:
    times = torch.tensor([0.1, 0.5, 0.9])
    masked = noise.sample_mask(torch.ones(3, 20000, dtype=torch.bool), times, schedule)
    assert torch.allclose(masked.float().mean(-1), schedule.mask_probability(times), atol=0.02)


def test_a_generator_makes_noise_repeatable() -> None:
    slots, times = torch.ones(2, 50, dtype=torch.bool), torch.tensor([0.3, 0.7])
    first, second = (
        noise.sample_mask(slots, times, noise.Cosine(), torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, second)


@given(samples=st.integers(1, 12), offset=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_draws_of_an_example_hit_every_part_of_the_interval_once(samples: int, offset: float, seed: int) -> None:
    slots = torch.arange(20) % 3 > 0
    drawn = noise.example_noise(slots, samples, noise.LogLinear(), 1e-3, offset, seed, 1.0)
    spread = (drawn.times.double() - 1e-3) / (1 - 1e-3)
    gaps = spread.sort().values.diff(append=spread.min()[None] + 1)
    assert torch.allclose(gaps, torch.full_like(gaps, 1 / samples), atol=1e-5)
    assert (drawn.times >= 1e-3).all()
    assert (drawn.times < 1).all()
    assert not (drawn.masked & ~slots).any()
    assert not (drawn.own & (drawn.masked | ~slots)).any()


def test_offsets_of_neighbouring_examples_spread_over_the_interval() -> None:
    for start in (0, 1000):
        offsets = sorted(noise.low_discrepancy(start + index, seed=3) for index in range(34))
        gaps = [after - before for before, after in zip(offsets, [*offsets[1:], offsets[0] + 1], strict=True)]
        assert max(gaps) < 2.7 / 34  # independent draws leave gaps of about 4 / 34 and more
    assert noise.low_discrepancy(5, 1) != noise.low_discrepancy(5, 2)


def test_own_drafts_stand_in_the_asked_share_of_draws() -> None:
    slots = torch.ones(400, dtype=torch.bool)
    own = torch.cat([noise.example_noise(slots, 4, noise.LogLinear(), 1e-3, 0.1, seed, 0.3).own for seed in range(200)])
    assert 0.25 < own.any(-1).float().mean() < 0.35
    assert not noise.example_noise(slots, 4, noise.LogLinear(), 1e-3, 0.1, 0, 0.0).own.any()


def test_the_noise_of_an_example_is_a_function_of_its_seed() -> None:
    slots = torch.ones(60, dtype=torch.bool)
    first, again, other = (noise.example_noise(slots, 3, noise.Cosine(), 1e-3, 0.2, seed, 0.5) for seed in (7, 7, 8))
    assert torch.equal(first.masked, again.masked)
    assert torch.equal(first.own, again.own)
    assert not torch.equal(first.masked, other.masked)
