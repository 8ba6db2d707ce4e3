"""What a response is worth: reward adapters on the shared base, merged reward models, Python functions, or several.

A Python function takes conversations, each a list of messages that ends with the response, and returns a number
for each:

    def politeness(conversations: list[list[dict[str, str]]]) -> list[float]: ...
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from finetune.errors import UserError
from finetune.user_functions import find_function, is_function
from finetune.words import plural
from rlhf.ppo.combine import Combination, WeightedSum, make_combination
from rlhf.ppo.errors import RunStopped
from rlhf.ppo.functional import Reduce
from rlhf.ppo.rollout import last_hidden

if TYPE_CHECKING:
    from finetune.baichuan.load import Base
    from finetune.data.records import Message
    from rlhf.ppo.models import SharedBase
    from rlhf.ppo.recipe import PPORecipe
    from rlhf.ppo.reward_sections import RewardPart

Conversations = list[list["Message"]]

MEND = "mend it, then run again, with --resume where a checkpoint was saved"


class RewardError(RunStopped):
    """A reward could not be computed."""


@dataclass(frozen=True)
class Answered:
    """A prompt with its response, as rewards see it.

    Attributes:
        messages: the conversation, the response last.
        ids: the same as token ids, ended by EOS, whether or not the response ended by itself: reward models
            know finished conversations only, and what is not finished is penalised apart.
    """

    messages: list[Message]
    ids: list[int]


class Reward(Protocol):
    """Scores of responses, one a response."""

    def __call__(self, answered: Sequence[Answered]) -> Sequence[float]: ...


@dataclass
class Part:
    """One reward.

    Attributes:
        name: in metrics.
        path: where it comes from, for messages.
        score: raw scores.
        weight: of the normalised score in the sum.
        mean, std: of raw scores on held-out data, (score - mean) / std is the normalised one.
        adapter: its name on the shared base, if it is one, and
        head_weight: (hidden_size,), of its head.
    """

    name: str
    path: str
    score: Reward
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    adapter: str | None = None
    head_weight: torch.Tensor | None = None

    def normalise(self, scores: torch.Tensor) -> torch.Tensor:
        """(b,) raw → (b,) with mean 0 and deviation 1 on held-out data."""
        return (scores - self.mean) / self.std


@dataclass
class Rewards:
    """All parts, and how they are joined.

    Attributes:
        parts: one at least.
        combine: the weighted sum unless given.
    """

    parts: list[Part]
    combine: Combination = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.combine = self.combine or WeightedSum({part.name: part.weight for part in self.parts})

    @property
    def first_adapter(self) -> Part | None:
        """The first part that is an adapter on the shared base."""
        return next((part for part in self.parts if part.adapter), None)

    def __call__(self, answered: Sequence[Answered]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Joint scores (b,) and the raw ones (b,) of each part, float32 on the CPU.

        Raises:
            RewardError: a function raised, or returned something else than a finite number for each response.
        """
        raw = {part.name: _checked(part, answered) for part in self.parts}
        return self.combine(self._normalised(raw)), raw

    def learn(
        self, raw: dict[str, torch.Tensor], responses: int, reduce: Reduce, *, actor_learns: bool
    ) -> dict[str, float]:
        """Let the combination take in an iteration's raw scores; see `rlhf.ppo.combine.Combination.learn`."""
        return self.combine.learn(self._normalised(raw), responses, reduce, actor_learns=actor_learns)

    def _normalised(self, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {part.name: part.normalise(raw[part.name]) for part in self.parts}


def _checked(part: Part, answered: Sequence[Answered]) -> torch.Tensor:
    where = f"ppo.reward: {part.path}"
    found = part.score(answered)
    try:
        scores = [float(score) for score in found]
    except (TypeError, ValueError) as error:
        raise RewardError(f"{where}: expected a list of numbers, found {found!r:.80}", hint=MEND) from error
    if len(scores) != len(answered):
        raise RewardError(
            f"{where}: expected {plural(len(answered), 'number')}, one for each response, found {len(scores)}",
            hint=MEND,
        )
    for score, each in zip(scores, answered):
        if not math.isfinite(score):
            raise RewardError(
                f"{where}: expected finite numbers, found {score} for the response "
                f"{each.messages[-1]['content']!r:.80}",
                hint=MEND,
            )
    return torch.tensor(scores, dtype=torch.float32)


# --- where rewards come from --------------------------------------------------------------------------------


def check_rewards(recipe: PPORecipe, base: Base, tokenizer: Any) -> None:
    """Find what can be found wrong before weights are loaded.

    Raises:
        UserError: a function cannot be imported, a folder holds no reward model, or one for another base.
    """
    from rlhf.reward.adapter import check_fits, read_info

    for part in recipe.reward_parts():
        if is_function(part.path):
            find_function(part.path, "ppo.reward")
            continue
        folder = Path(recipe.resolve(part.path))
        if not folder.is_dir():
            raise UserError(
                f"ppo.reward: {part.path}: no such folder, and no package.module:function",
                hint="train a reward model with stage reward, and give the adapter/ folder of its run",
            )
        if (folder / "adapter_config.json").is_file() or not (folder / "config.json").is_file():
            check_fits(folder, read_info(folder), base=base, tokenizer=tokenizer)


def build_rewards(
    recipe: PPORecipe, models: SharedBase, base: Base, tokenizer: Any, *, batch_size: int
) -> Rewards:
    """The rewards of a recipe; adapters are put on the shared base as ``reward_1``, ``reward_2``, …

    Names of the recipe's would not do: peft's must not hold dots, and without them a.b and a_b could be one.

    Raises:
        UserError: see `check_rewards`.
    """
    parts = []
    for number, part in enumerate(recipe.reward_parts(), start=1):
        folder = Path(recipe.resolve(part.path))
        if is_function(part.path):
            parts.append(_function_part(part))
        elif (folder / "adapter_config.json").is_file():
            adapter = f"reward_{number}"
            parts.append(_adapter_part(part, folder, adapter, models, base, tokenizer, batch_size))
        else:
            parts.append(_merged_part(part, folder, recipe, batch_size))
    weights = {part.name: part.weight for part in parts}
    return Rewards(parts, make_combination(recipe.join, weights))


def _part(part: RewardPart, score: Reward, mean: float, std: float) -> Part:
    """With the recipe's mean and deviation, where it has them, in place of those given."""
    mean = mean if part.mean is None else part.mean
    return Part(str(part.name), part.path, score, part.weight, mean, part.std or std)


def _function_part(part: RewardPart) -> Part:
    function = find_function(part.path, "ppo.reward")

    def score(answered: Sequence[Answered]) -> Sequence[float]:
        # Copies: what a function does to its arguments must not reach prompts that come again.
        conversations = [[message.copy() for message in each.messages] for each in answered]
        try:
            found = function(conversations)
            return list(found) if isinstance(found, Iterator) else found  # a generator fails when it is read
        except Exception as error:  # whatever somebody else's function raises
            *_, last = traceback.extract_tb(error.__traceback__)
            raise RewardError(
                f"ppo.reward: {part.path} raised {type(error).__name__}: {error} "
                f"({Path(last.filename).name}:{last.lineno})",
                hint=MEND,
            ) from error

    return _part(part, score, 0.0, 1.0)


def _adapter_part(
    part: RewardPart,
    folder: Path,
    adapter: str,
    models: SharedBase,
    base: Base,
    tokenizer: Any,
    batch_size: int,
) -> Part:
    from rlhf.reward.adapter import load_reward

    loaded = load_reward(folder, models.peft, base=base, tokenizer=tokenizer, name=adapter)
    models.register(adapter)

    def score(answered: Sequence[Answered]) -> Sequence[float]:
        return _in_batches(
            answered,
            batch_size,
            lambda some: loaded.head(last_hidden(models, adapter, [each.ids for each in some])),
        )

    found = _part(part, score, loaded.info.mean, loaded.info.std)
    found.adapter, found.head_weight = adapter, loaded.head.weight
    return found


def _merged_part(part: RewardPart, folder: Path, recipe: PPORecipe, batch_size: int) -> Part:
    """A sequence classifier with its own weights and tokenizer; reward.json beside them says what scores mean."""
    from transformers import AutoModelForSequenceClassification

    from finetune.baichuan.chat import build_example
    from finetune.baichuan.checkpoints import read_json
    from finetune.baichuan.load import compute_dtype, load_tokenizer, pick_device

    device = pick_device()
    tokenizer = load_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=compute_dtype(recipe.model.dtype, device), device_map={"": device}
    ).eval()
    if model.config.num_labels != 1:
        raise UserError(f"{folder}: a classifier of {model.config.num_labels} labels, expected one score")
    info = read_json(folder / "reward.json") if (folder / "reward.json").is_file() else {}

    def scores_of(some: Sequence[Answered]) -> torch.Tensor:
        rows = [build_example(tokenizer, each.messages, max_length=2**31)["input_ids"] for each in some]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        return model(input_ids=ids, attention_mask=mask).logits[:, 0]

    def score(answered: Sequence[Answered]) -> Sequence[float]:
        return _in_batches(answered, batch_size, scores_of)

    return _part(part, score, float(info.get("mean", 0.0)), float(info.get("std", 1.0)))


@torch.no_grad()
def _in_batches(
    answered: Sequence[Answered], batch_size: int, score: Callable[[Sequence[Answered]], torch.Tensor]
) -> list[float]:
    """Scores in the order given, computed with those of like length together."""
    order = sorted(range(len(answered)), key=lambda row: len(answered[row].ids))
    scores = [0.0] * len(answered)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for row, value in zip(chosen, score([answered[i] for i in chosen]).float().tolist()):
            scores[row] = value
    return scores
