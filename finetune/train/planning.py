"""Will it fit, what else would, and how long will it take: the questions before a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from finetune.train.memory import MemoryPrediction, predict_memory

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe
    from finetune.train.devices import Device

HEADROOM = 0.95
"""Of a device's memory, what a prediction may fill: the rest is fragmentation, and whatever else runs there."""

LENGTH_STEP = 128
MOST_TOKENS = 2**20


class Plan:
    """A recipe on a device.

    Args:
        recipe: the run.
        config: the base's configuration as a dictionary.
        trainable: number of trainable parameters.
        device: what to train on.
        longest: tokens of the longest row; None is data.max_length.
        sequences: rows that go through the model for each one that train.batch_size counts.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: dict[str, Any],
        trainable: int,
        device: Device,
        longest: int | None = None,
        sequences: int = 1,
    ) -> None:
        self.recipe, self.config, self.trainable, self.device = recipe, config, trainable, device
        self.longest, self.sequences = longest, sequences

    def memory(self, *, length: int | None = None, batch_size: int | None = None) -> MemoryPrediction:
        """The predicted peak, as the recipe is or with other rows."""
        recipe = self.recipe
        if batch_size is not None:
            recipe = recipe.model_copy(
                update={"train": recipe.train.model_copy(update={"batch_size": batch_size})}
            )
        longest = self.longest
        if length is not None:
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})
            longest = None
        return predict_memory(
            recipe,
            self.config,
            self.trainable,
            device_type=self.device.kind,
            longest=longest,
            sequences=self.sequences,
        )

    def fits(self, prediction: MemoryPrediction | None = None) -> bool:
        """Whether a prediction, by default the recipe's, stays below the device's memory less headroom."""
        return (prediction or self.memory()).total <= HEADROOM * self.device.memory

    def longest_length(self) -> int:
        """The largest data.max_length that fits at the recipe's batch size, a multiple of 128; 0 if none does."""
        steps = _largest(lambda n: self.fits(self.memory(length=n * LENGTH_STEP)), MOST_TOKENS // LENGTH_STEP)
        return steps * LENGTH_STEP

    def largest_batch(self) -> int:
        """The largest train.batch_size that fits at the recipe's row length; 0 if none does."""
        return _largest(lambda n: self.fits(self.memory(batch_size=n)), 4096)


def with_batch_size(plan: Plan) -> Recipe:
    """The recipe with ``train.batch_size: auto`` decided.

    Rows of a step stay gradient_accumulation: batch_size becomes its largest divisor that fits, and
    accumulation shrinks to match, which changes no result, since losses are averaged over a step's tokens.
    """
    train = plan.recipe.train
    rows = train.gradient_accumulation
    divisors = [n for n in range(rows, 0, -1) if rows % n == 0]
    batch = next((n for n in divisors if plan.fits(plan.memory(batch_size=n))), 1)
    update = {"batch_size": batch, "gradient_accumulation": rows // batch}
    return plan.recipe.model_copy(update={"train": train.model_copy(update=update)})


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest n up to ``most`` for which ``holds``, which is true up to some n and false after; 0 if never."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
