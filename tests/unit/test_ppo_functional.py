"""The mathematics of PPO in float64: closed forms, loops written independently, ragged masks, batch splits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from rlhf.ppo.functional import (
    adapt_kl_coefficient,
    explained_variance,
    gae,
    kl_coefficient,
    kl_per_token,
    last_counted,
    masked_mean,
    policy_loss,
    prepare_scores,
    shape_rewards,
    value_loss,
    whiten,
)

ROWS, STEPS = 6, 9


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def mask() -> torch.Tensor:
    """Padding on the right, on the left, holes, one token, nothing, everything."""
    rows = ["111110000", "000111111", "110010110", "000000100", "000000000", "111111111"]
    return torch.tensor([[int(flag) for flag in row] for row in rows])


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spoiled(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same with NaN wherever nothing counts."""
    return torch.where(mask.bool(), values, torch.nan)


def counted_places(mask: torch.Tensor, row: int) -> list[int]:
    return [step for step in range(mask.shape[1]) if mask[row, step]]


# --- rewards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_shape_rewards_against_a_loop(generator: torch.Generator, mask: torch.Tensor, estimator: str) -> None:
    scores = randn(generator, ROWS)
    logprobs, reference = (-randn(generator, ROWS, STEPS).abs() for _ in range(2))
    expected = torch.zeros(ROWS, STEPS, dtype=torch.float64)
    for row in range(ROWS):
        places = counted_places(mask, row)
        for step in places:
            difference = float(logprobs[row, step] - reference[row, step])
            kl = difference if estimator == "k1" else math.exp(-difference) - 1 + difference
            expected[row, step] = -0.3 * kl
        if places:
            expected[row, places[-1]] += scores[row]
    found = shape_rewards(
        scores,
        spoiled(logprobs, mask),
        spoiled(reference, mask),
        mask,
        kl_coef=0.3,
        kl_estimator=estimator,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float64])
def test_masks_of_any_type(generator: torch.Generator, mask: torch.Tensor, kind: torch.dtype) -> None:
    rewards, values = randn(generator, ROWS, STEPS), randn(generator, ROWS, STEPS)
    for one, other in zip(gae(rewards, values, mask), gae(rewards, values, mask.to(kind))):
        assert torch.equal(one, other)


def test_score_lands_on_the_last_counted_token(mask: torch.Tensor) -> None:
    nothing = torch.zeros(ROWS, STEPS, dtype=torch.float64)
    rewards = shape_rewards(torch.arange(1.0, 7.0), nothing, nothing, mask, kl_coef=0.2)
    assert rewards.nonzero().tolist() == [[0, 4], [1, 8], [2, 7], [3, 6], [5, 8]]
    assert rewards.sum(-1).tolist() == [
        1,
        2,
        3,
        4,
        0,
        6,
    ]  # the row in which nothing counts has no place for it
    assert last_counted(mask).sum(-1).tolist() == [1, 1, 1, 1, 0, 1]


