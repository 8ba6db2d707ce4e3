"""Who draws a balanced sample for `data.sampling`. A name only, imported when it is needed.

Beside the tables of stages and commands this is all that finetune knows of other packages.
"""

from __future__ import annotations

import importlib
from typing import Any

SAMPLER = "rlhf.taxonomy.drawing:draw"
"""A `finetune.data.sampling.Sampler`, as "module:function"."""


def load_sampler() -> Any:
    """The function that `SAMPLER` names."""
    module, _, name = SAMPLER.partition(":")
    return getattr(importlib.import_module(module), name)
