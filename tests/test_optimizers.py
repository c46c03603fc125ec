"""Muon + AdamW as one optimizer, and the learning-rate shapes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.optimizers import MuonAdamW, cosine, orthogonalise, trapezoid


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    for shape in [(3, 16, 40), (2, 40, 16)]:
        values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape)))
        assert values.min() > 0.4
        assert values.max() < 1.3


def test_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "mix": torch.nn.Linear(3, 5)})
    optimizer = MuonAdamW(model.named_parameters())
    kinds = {group["kind"]: [tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups}
    assert kinds == {"muon": [(5, 3)], "adamw": [(4, 3), (5,)]}
    target = torch.randn(8, 5)
    inputs = torch.randint(0, 4, (8,))
    losses = []
    for _ in range(60):
        loss = (model["mix"](model["embed"](inputs)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9


def test_the_learning_rate_rises_holds_and_ends_at_zero() -> None:
    factors = [trapezoid(progress, warmup=0.1, hold=0.5) for progress in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0, 1.1)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.5, 0, 0])
    factors = [cosine(progress, warmup=0.1) for progress in (0.0, 0.05, 0.1, 0.55, 1.0, 1.1)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


@given(st.floats(0, 1), st.floats(0, 1))
def test_after_the_warmup_the_rate_never_rises(first: float, second: float) -> None:
    early, late = sorted((0.1 + 0.9 * first, 0.1 + 0.9 * second))
    assert cosine(late, 0.1) <= cosine(early, 0.1) + 1e-12
    assert trapezoid(late, 0.1, 0.4) <= trapezoid(early, 0.1, 0.4) + 1e-12
    assert math.isfinite(cosine(early, 0.0))
