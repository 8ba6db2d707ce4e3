"""LoRA, QLoRA, P-Tuning and prefix tuning on Baichuan; merging and conversion."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.adapters.build import attach_adapter, load_adapter, save_adapter
    from finetune.adapters.convert import convert_adapter
    from finetune.adapters.merge import merge_adapter

__all__ = ["attach_adapter", "convert_adapter", "load_adapter", "merge_adapter", "save_adapter"]

_HOME = {"convert_adapter": "convert", "merge_adapter": "merge"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'build')}"), name)
