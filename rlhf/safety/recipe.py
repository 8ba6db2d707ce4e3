"""The recipes of stages `redteam` and `aim`. Imports pydantic and nothing heavier."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from finetune.recipe.combinations import Problem
from finetune.recipe.schema import Model, Section, Step, Text
from rlhf.safety import SHIPPED_JUDGE


class AttackedModel(Model):
    """What is attacked."""

    adapter: str | None = Field(
        default=None, min_length=1, description="adapter on the base, such as runs/NAME/adapter; null is none"
    )


class RedTeam(Section):
    """What is asked, and who judges; as the options of `python -m finetune redteam`."""

    prompts: str | None = Field(
        default=None, min_length=1, description="file of attack prompts; null is the shipped evaluation set"
    )
    judge: Text = Field(default=SHIPPED_JUDGE, description="who judges the answers to attacks")
    limit: int | None = Field(
        default=None,
        ge=1,
        description="at most so many attack prompts and as many harmless ones, spread over attacks and areas, "
        "the same in every run; null is all",
    )
    benign: bool = Field(default=True, description="measure over-refusal, too")
    system: str | None = Field(default=None, description="system message for prompts that bring none")
    max_new_tokens: int = Field(default=128, ge=1, description="longest answer")
    batch_size: int = Field(default=16, ge=1, description="prompts answered at once")
    overlays: list[Text] = Field(default=[], description="files that extend the safety taxonomy")
    compare: str | None = Field(
        default=None,
        min_length=1,
        description="folder of an earlier result to compare with; null compares with none",
    )


class RedTeamRecipe(Step):
    """Stage redteam: attack a model, judge its answers, and compare with an earlier result."""

    model: AttackedModel
    redteam: RedTeam = Field(default_factory=RedTeam)

    def input_files(self) -> list[str]:
        """The prompts, where they are the user's, and what extends the taxonomy."""
        return [*([self.redteam.prompts] if self.redteam.prompts else []), *self.redteam.overlays]


class Aim(Section):
    """What data is made of: a red-team result, and good answers to ordinary prompts."""

    redteam: Text = Field(description="folder of stage redteam: what to aim at")
    at_most: float = Field(
        default=0.5, ge=0, le=1, description="safety values with at most this safe rate are vulnerable"
    )
    values: list[Text] | None = Field(
        default=None,
        min_length=1,
        description="ids of safety values to aim at in place of the vulnerable ones",
    )
    dpo_prompts: int = Field(
        default=400, ge=1, description="at most so many attack prompts on those values, for DPO"
    )
    reward_prompts: int = Field(
        default=800, ge=1, description="at most so many on all values, for the reward model of harmlessness"
    )
    ppo_prompts: int = Field(default=800, ge=1, description="at most so many others on all values, for PPO")
    ordinary: list[Text] = Field(
        default=["examples/data/preference/train.jsonl"],
        description="files of ordinary prompts, conversations or preferences, whose good answers are set against "
        "refusals",
    )
    ordinary_share: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="share of ordinary prompts beside the attacks, in the data for DPO and harmlessness",
    )
    overlays: list[Text] = Field(default=[], description="files that extend the safety taxonomy")


class AimedModel(Section):
    """Whom the data is for; nothing of it is loaded."""

    base: Text = Field(description="the model of the stages around: chooses the blocks of for_base")


class AimRecipe(Step):
    """Stage aim: preference data and prompts aimed at what red-teaming found; output_dir holds the files."""

    model: AimedModel
    aim: Aim

    def input_files(self) -> list[str]:
        """The ordinary prompts, and what extends the taxonomy."""
        return [*self.aim.ordinary, *self.aim.overlays]

    def problems(self) -> list[Problem]:
        """Settings without effect."""
        return [*super().problems(), *self._aim_problems()]

    def _aim_problems(self) -> Iterator[Problem]:
        if self.aim.values is not None and "at_most" in self.aim.model_fields_set:
            yield "aim.at_most", "has no effect beside aim.values: remove one of them"
        if self.aim.ordinary_share > 0 and not self.aim.ordinary:
            yield "aim.ordinary", "is empty: name a file, or set aim.ordinary_share to 0"
