"""Joining helpful and harmless scores, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.safety.joining import gate, lagrangian, update_multiplier

HELPFUL = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
HARMLESS = torch.tensor([1.0, 0.0, -0.25, -4.0], dtype=torch.float64)


def test_gate_passes_the_helpful_score_or_lets_harm_decide() -> None:
    assert gate(HELPFUL, HARMLESS).tolist() == [2.0, -1.0, -0.25, -4.0]
    assert gate(HELPFUL, HARMLESS, threshold=0.5).tolist() == [2.0, -1.0, -0.75, -4.5]


def test_no_helpfulness_buys_a_way_past_the_gate() -> None:
    harmless = torch.full((5,), -0.1)
    rewards = gate(torch.tensor([-3.0, 0.0, 1.0, 10.0, 1e6]), harmless)
    assert (rewards <= -0.1 + 1e-7).all()
    assert rewards[0] == -3.0


@pytest.mark.parametrize("multiplier", [0.0, 1.0, 7.5])
def test_lagrangian_matches_reward_minus_weighted_cost(multiplier: float) -> None:
    cost = -HARMLESS
    expected = (HELPFUL - multiplier * cost) / (1 + multiplier)
    torch.testing.assert_close(lagrangian(HELPFUL, HARMLESS, multiplier), expected)


def test_lagrangian_goes_from_helpful_alone_to_harmless_alone() -> None:
    assert torch.equal(lagrangian(HELPFUL, HARMLESS, 0.0), HELPFUL)
    torch.testing.assert_close(lagrangian(HELPFUL, HARMLESS, 1e9), HARMLESS, rtol=1e-6, atol=1e-6)


def test_multiplier_follows_the_gradient_of_its_logarithm() -> None:
    """d/d(log λ) of λ·(J − d) is λ·(J − d)."""
    after = update_multiplier(2.0, -0.5, cost_limit=0.2, learning_rate=0.1)
    assert after == pytest.approx(2.0 * math.exp(0.1 * 2.0 * (0.5 - 0.2)))
    log_multiplier = torch.tensor(math.log(2.0), requires_grad=True)
    (log_multiplier.exp() * (0.5 - 0.2)).backward()
    step = 0.1 * log_multiplier.grad.item()
    assert after == pytest.approx(math.exp(log_multiplier.item() + step))


def test_multiplier_grows_under_harm_shrinks_without_and_stays_in_bounds() -> None:
    grown = shrunk = 1.0
    for _ in range(500):
        grown = update_multiplier(grown, -2.0, maximum=5.0)
        shrunk = update_multiplier(shrunk, 2.0)
    assert grown == pytest.approx(5.0)
    assert 0 < shrunk < 0.1
    assert update_multiplier(3.0, 0.0) == pytest.approx(3.0), "at the limit nothing moves"


def test_multiplier_settles_where_the_constraint_binds() -> None:
    """A policy whose harmlessness rises with λ, h(λ) = λ − 1.5, ends at cost zero: λ = 1.5."""
    multiplier = 0.5
    for _ in range(400):
        multiplier = update_multiplier(multiplier, multiplier - 1.5, learning_rate=0.2)
    assert multiplier == pytest.approx(1.5, abs=1e-6)


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        gate(HELPFUL, HARMLESS[:2])
    with pytest.raises(ValueError, match="at least 0"):
        lagrangian(HELPFUL, HARMLESS, -1.0)
    with pytest.raises(ValueError, match="above 0"):
        update_multiplier(0.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        update_multiplier(1.0, float("nan"))
