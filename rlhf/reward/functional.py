"""The mathematics of reward modelling: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def pair_indices(
    group_sizes: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every pair of every group: which response should score higher, which lower, and in which group.

    Args:
        group_sizes: number of responses to each prompt, at least 2; responses stand best first, group by group.
        device: where the result is put.

    Returns:
        Three int64 tensors of shape (pairs,): positions of the better and of the worse response, and the
        number of the group. Group by group, and within one (0, 1), (0, 2), ..., (1, 2), ...

    Raises:
        ValueError: a group has fewer than two responses.
    """
    if any(size < 2 for size in group_sizes):
        raise ValueError(f"a group needs at least two responses, found sizes {list(group_sizes)}")
    better, worse, group = [], [], []
    start = 0
    for number, size in enumerate(group_sizes):
        inside = torch.triu_indices(size, size, offset=1, device=device)
        better.append(start + inside[0])
        worse.append(start + inside[1])
        group.append(torch.full_like(inside[0], number))
        start += size
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return (
        torch.cat(better) if better else empty,
        torch.cat(worse) if worse else empty,
        torch.cat(group) if group else empty,
    )


def ranking_loss(
    scores: torch.Tensor,
    group_sizes: Sequence[int],
    *,
    margins: torch.Tensor | None = None,
    pair_mask: torch.Tensor | None = None,
    mean_score_coef: float = 0.0,
    num_groups: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """InstructGPT's ranking loss (Ouyang et al. 2022, equation 1), in float32 or better.

    For a prompt with K responses, the mean over its K (K - 1) / 2 pairs of
    -log sigmoid(score of the better - score of the worse - margin); then the mean over prompts, so that a
    prompt with many responses counts no more than one with two.

    Args:
        scores: (n,), group by group, each group ordered best first.
        group_sizes: responses of each group; they sum to n.
        margins: (pairs,), in the order of `pair_indices`: by how much the better one has to win.
        pair_mask: (pairs,), bool: pairs that count; a tie does not. A group without any adds nothing.
        mean_score_coef: weight of the mean over prompts of (mean score of a prompt's responses)². The ranking
            leaves the level of a prompt's scores open; this holds it near 0.
        num_groups: divide by this number of prompts in place of the number of groups here. With the number of a
            whole step, losses of its parts add up to that of the whole, however it is cut up.

    Returns:
        A scalar.

    Raises:
        ValueError: sizes that do not fit the scores or each other, or a group of fewer than two.
    """
    if scores.ndim != 1 or sum(group_sizes) != len(scores):
        raise ValueError(f"group sizes {list(group_sizes)} do not fit scores of shape {tuple(scores.shape)}")
    better, worse, group = pair_indices(group_sizes, scores.device)
    for name, given in (("margins", margins), ("pair_mask", pair_mask)):
        if given is not None and given.shape != better.shape:
            raise ValueError(f"{name}: expected shape {tuple(better.shape)}, found {tuple(given.shape)}")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    difference = scores[better] - scores[worse]
    if margins is not None:
        difference = difference - margins.to(scores)
    counts = torch.ones_like(difference) if pair_mask is None else pair_mask.to(scores)
    count = len(group_sizes) if num_groups is None else num_groups
    sums = scores.new_zeros(len(group_sizes)).index_add(0, group, -F.logsigmoid(difference) * counts)
    pairs = scores.new_zeros(len(group_sizes)).index_add(0, group, counts)
    loss = (sums / pairs.clamp(min=1)).sum() / count
    if mean_score_coef:
        sizes = torch.tensor(list(group_sizes), device=scores.device)
        owner = torch.repeat_interleave(torch.arange(len(sizes), device=scores.device), sizes)
        means = scores.new_zeros(len(sizes)).index_add(0, owner, scores) / sizes
        loss = loss + mean_score_coef * means.square().sum() / count
    return loss