def test_estimators_are_unbiased_and_k3_is_not_negative() -> None:
    """Over all tokens of a small vocabulary, weighted by the policy: exactly the KL divergence."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (randn(generator, 1, 7).log_softmax(-1) for _ in range(2))
    exact = torch.nn.functional.kl_div(reference, policy, reduction="sum", log_target=True)
    everywhere = torch.ones(1, 7)
    for estimator in ("k1", "k3"):
        each = kl_per_token(policy, reference, everywhere, estimator=estimator)  # type: ignore[arg-type]
        torch.testing.assert_close((policy.exp() * each).sum(), exact, rtol=1e-12, atol=0)
    assert (each >= 0).all()
    with pytest.raises(ValueError, match="k1 or k3"):
        kl_per_token(policy, reference, everywhere, estimator="k2")  # type: ignore[arg-type]


def test_prepare_scores_normalises_clips_and_then_penalises() -> None:
    scores = torch.tensor([3.0, 5.0, 50.0, -50.0])
    ended = torch.tensor([True, False, False, True])
    found = prepare_scores(scores, ended, mean=3.0, std=2.0, clip=4.0, missing_eos_penalty=1.5)
    assert found.tolist() == [0.0, -0.5, 2.5, -4.0]
    assert prepare_scores(scores, ended).tolist() == scores.tolist()
    assert prepare_scores(torch.ones(2), ended[:2], mean=1.0, std=0.0).tolist() == [0, 0]


# --- advantages -------------------------------------------------------------------------------------------------


def gae_by_definition(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """A_t = Σ_k (γλ)^k δ_{t+k}, straight from the definition, on a row without holes."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_against_the_definition(
    generator: torch.Generator, mask: torch.Tensor, gamma: float, lam: float
) -> None:
    rewards, values = randn(generator, ROWS, STEPS), randn(generator, ROWS, STEPS)
    advantages, returns = gae(spoiled(rewards, mask), spoiled(values, mask), mask, gamma=gamma, lam=lam)
    expected = [torch.zeros(ROWS, STEPS, dtype=torch.float64) for _ in range(2)]
    for row in range(ROWS):
        places = counted_places(mask, row)
        per_row = gae_by_definition(rewards[row, places].tolist(), values[row, places].tolist(), gamma, lam)
        for target, numbers in zip(expected, per_row):
            target[row, places] = torch.tensor(numbers, dtype=torch.float64)
    torch.testing.assert_close(advantages, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, expected[1], rtol=0, atol=1e-12)


def test_gae_closed_forms(generator: torch.Generator, mask: torch.Tensor) -> None:
    rewards, values = randn(generator, ROWS, STEPS) * mask, randn(generator, ROWS, STEPS)
    _, monte_carlo = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1) * mask
    torch.testing.assert_close(monte_carlo, to_go, rtol=0, atol=1e-12)  # whatever the critic says
    perfect, _ = gae(rewards, to_go, mask, gamma=1.0, lam=0.7)
    torch.testing.assert_close(perfect, torch.zeros_like(perfect), rtol=0, atol=1e-12)  # nothing surprises it
    assert gae(rewards[:, :0], values[:, :0], mask[:, :0])[0].shape == (ROWS, 0)


# --- losses -----------------------------------------------------------------------------------------------------


def test_policy_loss_against_a_loop(generator: torch.Generator, mask: torch.Tensor) -> None:
    old = -randn(generator, ROWS, STEPS).abs()
    new = old + 0.2 * randn(generator, ROWS, STEPS)
    advantages = randn(generator, ROWS, STEPS)
    terms, cut, kls, ratios = [], [], [], []
    for row in range(ROWS):
        for step in counted_places(mask, row):
            ratio = math.exp(float(new[row, step]) - float(old[row, step]))
            advantage = float(advantages[row, step])
            limited = min(max(ratio, 0.9), 1.1)
            terms.append(-min(ratio * advantage, limited * advantage))
            cut.append(float(limited * advantage < ratio * advantage))
            kls.append(ratio - 1 - math.log(ratio))
            ratios.append(ratio)
    loss, stats = policy_loss(
        spoiled(new, mask), spoiled(old, mask), spoiled(advantages, mask), mask, clip=0.1
    )
    n = len(terms)
    assert 0 < sum(cut) < n
    assert loss.item() == pytest.approx(sum(terms) / n, abs=1e-12)
    expected = {"clip_fraction": sum(cut) / n, "approx_kl": sum(kls) / n, "ratio": sum(ratios) / n}
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected, abs=1e-12)


def test_policy_gradient(generator: torch.Generator, mask: torch.Tensor) -> None:
    """At the old policy it is −A/n; beyond the clip, in the direction of the advantage, it is 0."""
    old, advantages = -randn(generator, ROWS, STEPS).abs(), randn(generator, ROWS, STEPS)
    new = spoiled(old, mask).requires_grad_()
    policy_loss(new, spoiled(old, mask), spoiled(advantages, mask), mask)[0].backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -advantages * mask / mask.sum(), rtol=1e-12, atol=0)

    beyond = (old + 0.5 * advantages.sign()).requires_grad_()
    policy_loss(beyond, old, advantages, mask)[0].backward()
    assert beyond.grad is not None
    assert not beyond.grad.any()
    # On the wrong side it is not clipped: there is something to mend.
    astray = (old - 0.5 * advantages.sign()).requires_grad_()
    policy_loss(astray, old, advantages, mask)[0].backward()
    assert astray.grad is not None
    assert (astray.grad != 0).equal(mask.bool())


