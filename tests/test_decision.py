"""The calibrated threshold on P(call): what it separates."""

import pytest

from training.decision import best_threshold


def test_separable_probabilities_are_separated_in_the_middle() -> None:
    assert best_threshold([0.9, 0.7], [0.1, 0.3]) == (pytest.approx(0.5), 1.0, 1.0)


def test_both_kinds_of_error_count_alike() -> None:
    threshold, called, refused = best_threshold([0.9, 0.8, 0.7, 0.2], [0.1, 0.3, 0.4, 0.75])
    assert 0.4 < threshold < 0.7
    assert (called, refused) == (0.75, 0.75)


def test_a_base_that_always_calls_is_left_calling_or_silenced() -> None:
    threshold, called, refused = best_threshold([0.9, 0.9], [0.9, 0.9])
    assert called + refused == 1.0
    assert 0 <= threshold <= 1
