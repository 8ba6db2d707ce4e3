"""Registration of the Baichuan classes with transformers' Auto classes."""

from __future__ import annotations


def register() -> None:
    """Make AutoConfig, AutoModel…, and AutoTokenizer know Baichuan; calling it again changes nothing."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.baichuan.modeling import (
        BaichuanForCausalLM,
        BaichuanForSequenceClassification,
        BaichuanModel,
    )
    from finetune.baichuan.tokenization import register_tokenizer

    AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
    AutoModel.register(BaichuanConfig, BaichuanModel, exist_ok=True)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        BaichuanConfig, BaichuanForSequenceClassification, exist_ok=True
    )
    register_tokenizer()