def test_value_loss_against_a_loop(generator: torch.Generator, mask: torch.Tensor) -> None:
    old, returns = randn(generator, ROWS, STEPS), randn(generator, ROWS, STEPS)
    values = old + 0.4 * randn(generator, ROWS, STEPS)
    terms, plain, cut = [], [], []
    for row in range(ROWS):
        for step in counted_places(mask, row):
            v, o, r = (float(x[row, step]) for x in (values, old, returns))
            near = min(max(v, o - 0.2), o + 0.2)
            terms.append(max((v - r) ** 2, (near - r) ** 2) / 2)
            plain.append((v - r) ** 2 / 2)
            cut.append(float((near - r) ** 2 > (v - r) ** 2))
    inputs = [spoiled(x, mask) for x in (values, old, returns)]
    inputs[0].requires_grad_()
    loss, stats = value_loss(*inputs, mask, clip=0.2)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)
    assert stats["value_clip_fraction"].item() == pytest.approx(sum(cut) / len(cut))
    loss.backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.isfinite().all()
    assert not inputs[0].grad[mask == 0].any()
    unclipped, _ = value_loss(*inputs, mask, clip=None)
    assert unclipped.item() == pytest.approx(sum(plain) / len(plain), abs=1e-12)


@pytest.mark.parametrize("parts", [[6], [1, 1, 1, 1, 1, 1], [2, 4], [5, 1]])
def test_losses_do_not_depend_on_how_a_batch_is_split(
    generator: torch.Generator, mask: torch.Tensor, parts: list[int]
) -> None:
    old = -randn(generator, ROWS, STEPS).abs()
    new = (old + 0.2 * randn(generator, ROWS, STEPS)).requires_grad_()
    advantages, returns = randn(generator, ROWS, STEPS), randn(generator, ROWS, STEPS)
    whole, stats = policy_loss(new, old, advantages, mask)
    whole_value, value_stats = value_loss(new, old, returns, mask, clip=0.1)
    (gradient,) = torch.autograd.grad(whole + whole_value, new)

    count = mask.sum()
    sums: dict[str, torch.Tensor] = {}
    for rows in torch.arange(ROWS).split(parts):
        loss, found = policy_loss(new[rows], old[rows], advantages[rows], mask[rows], count=count)
        value, more = value_loss(new[rows], old[rows], returns[rows], mask[rows], clip=0.1, count=count)
        (loss + value).backward()
        for name, number in {"loss": loss.detach() + value.detach(), **found, **more}.items():
            sums[name] = sums.get(name, torch.zeros(())) + number
    torch.testing.assert_close(new.grad, gradient, rtol=1e-12, atol=1e-15)
    expected = {"loss": (whole + whole_value).detach(), **stats, **value_stats}
    for name, number in expected.items():
        torch.testing.assert_close(sums[name].double(), number.double(), rtol=1e-12, atol=1e-15)


