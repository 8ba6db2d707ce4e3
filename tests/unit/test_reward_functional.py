"""The ranking loss against loops over pairs, written from the formula."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rlhf.reward.functional import pair_indices, ranking_loss

SIZES = [[2], [4], [2, 5, 3], [9, 2, 2, 4]]


def by_loops(
    scores: list[float],
    sizes: list[int],
    margins: list[float] | None = None,
    mask: list[bool] | None = None,
    coef: float = 0.0,
) -> float:
    """The loss one pair at a time, in Python's floats."""
    total, start, pair = 0.0, 0, 0
    for size in sizes:
        terms = []
        for i in range(start, start + size):
            for j in range(i + 1, start + size):
                margin = margins[pair] if margins else 0.0
                if mask is None or mask[pair]:
                    terms.append(math.log1p(math.exp(-(scores[i] - scores[j] - margin))))
                pair += 1
        total += sum(terms) / len(terms) if terms else 0.0
        total += coef * (sum(scores[start : start + size]) / size) ** 2
        start += size
    return total / len(sizes)


def draw(sizes: list[int]) -> tuple[list[float], list[float], list[bool]]:
    generator = random.Random(sum(sizes))
    pairs = sum(size * (size - 1) // 2 for size in sizes)
    scores = [generator.gauss(0, 2) for _ in range(sum(sizes))]
    return (
        scores,
        [generator.random() for _ in range(pairs)],
        [generator.random() < 0.7 for _ in range(pairs)],
    )


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_loops_over_pairs(sizes: list[int]) -> None:
    scores, margins, mask = draw(sizes)
    assert ranking_loss(tensor(scores), sizes).item() == pytest.approx(by_loops(scores, sizes), rel=1e-12)
    full = ranking_loss(
        tensor(scores), sizes, margins=tensor(margins), pair_mask=torch.tensor(mask), mean_score_coef=0.3
    )
    assert full.dtype == torch.float64
    assert full.item() == pytest.approx(by_loops(scores, sizes, margins, mask, 0.3), rel=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_gradient_equals_finite_differences(sizes: list[int]) -> None:
    scores, margins, _ = draw(sizes)
    x = tensor(scores).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ranking_loss(x, sizes, margins=tensor(margins), mean_score_coef=0.1), (x,)
    )


def test_parts_add_up_to_the_whole() -> None:
    sizes = [2, 5, 3, 2, 4]
    scores, _, _ = draw(sizes)
    x = tensor(scores)
    whole = ranking_loss(x, sizes, mean_score_coef=0.2)
    for cut in range(1, len(sizes)):
        at = sum(sizes[:cut])
        first = ranking_loss(x[:at], sizes[:cut], mean_score_coef=0.2, num_groups=len(sizes))
        second = ranking_loss(x[at:], sizes[cut:], mean_score_coef=0.2, num_groups=len(sizes))
        assert (first + second).item() == pytest.approx(whole.item(), rel=1e-12)


def test_many_responses_count_no_more_than_two() -> None:
    pair = tensor([1.0, -1.0])
    loss = ranking_loss(torch.cat([pair, torch.zeros(8, dtype=torch.float64)]), [2, 8])
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2.0)) + math.log(2)) / 2, rel=1e-12)


def test_large_differences_do_not_overflow() -> None:
    assert ranking_loss(torch.tensor([-1e4, 1e4]), [2]).item() == pytest.approx(2e4)
    assert ranking_loss(torch.tensor([1e4, -1e4]), [2]).item() == 0.0


def test_half_precision_scores_are_compared_in_float32() -> None:
    scores = torch.tensor([1.0, 0.5, 0.25], dtype=torch.bfloat16)
    loss = ranking_loss(scores, [3])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_loops(scores.tolist(), [3]), rel=1e-6)


def test_pairs_are_listed_group_by_group() -> None:
    better, worse, group = pair_indices([3, 2])
    assert list(zip(better.tolist(), worse.tolist(), group.tolist())) == [
        (0, 1, 0),
        (0, 2, 0),
        (1, 2, 0),
        (3, 4, 1),
    ]


def test_a_group_of_ties_adds_nothing() -> None:
    scores = tensor([1.0, 0.0, 3.0, -2.0])
    loss = ranking_loss(scores, [2, 2], pair_mask=torch.tensor([True, False]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [((3,), [2], "do not fit"), ((3,), [2, 1], "at least two"), ((2, 2), [2, 2], "do not fit")],
)
def test_wrong_sizes_are_refused(shape: tuple[int, ...], sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking_loss(torch.zeros(shape), sizes)


def test_wrong_margins_are_refused() -> None:
    with pytest.raises(ValueError, match=r"margins: expected shape \(3,\)"):
        ranking_loss(torch.zeros(3), [3], margins=torch.zeros(2))
