"""The objective: its parts weigh what they say, its gradients are finite, its counts add up."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from eval.load_metrics import load_metric
from repo_package import load_repo_module
from tiny_models import VOCAB, tiny_config

loss_parts = load_repo_module("denoising_loss")
CONFIG = tiny_config()
NULL = CONFIG.null_token_id


def predictions(count: int, seed: int = 0) -> Tensor:
    """Random log-probabilities [count, vocab + 2] as the head gives them: MASK is impossible."""
    logits = 3 * torch.randn(count, VOCAB + 2, generator=torch.Generator().manual_seed(seed))
    logits[:, VOCAB] = -torch.inf
    return logits.log_softmax(-1)


def targets(ids: Tensor, **parts: Any) -> Any:
    return loss_parts.Targets(ids, parts.pop("weights", torch.ones(len(ids))), torch.tensor(float(len(ids))), **parts)


def test_metrics_are_detached_and_count_what_they_say() -> None:
    log_probs = torch.full((4, VOCAB + 2), -9.0).requires_grad_()
    best = log_probs + 8.0 * F.one_hot(torch.tensor([5, NULL, NULL, 7]), VOCAB + 2)
    output = loss_parts.score(CONFIG, best, targets(torch.tensor([5, 6, NULL, NULL])))
    assert output.real_token_accuracy == 0.5
    assert output.null_accuracy == 0.5
    assert float(output.sums["nulls_right"] / output.sums["nulls"]) == 0.5
    assert output.null_prediction_rate == 0.5
    flat = {**output, **output.sums}
    assert not any(value.requires_grad for name, value in flat.items() if isinstance(value, Tensor) and name != "loss")
    assert output.loss.requires_grad
    sums = output.sums
    assert [float(sums[name]) for name in ("positions", "content", "nulls", "nulls_predicted")] == [4, 2, 2, 2]
    assert sums["bin_positions"].sum() == 4
    assert sums["bin_right"].sum() == 2


def test_the_loss_is_linear_in_one_over_its_normaliser() -> None:
    ids, log_probs = torch.tensor([5, 9, NULL]), predictions(3)
    one, four = (
        loss_parts.score(CONFIG, log_probs, loss_parts.Targets(ids, torch.rand(3).fill_(0.5), torch.tensor(total)))
        for total in (1.0, 4.0)
    )
    assert torch.allclose(one.loss, 4 * four.loss)
    assert torch.equal(one.sums["loss"], four.sums["loss"])


def test_the_constraint_loss_is_the_share_of_forbidden_mass_in_the_cross_entropy() -> None:
    """-log p(token) = -log p(allowed) - log p(token | allowed), and the weight counts the first part once more."""
    allowed = torch.zeros(3, VOCAB + 2, dtype=torch.bool)
    allowed[:, 5:50] = allowed[:, NULL] = True
    ids, log_probs = torch.tensor([5, 9, NULL]), predictions(3)
    plain_config = tiny_config(label_smoothing=0.0, null_prediction_penalty=0.0)
    config = tiny_config(label_smoothing=0.0, null_prediction_penalty=0.0, constraint_loss_weight=0.25)
    plain = loss_parts.score(plain_config, log_probs, targets(ids)).loss
    constrained = loss_parts.score(config, log_probs, targets(ids, allowed=allowed))
    mass = log_probs.exp().masked_fill(~allowed, 0).sum(-1)
    assert constrained.constraint_loss.item() == pytest.approx(-mass.log().mean().item(), rel=1e-5)
    assert constrained.loss.item() == pytest.approx((plain - 0.25 * mass.log().mean()).item(), rel=1e-5)


def test_gradients_stay_finite_where_nearly_everything_is_forbidden() -> None:
    logits = torch.zeros(2, VOCAB + 2)
    logits[:, 7] = 80.0  # a sure, forbidden token
    logits[:, VOCAB] = -torch.inf
    logits.requires_grad_()
    allowed = torch.zeros(2, VOCAB + 2, dtype=torch.bool)
    allowed[:, 9] = True
    config = tiny_config(constraint_loss_weight=1.0)
    loss_parts.score(config, logits.log_softmax(-1), targets(torch.tensor([9, 9]), allowed=allowed)).loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 7] > 0.9).all()  # the step away from what is forbidden does not fade


def test_soft_targets_are_mixed_in_by_their_weight() -> None:
    config = tiny_config(label_smoothing=0.0, null_prediction_penalty=0.0, distill_weight=0.25)
    ids, log_probs = torch.tensor([5, 9]), predictions(2)
    soft_ids = torch.tensor([[5, 6, VOCAB], [0, 0, 0]])
    soft_probs = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.0, 0.0]])
    loss = loss_parts.score(config, log_probs, targets(ids, soft_ids=soft_ids, soft_probs=soft_probs)).loss
    taught = -(0.6 * log_probs[0, 5] + 0.4 * log_probs[0, 6])
    first = 0.75 * -log_probs[0, 5] + 0.25 * taught
    assert loss.item() == pytest.approx(((first - log_probs[1, 9]) / 2).item(), rel=1e-5)


def test_soft_targets_on_an_impossible_token_give_finite_gradients() -> None:
    config = tiny_config(distill_weight=1.0, label_smoothing=0.0)
    logits = torch.zeros(1, VOCAB + 2)
    logits[0, VOCAB] = -torch.inf
    logits.requires_grad_()
    soft = {"soft_ids": torch.tensor([[4, VOCAB]]), "soft_probs": torch.tensor([[1.0, 0.0]])}
    loss_parts.score(config, logits.log_softmax(-1), targets(torch.tensor([4]), **soft)).loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_metrics_of_added_sums_are_those_of_everything_together(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    ids = torch.where(
        torch.rand(count, generator=generator) < 0.5, NULL, torch.randint(3, VOCAB, (count,), generator=generator)
    )
    log_probs = predictions(count, seed)
    added: dict[str, Tensor] = {}
    for part_ids, part in zip(ids.split(sizes), log_probs.split(sizes), strict=True):
        added = loss_parts.add_sums(added, loss_parts.score(CONFIG, part, targets(part_ids)).sums)
    whole = loss_parts.score(CONFIG, log_probs, targets(ids)).sums
    canvases = dict.fromkeys(
        ("weight", "rows", "scaffold_positions", "slot_positions", "masked_positions", "own_positions"),
        torch.tensor(float(count)),
    )
    together, apart = loss_parts.summary({**whole, **canvases}), loss_parts.summary({**added, **canvases})
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


def test_a_head_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    # 4 positions at confidence 0.75, of which 3 are right.
    log_probs = torch.full((4, VOCAB + 2), math.log(0.25 / (VOCAB + 1)))
    log_probs[:, 7] = math.log(0.75)
    sums = loss_parts.score(CONFIG, log_probs, targets(torch.tensor([7, 7, 7, 8]))).sums
    canvas = dict.fromkeys(
        ("weight", "rows", "scaffold_positions", "slot_positions", "masked_positions", "own_positions"),
        torch.tensor(1.0),
    )
    metrics = loss_parts.summary({**sums, **canvas})
    assert metrics["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(0.75)
    worse = loss_parts.score(CONFIG, log_probs, targets(torch.tensor([8, 8, 8, 8]))).sums
    assert loss_parts.summary({**worse, **canvas})["calibration_error"] == pytest.approx(0.75)


@pytest.mark.parametrize("confidence", [0.5, 0.25, 0.31, 0.999])
def test_null_rates_and_calibration_are_those_of_the_metrics(confidence: float) -> None:
    """Confidences on the edge of a bin among them: 0.5 belongs to the bin below."""
    count = 8
    best = torch.tensor([7, NULL, 9, NULL, 7, 7, NULL, 9])
    log_probs = torch.full((count, VOCAB + 2), -torch.inf)
    log_probs[:, 11] = math.log(1 - confidence) if confidence > 0.5 else math.log(confidence / 2)
    if confidence <= 0.5:
        log_probs[:, 12:16] = math.log((1 - 1.5 * confidence) / 4)
    log_probs[torch.arange(count), best] = math.log(confidence)
    ids = torch.tensor([7, NULL, NULL, 5, 7, 5, NULL, NULL])
    sums = loss_parts.score(tiny_config(label_smoothing=0.0), log_probs, targets(ids)).sums
    canvas = dict.fromkeys(
        ("weight", "rows", "scaffold_positions", "slot_positions", "masked_positions", "own_positions"),
        torch.tensor(1.0),
    )
    found = loss_parts.summary({**sums, **canvas})
    calibration = load_metric("expected_calibration_error").compute(
        predictions=log_probs.exp().max(-1).values.tolist(), references=(best == ids).long().tolist()
    )
    assert found["calibration_error"] == pytest.approx(calibration["expected_calibration_error"], abs=1e-6)
    nulls = load_metric("null_tokens").compute(
        predictions=[best.tolist()], references=[ids.tolist()], slots=[[0] * count], masked=[[1] * count], null_id=NULL
    )
    for name in ("null_accuracy", "null_recall", "null_precision", "null_prediction_rate", "real_token_accuracy"):
        assert found[name] == pytest.approx(nulls[name]), name


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower_one() -> None:
    log_probs = torch.full((1, VOCAB + 2), -torch.inf)
    log_probs[0, 7:9] = math.log(0.5)
    sums = loss_parts.score(tiny_config(label_smoothing=0.0), log_probs, targets(torch.tensor([7]))).sums
    assert sums["bin_positions"].nonzero().flatten().tolist() == [4]
