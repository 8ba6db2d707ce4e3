"""Several adapters into one: weighted sums, TIES and DARE on what each of them adds to a matrix.

The combination is made of the full differences (merged minus base matrix), as peft's ``cat`` and ``…_svd``
combinations do, and not of the factors A and B: peft's own ``linear`` on factors mixes the adapters' A with each
other's B, and wants equal ranks. Nothing has to be cut back to low rank here, since the result goes into full
matrices; so ``linear`` is exact, and TIES and DARE are peft's functions on exact differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from zlib import crc32

from finetune.adapters.lora_weights import LoraUpdate
from finetune.errors import UserError

if TYPE_CHECKING:
    import torch

COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties")


class Update(Protocol):
    """A change of one matrix."""

    def apply(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The changed matrix, (out, in), computed in float32."""


@dataclass(frozen=True)
class Combination:
    """How adapters are combined.

    Attributes:
        weights: one factor an adapter.
        method: one of `COMBINATIONS`. TIES (Yadav et al. 2023) keeps each adapter's largest values and of those
            the ones of the sign that prevails; DARE (Yu et al. 2024) keeps random values, scaled up, and then
            adds them (``dare_linear``) or resolves signs (``dare_ties``).
        density: share of values that TIES and DARE keep.
        seed: of DARE's choice, which depends on nothing but it and the matrix's name.
    """

    weights: tuple[float, ...]
    method: str = "linear"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in COMBINATIONS:
            raise UserError(
                f"--combine: found {self.method!r}, expected one of {', '.join(COMBINATIONS)}",
            )
        if not 0 < self.density <= 1:
            raise UserError(f"--density: found {self.density}, expected a share above 0, at most 1")


def parse_weights(text: str) -> tuple[float, ...]:
    """Factors from ``0.7,0.3``.

    Raises:
        UserError: if they are no numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--weights: found {text!r}, expected numbers such as 0.7,0.3") from error


def choose_combination(
    count: int, weights: Sequence[float] | None, method: str, density: float, seed: int
) -> Combination:
    """The combination of ``count`` adapters; one adapter alone has weight 1.

    Raises:
        UserError: several adapters without weights, or as many weights as there are not adapters.
    """
    from math import isfinite

    if weights is None and count > 1:
        raise UserError(
            f"{count} adapters, but no --weights",
            hint="say how much of each, such as --weights " + ",".join([f"{1 / count:.2g}"] * count),
        )
    chosen = tuple(weights) if weights is not None else (1.0,)
    if len(chosen) != count or not all(map(isfinite, chosen)):
        found = ",".join(map(str, chosen))
        raise UserError(f"--weights: found {found}, expected {count} finite numbers, one for each --adapter")
    return Combination(chosen, method, density, seed)


def combine_updates(adapters: Sequence[dict[str, LoraUpdate]], combination: Combination) -> dict[str, Update]:
    """The updates of all matrices that any adapter changes.

    A matrix that only some adapters change is combined of those, as in peft.

    Args:
        adapters: the updates of each, by name of the weight.
        combination: how.
    """
    result: dict[str, Update] = {}
    for name in dict.fromkeys(name for updates in adapters for name in updates):
        chosen = [
            (updates[name], weight)
            for updates, weight in zip(adapters, combination.weights)
            if name in updates
        ]
        result[name] = _combine(name, chosen, combination)
    return result


def _combine(name: str, chosen: list[tuple[LoraUpdate, float]], combination: Combination) -> Update:
    import torch

    linear = combination.method == "linear"
    if linear and len(chosen) == 1 and chosen[0][1] == 1:
        return chosen[0][0]
    if linear and all(update.magnitude is None for update, _ in chosen):
        # A sum of low-rank products is one product: the factors side by side.
        a = torch.cat([update.a.float() * (update.scaling * weight) for update, weight in chosen])
        b = torch.cat([update.b.float() for update, _ in chosen], dim=1)
        return LoraUpdate(a, b, 1.0)
    return _CombinedUpdate(name, tuple(chosen), combination)


@dataclass(frozen=True)
class _CombinedUpdate:
    """Combines whole differences, so that it needs a few float32 copies of the matrix for each adapter."""

    name: str
    updates: tuple[tuple[LoraUpdate, float], ...]
    combination: Combination

    def apply(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        import torch
        from peft.utils import merge_utils

        how, base = self.combination, weight.float()
        differences = [update.apply(weight) - base for update, _ in self.updates]
        weights = torch.tensor([factor for _, factor in self.updates])
        if how.method == "linear":
            change = merge_utils.task_arithmetic(differences, weights)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(how.seed ^ crc32(self.name.encode()))
                change = getattr(merge_utils, how.method)(differences, weights, density=how.density)
        return (base + change).to(dtype or torch.float32)