def test_a_batch_in_which_nothing_counts_teaches_nothing() -> None:
    values = torch.full((2, 3), torch.nan, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(2, 3)
    loss = (
        policy_loss(values, values, values, nothing)[0]
        + value_loss(values, values, values, nothing, clip=0.2)[0]
    )
    loss.backward()
    assert loss.item() == 0
    assert values.grad is not None
    assert not values.grad.any()


# --- whitening and diagnostics ----------------------------------------------------------------------------------


def test_whiten(generator: torch.Generator, mask: torch.Tensor) -> None:
    values = 5 + 3 * randn(generator, ROWS, STEPS)
    counted = values[mask.bool()]
    white = whiten(spoiled(values, mask), mask)
    expected = (counted - counted.mean()) / (counted.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(white[mask.bool()], expected, rtol=1e-12, atol=1e-12)
    assert not white[mask == 0].any()
    unshifted = whiten(values, mask, shift_mean=False)[mask.bool()]
    torch.testing.assert_close(unshifted, expected + counted.mean(), rtol=1e-12, atol=1e-12)
    assert not whiten(torch.ones(2, 3), torch.ones(2, 3)).any()  # all equal: no division by zero


def in_two_processes(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """What each of two processes finds, the first with two of the rows and the second with the rest."""
    barrier = Barrier(2, timeout=60)
    posted: list[torch.Tensor] = [torch.empty(0)] * 2

    def process(rank: int) -> torch.Tensor:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            posted[rank] = tensor
            barrier.wait()
            total = posted[0] + posted[1]
            barrier.wait()
            return total

        rows = slice(0, 2) if rank == 0 else slice(2, ROWS)
        return function(*(tensor[rows] for tensor in tensors), reduce=reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2)))


def test_whiten_and_explained_variance_over_processes(generator: torch.Generator, mask: torch.Tensor) -> None:
    values, returns = randn(generator, ROWS, STEPS), randn(generator, ROWS, STEPS)
    torch.testing.assert_close(torch.cat(in_two_processes(whiten, values, mask)), whiten(values, mask))
    for found in in_two_processes(explained_variance, values, returns, mask):
        torch.testing.assert_close(found, explained_variance(values, returns, mask))


def test_explained_variance(generator: torch.Generator, mask: torch.Tensor) -> None:
    returns = randn(generator, ROWS, STEPS)
    values = returns + 0.5 * randn(generator, ROWS, STEPS)
    kept = mask.bool()
    expected = 1 - (returns - values)[kept].var() / returns[kept].var()
    found = explained_variance(spoiled(values, mask), spoiled(returns, mask), mask)
    torch.testing.assert_close(found, expected)
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(torch.ones_like(returns), returns, mask).item() == pytest.approx(0, abs=1e-12)
    assert explained_variance(values, torch.ones_like(returns), mask).item() == 0


def test_masked_mean_with_a_given_count(mask: torch.Tensor) -> None:
    values = torch.ones(ROWS, STEPS, dtype=torch.float64)
    assert masked_mean(values, mask).item() == 1
    assert masked_mean(values, mask, count=2.0 * mask.sum()).item() == pytest.approx(0.5)


# --- coefficient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_schedules_run_from_start_to_end(schedule: str) -> None:
    course = [kl_coefficient(step, 350, schedule=schedule) for step in range(351)]  # type: ignore[arg-type]
    assert course[0] == pytest.approx(0.2)
    assert course[350] == pytest.approx(0.005)
    assert all(one > other for one, other in itertools.pairwise(course))
    assert kl_coefficient(900, 350, schedule=schedule) == pytest.approx(0.005)  # type: ignore[arg-type]
    middle = {"linear": 0.1025, "cosine": 0.1025, "exponential": math.sqrt(0.2 * 0.005)}
    assert course[175] == pytest.approx(middle[schedule])


def test_shapes_of_the_schedules() -> None:
    assert kl_coefficient(70, 350, start=1.0, end=0.0, schedule="linear") == pytest.approx(0.8)
    quarter = kl_coefficient(1, 4, start=1.0, end=0.0, schedule="cosine")
    assert quarter == pytest.approx((1 + math.sqrt(0.5)) / 2)
    steps = [kl_coefficient(s, 3, start=8.0, end=1.0, schedule="exponential") for s in range(4)]
    assert steps == pytest.approx([8, 4, 2, 1])
    assert kl_coefficient(100, 350, schedule="constant") == 0.2
    assert kl_coefficient(0, 0, schedule="linear") == 0.2
    with pytest.raises(ValueError, match="above 0"):
        kl_coefficient(1, 2, end=0.0, schedule="exponential")
    with pytest.raises(ValueError, match="schedule"):
        kl_coefficient(1, 2, schedule="quadratic")  # type: ignore[arg-type]


def test_adaptive_coefficient() -> None:
    assert adapt_kl_coefficient(0.1, 6.0, target=6.0, responses=64) == 0.1
    assert adapt_kl_coefficient(0.1, 6.6, target=6.0, responses=100, horizon=1000) == pytest.approx(0.101)
    assert adapt_kl_coefficient(0.1, 600.0, target=6.0, responses=100, horizon=1000) == pytest.approx(0.102)
    assert adapt_kl_coefficient(0.1, 0.0, target=6.0, responses=100, horizon=1000) == pytest.approx(0.098)
