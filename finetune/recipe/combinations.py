"""Settings that are fine each by itself and cannot work together: the reason, and what to do.

What peft can do was read in its source (0.21): tuners/lora/layer.py, tuners/lora/dora.py,
utils/loftq_utils.py, utils/integrations.py, peft_model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

Problem = tuple[str, str]
"""(dotted key, reason and remedy)"""


METHOD_KEYS: dict[str, tuple[str, ...]] = {
    "lora": ("rank", "alpha", "dropout", "targets", "rslora", "dora", "init"),
    "ptuning": ("num_virtual_tokens", "encoder", "encoder_hidden_size", "encoder_layers", "encoder_dropout"),
    "prefix": ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size"),
}
"""The keys of section adapter that each method reads, beside `method`."""


def find(recipe: Recipe) -> list[Problem]:
    """All combinations in the recipe that are not supported; none if it can run.

    Args:
        recipe: every setting already of the right type and in its range.
    """
    return [
        *_foreign_keys(recipe),
        *_lora(recipe),
        *_prompt_methods(recipe),
        *_training(recipe),
        *_sampling(recipe),
    ]


def _foreign_keys(recipe: Recipe) -> Iterator[Problem]:
    """Keys of another adapter method: they would have no effect, which nobody who wrote them expects."""
    method = recipe.adapter.method
    for key in sorted(recipe.adapter.model_fields_set - {"method", *METHOD_KEYS[method]}):
        owners = " and ".join(name for name, keys in METHOD_KEYS.items() if key in keys)
        yield (
            f"adapter.{key}",
            f"belongs to method {owners} and has no effect with adapter.method {method}: remove it",
        )


def _lora(recipe: Recipe) -> Iterator[Problem]:
    adapter, quantization = recipe.adapter, recipe.model.quantization
    if adapter.method != "lora":
        return
    if quantization != "none":
        if adapter.init.startswith("pissa"):
            yield (
                "adapter.init",
                f"{adapter.init} takes singular vectors of full-precision weights, and model.quantization "
                f"is {quantization}: set adapter.init to olora, which works on quantised weights, "
                "or model.quantization to none",
            )
        if adapter.init == "loftq":
            yield (
                "adapter.init",
                "loftq computes the error of quantising full-precision weights, and model.quantization "
                f"{quantization} drops them: set model.quantization to none (loftq rounds to nf4 itself)",
            )
        if adapter.init == "orthogonal":
            yield (
                "adapter.init",
                "orthogonal makes the adapter in the weights' own type, and model.quantization "
                f"{quantization} stores integers, which cannot be trained: set adapter.init to default, "
                "or model.quantization to none",
            )
    if adapter.init == "orthogonal" and adapter.rank % 2:
        yield (
            "adapter.rank",
            f"adapter.init orthogonal needs an even rank, found {adapter.rank}: set it to {adapter.rank + 1}",
        )
    if adapter.dora and quantization == "int8":
        yield (
            "adapter.dora",
            "DoRA unpacks the base weights at every step, and without a GPU peft loses the scales of int8 "
            "weights in doing so: set model.quantization to nf4 or none, or adapter.dora to false",
        )
    if adapter.dora and (adapter.init.startswith("pissa") or adapter.init in ("olora", "loftq")):
        yield (
            "adapter.dora",
            f"adapter.init {adapter.init} moves a part of the base weights into the adapter; to fit the "
            "original base again it has to become plain LoRA, which DoRA's magnitudes do not survive: "
            "set adapter.init to default, or adapter.dora to false",
        )


def _prompt_methods(recipe: Recipe) -> Iterator[Problem]:
    adapter = recipe.adapter
    if adapter.method == "lora":
        return
    if recipe.data.packing:
        yield (
            "data.packing",
            f"adapter.method {adapter.method} puts trained vectors in front of a document, and a pack holds "
            "several documents with one front: set data.packing to false",
        )
    if adapter.method == "prefix":
        if recipe.train.gradient_checkpointing:
            yield (
                "train.gradient_checkpointing",
                "adapter.method prefix lives in the key/value cache, which gradient checkpointing turns off: "
                "set train.gradient_checkpointing to false (a smaller train.batch_size saves memory instead)",
            )
        if adapter.encoder_hidden_size is not None and not adapter.prefix_projection:
            yield (
                "adapter.encoder_hidden_size",
                "sizes the network of adapter.prefix_projection, which is false: "
                "set that to true, or remove this key",
            )
    if adapter.method == "ptuning" and adapter.encoder != "lstm":
        for key, default in (("encoder_layers", 2), ("encoder_dropout", 0.0)):
            if getattr(adapter, key) != default:
                yield (
                    f"adapter.{key}",
                    "is read by adapter.encoder lstm only, the mlp has two hidden layers and no dropout: "
                    "set adapter.encoder to lstm, or remove this key",
                )
    if adapter.method == "ptuning" and adapter.encoder == "none" and adapter.encoder_hidden_size is not None:
        yield (
            "adapter.encoder_hidden_size",
            "sizes the network of adapter.encoder, which is none: set that to mlp or lstm, or remove this key",
        )


def _training(recipe: Recipe) -> Iterator[Problem]:
    data, train = recipe.data, recipe.train
    if data.validation is not None and data.validation_share > 0:
        yield (
            "data.validation_share",
            "data.validation names held-out data already: remove one of the two",
        )
    if train.eval_every is not None and data.validation is None and data.validation_share == 0:
        yield (
            "train.eval_every",
            "there is nothing to evaluate on: set data.validation or data.validation_share, or remove this",
        )
    if train.schedule == "constant" and train.warmup_ratio > 0:
        yield (
            "train.warmup_ratio",
            "train.schedule constant has no warm-up: set train.schedule to constant_with_warmup",
        )
    if recipe.model.embeddings == "int8" and recipe.model.quantization == "none":
        yield (
            "model.embeddings",
            "int8 goes with a quantised base, of which embeddings and head are a large part: set "
            "model.quantization to nf4 or int8, or model.embeddings to full",
        )
    if train.gradient_checkpointing == "attention" and recipe.model.attention in ("eager", "flex_attention"):
        yield (
            "train.gradient_checkpointing",
            f"attention keeps what SDPA or FlashAttention computes, and model.attention is {recipe.model.attention}, "
            "which it cannot see: set train.gradient_checkpointing to true, or model.attention to auto",
        )
    if train.compile and train.activation_offloading:
        yield (
            "train.compile",
            "compiled layers do not let go of what they save, as train.activation_offloading wants: "
            "set one of the two to false",
        )
    if train.compile and recipe.model.attention.startswith("flash_attention"):
        yield (
            "model.attention",
            f"{recipe.model.attention} takes no mask, by which compiled layers (train.compile) keep packed "
            "documents apart: set model.attention to auto, or train.compile to false",
        )
    if train.compile and train.kernels == "liger":
        yield (
            "train.kernels",
            "train.compile fuses the same operations itself: set train.kernels to auto, or train.compile to false",
        )
    if train.activation_offloading and train.gradient_checkpointing is not True:
        found = str(train.gradient_checkpointing).lower()
        yield (
            "train.activation_offloading",
            f"moves the layers' inputs, which are all that train.gradient_checkpointing true keeps; it is {found}: "
            "set it to true, or remove this key",
        )
    if recipe.model.attention.startswith("flash_attention") and recipe.model.dtype == "float32":
        yield (
            "model.attention",
            f"{recipe.model.attention} computes in 16 bits only, and model.dtype is float32: "
            "set model.dtype to bfloat16, or model.attention to auto",
        )
    if recipe.stage == "pretrain" and data.system is not None:
        yield "data.system", "stage pretrain learns raw text, which has no system message: remove this key"


def _sampling(recipe: Recipe) -> Iterator[Problem]:
    sampling = recipe.data.sampling
    if sampling is None:
        return
    if recipe.stage == "pretrain":
        yield (
            "data.sampling",
            "balances what prompts ask, and stage pretrain learns raw text: remove this section",
        )
    if any(source.weight != 1 for source in recipe.data.train_sources()):
        yield (
            "data.sampling",
            "weights in data.train would undo the balance over categories: remove the weights or this section",
        )
    if sampling.method == "quota" and sampling.temperature is not None:
        yield (
            "data.sampling.temperature",
            "has no effect with method quota: set data.sampling.method to temperature, or remove this key",
        )
