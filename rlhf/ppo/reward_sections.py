"""What a PPO recipe says of its rewards: which they are, what they are called, and how they become one."""

from __future__ import annotations

from itertools import chain, count
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from finetune.recipe.schema import Section, Text, path_or_list, path_or_section


class RewardPart(Section):
    """One reward of several."""

    path: str = Field(
        default="",
        validate_default=True,
        description="adapter folder of stage reward, merged reward model, or package.module:function",
    )
    weight: float = Field(default=1.0, description="what its normalised score is multiplied with")
    mean: float | None = Field(
        default=None, description="mean of its raw scores; null is what is stored with a reward model, or 0"
    )
    std: float | None = Field(
        default=None, gt=0, description="their deviation; null is what is stored with a reward model, or 1"
    )
    name: str | None = Field(
        default=None, min_length=1, description="what metrics call it; null is the last part of its path"
    )

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        if not path:
            raise ValueError("expected an adapter folder, a merged reward model or package.module:function")
        return path


_OnePart = Annotated[
    Annotated[Text, Tag("<path>")] | Annotated[RewardPart, Tag("<section>")],
    Discriminator(
        path_or_section,
        custom_error_type="reward_part",
        custom_error_message="expected a path or {path: ..., weight: ..., name: ...}",
    ),
]
Rewards = Annotated[
    Annotated[Text, Tag("<path>")] | Annotated[Annotated[list[_OnePart], Field(min_length=1)], Tag("<list>")],
    Discriminator(
        path_or_list,
        custom_error_type="rewards",
        custom_error_message="expected a path or a list of paths and {path: ..., weight: ...} entries",
    ),
]


def named_parts(rewards: Rewards) -> list[RewardPart]:
    """Rewards as a list, names filled in, which differ from each other and from those that were given."""
    entries = [rewards] if isinstance(rewards, str) else rewards
    parts = [RewardPart(path=entry) if isinstance(entry, str) else entry for entry in entries]
    taken = {part.name for part in parts}
    named: list[RewardPart] = []
    for part in parts:
        short = _short_name(part.path)
        numbered = (f"{short}_{number}" for number in count(2))
        name = part.name or next(name for name in chain([short], numbered) if name not in taken)
        taken.add(name)
        named.append(part.model_copy(update={"name": name}))
    return named


def _short_name(path: str) -> str:
    """`pkg.module:share` → share; `runs/reward_helpful/adapter` → reward_helpful."""
    if ":" in path:
        return path.rpartition(":")[2]
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..", "adapter")]
    return parts[-1] if parts else "reward"


JOIN_KEYS = {
    "weighted": (),
    "gate": ("harmless", "threshold"),
    "lagrangian": ("harmless", "multiplier", "multiplier_rate", "multiplier_max", "cost_limit", "cost_decay"),
}
"""Keys that each method of joining reads."""


class Join(Section):
    """How several rewards become one; all scores are normalised."""

    choices: ClassVar = {"method": JOIN_KEYS}

    method: Literal["weighted", "gate", "lagrangian"] = Field(
        default="weighted",
        description="weighted sum; gate: harmless below the threshold overrides the others; lagrangian: the others "
        "under a constraint on harm, with a learned multiplier",
    )
    harmless: Text = Field(
        default="harmless", description="gate, lagrangian: name of the reward that the others give way to"
    )
    threshold: float = Field(default=0.0, description="gate: harmless scores from here on pass")
    multiplier: float = Field(
        default=1.0, gt=0, description="lagrangian: price of harm in the first iteration"
    )
    multiplier_rate: float = Field(
        default=0.1, gt=0, description="lagrangian: step size of the multiplier's logarithm"
    )
    multiplier_max: float = Field(
        default=10.0, gt=0, description="lagrangian: the multiplier grows no further"
    )
    cost_limit: float = Field(
        default=0.0, description="lagrangian: mean cost (minus the harmless score) that is allowed"
    )
    cost_decay: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="lagrangian: decay of the moving average of an iteration's mean cost",
    )

    def summary(self) -> str:
        """What responses are held to, in a sentence."""
        if self.method == "gate":
            return (
                f"gate: responses whose {self.harmless} score is {self.threshold:g} or more are paid by the other "
                "rewards, those below by what they are short of it"
            )
        if self.method == "lagrangian":
            return (
                f"lagrangian: the {self.harmless} score is to be {0 - self.cost_limit:g} or more on average "
                f"(join.cost_limit {self.cost_limit:g}); price of harm {self.multiplier:g} at first, at most "
                f"{self.multiplier_max:g}"
            )
        return "weighted sum"
