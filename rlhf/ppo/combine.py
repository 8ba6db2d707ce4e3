"""How the scores of several rewards become one: a weighted sum, a gate, or a Lagrangian with a learned multiplier.

The formulas are those of `rlhf.safety.joining`; here is what a run keeps of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rlhf.ppo.functional import Reduce
from rlhf.safety.joining import gate, lagrangian, update_multiplier

if TYPE_CHECKING:
    from rlhf.ppo.reward_sections import Join

Scores = Mapping[str, torch.Tensor]
"""Normalised scores (b,) by the name of the reward."""


class Combination(Protocol):
    """Several rewards as one; its state is saved with the run."""

    def __call__(self, parts: Scores) -> torch.Tensor:
        """Joint scores (b,)."""

    def learn(
        self, parts: Scores, responses: int, reduce: Reduce, *, actor_learns: bool = True
    ) -> dict[str, float]:
        """Take in the scores of an iteration, once it has been learned from.

        Args:
            parts: of this process.
            responses: of all processes.
            reduce: sums a tensor over processes.
            actor_learns: whether the actor could answer what is learned here; not while the critic warms up.

        Returns:
            What held in that iteration, for metrics.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Fixed:
    """A combination that learns nothing."""

    def learn(
        self, parts: Scores, responses: int, reduce: Reduce, *, actor_learns: bool = True
    ) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class WeightedSum(_Fixed):
    """The sum of the parts, each times its weight."""

    weights: dict[str, float]

    def __call__(self, parts: Scores) -> torch.Tensor:
        return torch.stack([self.weights[name] * scores for name, scores in parts.items()]).sum(0)


@dataclass
class Gate(_Fixed):
    """The weighted sum of the others where harmlessness reaches the threshold, what it is short of it elsewhere.

    Attributes:
        harmless: name of the part that decides.
        others: weights of all others.
        threshold: of the normalised harmless score.
    """

    harmless: str
    others: WeightedSum
    threshold: float = 0.0

    def __call__(self, parts: Scores) -> torch.Tensor:
        return gate(
            self.others(_without(parts, self.harmless)), parts[self.harmless], threshold=self.threshold
        )


@dataclass
class Lagrangian:
    """The weighted sum of the others under a constraint on harm, whose price is the learned multiplier (Safe RLHF).

    Attributes:
        harmless: name of the constrained part; the cost of a response is minus its normalised score.
        others: weights of all others.
        multiplier: λ, the price now.
        average: moving average of the mean harmless score of an iteration; None before the first.
        cost_limit: mean cost that is allowed.
        rate, maximum: step size and upper bound of the multiplier.
        decay: of the moving average.
    """

    harmless: str
    others: WeightedSum
    multiplier: float = 1.0
    average: float | None = None
    cost_limit: float = 0.0
    rate: float = 0.1
    maximum: float = 10.0
    decay: float = 0.5

    def __call__(self, parts: Scores) -> torch.Tensor:
        return lagrangian(self.others(_without(parts, self.harmless)), parts[self.harmless], self.multiplier)

    def learn(
        self, parts: Scores, responses: int, reduce: Reduce, *, actor_learns: bool = True
    ) -> dict[str, float]:
        """A step of the multiplier if the actor learns; returns the one of the iteration, and the mean cost."""
        mean = float(reduce(parts[self.harmless].double().sum())) / responses
        self.average = mean if self.average is None else self.decay * self.average + (1 - self.decay) * mean
        used = {"multiplier": self.multiplier, "cost": -mean}
        if actor_learns:
            self.multiplier = update_multiplier(
                self.multiplier,
                self.average,
                cost_limit=self.cost_limit,
                learning_rate=self.rate,
                maximum=self.maximum,
            )
        return used

    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multiplier, self.average = state["multiplier"], state["average"]


def make_combination(join: Join, weights: dict[str, float]) -> Combination:
    """The combination that a recipe asks for.

    Args:
        join: section join.
        weights: of all parts by name.
    """
    if join.method == "weighted":
        return WeightedSum(weights)
    others = WeightedSum({name: weight for name, weight in weights.items() if name != join.harmless})
    if join.method == "gate":
        return Gate(join.harmless, others, join.threshold)
    return Lagrangian(
        join.harmless,
        others,
        multiplier=join.multiplier,
        cost_limit=join.cost_limit,
        rate=join.multiplier_rate,
        maximum=join.multiplier_max,
        decay=join.cost_decay,
    )


def _without(parts: Scores, name: str) -> dict[str, torch.Tensor]:
    return {other: scores for other, scores in parts.items() if other != name}
