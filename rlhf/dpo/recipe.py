"""The recipe of stage `dpo`. Imports pydantic and nothing heavier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from finetune.recipe.combinations import Problem
from finetune.recipe.schema import Adapter, Section
from rlhf.recipe import PreferenceData, RlhfRecipe, preference_problems


class PairData(PreferenceData):
    """Preferences, one pair to a row."""

    packing: bool = Field(
        default=False, description="always false: pairs are padded to the longest of a batch"
    )


class DPOAdapter(Adapter):
    """The trainable part; policy and reference have to be equal at first, so there is no dropout."""

    dropout: float = Field(default=0.0, ge=0, lt=1, description="always 0: policy and reference start equal")


class DPO(Section):
    """The loss of direct preference optimisation."""

    choices: ClassVar = {"loss": {"sigmoid": ("label_smoothing",), "ipo": (), "robust": ("label_smoothing",)}}

    loss: Literal["sigmoid", "ipo", "robust"] = Field(
        default="sigmoid",
        description="sigmoid (DPO), ipo (squared, no overconfidence) or robust (for noisy labels)",
    )
    beta: float = Field(
        default=0.1, gt=0, description="how closely the reference is kept to; for ipo the regularisation tau"
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="share of pairs that are taken to be labelled the wrong way round",
    )
    sft_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the chosen responses' own cross-entropy, which keeps their probability up",
    )
    pairs_per_prompt: int | None = Field(
        default=None,
        gt=0,
        description="at most so many pairs of a prompt with several ranked responses, widest gaps first; "
        "null is all",
    )


class DPORecipe(RlhfRecipe):
    """One run of stage dpo."""

    data: PairData
    adapter: DPOAdapter = Field(default_factory=DPOAdapter)
    dpo: DPO = Field(default_factory=DPO)

    def problems(self) -> list[Problem]:
        """Beside those of every stage of rlhf: those of preference data and of the loss."""
        return [*super().problems(), *preference_problems(self), *self._dpo_problems()]

    def _dpo_problems(self) -> Iterator[Problem]:
        if self.adapter.dropout > 0:
            yield (
                "adapter.dropout",
                "policy and reference have to start equal: set it to 0, or remove this key",
            )
        if self.data.packing:
            yield "data.packing", "stage dpo does not pack pairs: set it to false, or remove this key"
        if self.dpo.loss == "robust" and self.dpo.label_smoothing == 0:
            yield (
                "dpo.label_smoothing",
                "dpo.loss robust corrects for wrong labels: set the share of them, for example 0.1",
            )
        if self.dpo.loss == "ipo" and self.dpo.label_smoothing > 0:
            yield "dpo.label_smoothing", "has no effect with dpo.loss ipo: remove this key"
