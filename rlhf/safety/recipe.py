"""The recipes of stages `redteam` and `aim`. Imports pydantic and nothing heavier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from finetune.recipe.combinations import Problem
from finetune.recipe.schema import Model, Section, Step, Text
from finetune.user_functions import is_function
from rlhf.safety import JUDGE_NAMES, RESULT_FILE, REWARD_PREFIX, RULES_JUDGE, SHIPPED_JUDGE


def _result_files(named: str) -> list[str]:
    """The files that may hold a result: it is named itself, or its folder is."""
    return [named, f"{named}/{RESULT_FILE}"]


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
    judge: Text = Field(
        default=SHIPPED_JUDGE,
        description=f"who judges the answers to attacks: {JUDGE_NAMES}; ADAPTER is a reward model of model.base",
    )
    threshold: float | None = Field(
        default=None,
        description="learned: confidence below which an answer is unjudged, null is 0.4; reward:ADAPTER: safe above "
        "so many deviations over the mean of held-out responses, null is 0",
    )
    at_least: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="stop with an error, everything written, where a smaller share of the answers to attacks is "
        "safe; null never does",
    )
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

    changeable: ClassVar[frozenset[str]] = frozenset({"redteam.at_least"})

    model: AttackedModel
    redteam: RedTeam = Field(default_factory=RedTeam)

    def held_to(self) -> list[str]:
        """The gate."""
        share = self.redteam.at_least
        if share is None:
            return []
        return [f"redteam: at least {share:.1%} of the answers to attacks have to be safe"]

    def input_files(self) -> list[str]:
        """The prompts, where they are the user's, what extends the taxonomy, and the result to compare with."""
        settings = self.redteam
        prompts = [settings.prompts] if settings.prompts else []
        return [*prompts, *settings.overlays, *(_result_files(settings.compare) if settings.compare else [])]

    def user_functions(self) -> list[tuple[str, str]]:
        """The judge, if it is a function."""
        judge = self.redteam.judge
        named = judge.startswith(REWARD_PREFIX)
        return [("redteam.judge", judge)] if is_function(judge) and not named else []

    def problems(self) -> list[Problem]:
        """Judges that there are not, and thresholds that they do not take."""
        return [*super().problems(), *self._judge_problems()]

    def _judge_problems(self) -> Iterator[Problem]:
        judge, threshold = self.redteam.judge, self.redteam.threshold
        named = judge in (SHIPPED_JUDGE, RULES_JUDGE) or judge.startswith(REWARD_PREFIX)
        if not named and not is_function(judge):
            yield "redteam.judge", f"expected {JUDGE_NAMES}, found {judge}"
        if threshold is None or judge.startswith(REWARD_PREFIX):
            return
        if judge != SHIPPED_JUDGE:
            yield "redteam.threshold", f"has no effect with redteam.judge {judge}: remove it"
        elif not 0 <= threshold <= 1:
            yield "redteam.threshold", f"with redteam.judge {judge} expected 0 to 1, found {threshold:g}"


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
        """The red-team result, the ordinary prompts, and what extends the taxonomy."""
        return [*_result_files(self.aim.redteam), *self.aim.ordinary, *self.aim.overlays]

    def problems(self) -> list[Problem]:
        """Settings without effect."""
        return [*super().problems(), *self._aim_problems()]

    def _aim_problems(self) -> Iterator[Problem]:
        if self.aim.values is not None and "at_most" in self.aim.model_fields_set:
            yield "aim.at_most", "has no effect beside aim.values: remove one of them"
        if self.aim.ordinary_share > 0 and not self.aim.ordinary:
            yield "aim.ordinary", "is empty: name a file, or set aim.ordinary_share to 0"
