"""What every section of a recipe is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]

Choice = Mapping[str, tuple[str, ...]]
"""The values of a key, and which keys beside it are read with each: `{"ipo": (), "robust": ("label_smoothing",)}`."""


class Section(BaseModel):
    """A group of settings: unknown keys are refused, types are strict."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    choices: ClassVar[Mapping[str, Choice]] = {}
    """By the name of a key that others depend on (`method`): which of them are read with each of its values."""
