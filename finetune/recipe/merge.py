"""A merge as a step of a pipeline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.recipe.schema import Section, Step, Text


class Merge(Section):
    """What is merged, and how; as the options of `python -m finetune merge` for one adapter."""

    adapter: Text = Field(description="adapter folder, such as runs/NAME/adapter")
    base: str | None = Field(default=None, description="base, if not the one that the adapter names")
    onto: Literal["original", "dequantized"] | None = Field(
        default=None, description="original weights, or the rounded ones that training on nf4 saw"
    )
    format: Literal["baichuan", "llama"] = Field(default="baichuan", description="layout of the result")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None, description="precision to write; null is the base's own"
    )
    max_shard_size: Text = Field(default="5GB", description="largest weight file")
    verify: bool | None = Field(
        default=None, description="compare with base and adapter; null does if memory allows"
    )
    force_base: bool = Field(default=False, description="merge even if the base may be another one")


class MergeRecipe(Step):
    """Stage merge: an adapter into the weights of its base; output_dir is the model folder."""

    merge: Merge
