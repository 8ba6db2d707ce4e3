"""The recipe of stage `reward`. Imports pydantic and nothing heavier."""

from __future__ import annotations

from pydantic import Field

from finetune.recipe.combinations import Problem
from finetune.recipe.schema import Section
from rlhf.recipe import PreferenceData, RlhfRecipe, preference_problems


class Reward(Section):
    """The ranking loss."""

    margin: float = Field(
        default=0.0,
        ge=0,
        description="how far apart the scores of two responses have to be for each step of their gap; "
        "0 asks for the right order only",
    )
    mean_score_coef: float = Field(
        default=0.0,
        ge=0,
        description="weight of the squared mean score of a prompt, which keeps scores near 0",
    )


class RewardRecipe(RlhfRecipe):
    """One run of stage reward. `train.batch_size` counts prompts, each with all of its responses."""

    data: PreferenceData
    reward: Reward = Field(default_factory=Reward)

    def problems(self) -> list[Problem]:
        """Beside those of every stage of rlhf: those of preference data."""
        return [*super().problems(), *preference_problems(self)]
