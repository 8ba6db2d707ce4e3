"""What the recipes of all stages of rlhf share. Imports pydantic and nothing heavier."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from finetune.recipe.combinations import Problem
from finetune.recipe.schema import Data, Model, Recipe


class StartModel(Model):
    """Which base, and the adapter that training goes on from."""

    adapter: str | None = Field(
        default=None,
        min_length=1,
        description="LoRA adapter to go on from, such as runs/NAME/adapter, whose settings then take the "
        "place of section adapter (but dropout); null is a new one",
    )


class PreferenceData(Data):
    """Ranked responses, or pairs of a chosen and a rejected one."""

    families: list[str] = Field(
        default=["baichuan"],
        description="what source_model begins with in the model's own family; others are warned about",
    )


class RlhfRecipe(Recipe):
    """A recipe of a stage of rlhf."""

    model: StartModel

    def problems(self) -> list[Problem]:
        """Beside what no stage can do: what these cannot."""
        return [*super().problems(), *self._rlhf_problems()]

    def _rlhf_problems(self) -> Iterator[Problem]:
        adapter = self.adapter
        if adapter.method != "lora":
            yield (
                "adapter.method",
                f"stage {self.stage} switches adapters on one base, which lora allows: set it to lora "
                f"(found {adapter.method})",
            )
        elif adapter.init.startswith(("pissa", "olora", "loftq")):
            yield (
                "adapter.init",
                f"{adapter.init} changes the base, which stage {self.stage} shares with other adapters: "
                "set it to default, gaussian or orthogonal",
            )
        if self.model.embeddings == "int8" and self.stage != "reward":
            yield (
                "model.embeddings",
                f"stage {self.stage} multiplies by the head in 16 bits: set model.embeddings to full",
            )
        if self.train.z_loss_weight > 0:
            yield "train.z_loss_weight", f"stage {self.stage} has no max-z loss: remove this key"


def preference_problems(recipe: Recipe) -> Iterator[Problem]:
    """What cannot be asked of preference data."""
    sources = [*recipe.data.train_sources(), *recipe.data.validation_sources()]
    if any(source.format != "auto" for source in sources):
        yield "data.format", "preferences are recognised by their columns: leave out every format"
