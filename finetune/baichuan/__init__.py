"""The Baichuan model family. Names load on first use, so that importing the package costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.baichuan.modeling import (
        BaichuanForCausalLM,
        BaichuanForSequenceClassification,
        BaichuanModel,
    )
    from finetune.baichuan.tokenization import BaichuanTokenizer

__all__ = [
    "BaichuanConfig",
    "BaichuanForCausalLM",
    "BaichuanForSequenceClassification",
    "BaichuanModel",
    "BaichuanTokenizer",
]

_HOME = {
    "BaichuanConfig": "configuration",
    "BaichuanModel": "modeling",
    "BaichuanForCausalLM": "modeling",
    "BaichuanForSequenceClassification": "modeling",
    "BaichuanTokenizer": "tokenization",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
