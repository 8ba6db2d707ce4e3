"""How much memory a run will take, before it is run.

A sum of parts that are each understood: frozen weights, adapter with gradient and optimiser state, saved
activations, the loss, and workspace. Sizes in bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.train.activations import activation_bytes, host_bytes

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

GIB = 2**30
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""A 4-bit weight, and its share of a block's 8-bit scale and the scale's own float32 scale."""

OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw": 0, "paged_adamw_8bit": 0}
"""State of a trainable parameter on the device; paged state moves to host memory under pressure."""

CONTEXT_BYTES = {"cuda": int(0.6 * GIB), "cpu": int(0.85 * GIB)}
"""Before any tensor: CUDA context and libraries, or Python with torch, friends and kernels compiled for the shape."""


@dataclass(frozen=True)
class MemoryPrediction:
    """Predicted peak.

    Attributes:
        parts: name → bytes.
        device_type: ``cuda`` or ``cpu``.
        host: bytes of host memory that activations are moved to.
    """

    parts: dict[str, int]
    device_type: str
    host: int = 0

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        listed = ", ".join(
            f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size > GIB / 200
        )
        return f"{self.total / GIB:.2f} GiB ({listed})"


def predict_memory(
    recipe: Recipe,
    config: dict[str, Any],
    trainable: int,
    *,
    device_type: str,
    longest: int | None = None,
    sequences: int = 1,
) -> MemoryPrediction:
    """Predict the peak memory of training.

    Args:
        recipe: the run.
        config: the base's configuration as a dictionary.
        trainable: number of trainable parameters.
        device_type: ``cuda`` or ``cpu``.
        longest: tokens of the longest row; None is data.max_length.
        sequences: rows that go through the model for each one that train.batch_size counts.
    """
    settings, train, adapter = recipe.model, recipe.train, recipe.adapter
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    width = 4 if device_type == "cpu" else DTYPE_BYTES[settings.dtype]
    body = layers * (4 * hidden * hidden + 3 * hidden * wide)
    per_weight = {"none": float(width), "int8": 1.0, "nf4": NF4_BYTES}[settings.quantization]

    virtual = adapter.num_virtual_tokens if adapter.method != "lora" else 0
    length = min(longest or recipe.data.max_length, recipe.data.max_length) + virtual
    tokens = max(1, train.batch_size) * sequences * length  # auto, not yet decided, is at least 1
    from finetune.baichuan.int8_rows import STEP
    from finetune.baichuan.loss import tile_rows

    tile = min(tokens, tile_rows(vocab, device_type))
    # In float32 and, on a GPU, their softmax beside them and a copy of either in 16 bits.
    logits = tile * vocab * (4 if device_type == "cpu" else width + 2 * 4)
    embeddings = 2 * vocab * hidden * width
    if settings.embeddings == "int8":
        embeddings = 2 * vocab * (hidden + 4)
        logits += 2 * STEP * hidden * width
    dequantised = 0 if settings.quantization == "none" else 2 * hidden * max(wide, 3 * hidden) * width
    kept, again = activation_bytes(
        recipe, config, tokens=tokens, length=length, width=width, device_type=device_type
    )
    parts = {
        "weights": int(body * per_weight + embeddings),
        "adapter": trainable * 4,
        "gradients": trainable * 4,
        "optimizer": trainable * OPTIMIZER_BYTES[train.optimizer],
        "activations": kept + again,
        # The logits are gone when the first layer is computed again.
        "loss": tokens * hidden * (width + 4) + max(0, logits - again),
        "workspace": int(dequantised + CONTEXT_BYTES[device_type]),
    }
    return MemoryPrediction(parts, device_type, host_bytes(recipe, config, tokens=tokens, width=width))


def suggestions(
    recipe: Recipe,
    config: dict[str, Any],
    trainable: int,
    budget: int,
    *,
    longest: int | None = None,
    sequences: int = 1,
) -> list[str]:
    """Overrides that would make a run fit ``budget`` bytes of GPU memory, cheapest first; else as `predict_memory`.

    If no single change is enough it is their combination, with a lower rank where it takes that, and nothing if
    that is not enough either.
    """

    def total(made: Recipe) -> int:
        parameters = trainable
        if made.adapter.rank != recipe.adapter.rank:
            parameters, _ = count_parameters(made, config)
        prediction = predict_memory(
            made, config, parameters, device_type="cuda", longest=longest, sequences=sequences
        )
        return prediction.total

    def promise(text: str, made: Recipe) -> list[str]:
        size = total(made)
        return [f"{text} (predicted {size / GIB:.1f} GiB)"] if size <= budget else []

    def with_rank(start: Recipe, text: str = "") -> list[str]:
        """The highest of half the rank, a quarter and so on that is enough."""
        given = getattr(recipe.model, "adapter", None)  # one that is gone on from has its rank
        rank = recipe.adapter.rank // 2 if recipe.adapter.method == "lora" and given is None else 0
        while rank >= LEAST_RANK:
            if found := promise(f"{text}adapter.rank={rank}", changed(start, {"adapter": {"rank": rank}})):
                return found
            rank //= 2
        return []

    changes = _changes(recipe)
    found = []
    for text, update in changes:
        made = changed(recipe, update)
        if not made.problems():
            found += promise(text, made)
    found += with_rank(recipe)
    if found:
        return found
    together, texts = recipe, []
    for text, update in changes:
        if not (made := changed(together, update)).problems():
            together = made
            texts.append(text)
    if not texts:
        return []
    return promise(" ".join(texts), together) or with_rank(together, " ".join(texts) + " ")


LEAST_RANK = 8
"""Lower ranks are not suggested: what they save is little by then, and they learn less."""


def changed(recipe: Recipe, update: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe with other values in its sections: section → key → value."""
    sections = {
        section: getattr(recipe, section).model_copy(update=values) for section, values in update.items()
    }
    return recipe.model_copy(update=sections)


def _changes(recipe: Recipe) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """What could save memory, as overrides and as values, cheapest first; nf4 before int8 embeddings."""
    model, train, length = recipe.model, recipe.train, recipe.data.max_length
    changes: list[tuple[str, dict[str, dict[str, Any]]]] = []
    if train.batch_size > 1:
        rows = train.gradient_accumulation * train.batch_size
        text = f"train.batch_size=1 train.gradient_accumulation={rows}"
        changes.append((text, {"train": {"batch_size": 1, "gradient_accumulation": rows}}))
    if train.gradient_checkpointing is not True:
        changes.append(("train.gradient_checkpointing=true", {"train": {"gradient_checkpointing": True}}))
    elif not train.activation_offloading:
        changes.append(("train.activation_offloading=true", {"train": {"activation_offloading": True}}))
    embeddings = ("model.embeddings=int8", {"model": {"embeddings": "int8"}})
    if model.embeddings == "full" and model.quantization != "none":
        changes.append(embeddings)
    if length > 512:
        changes.append((f"data.max_length={length // 2}", {"data": {"max_length": length // 2}}))
    if model.quantization != "nf4":
        changes.append(("model.quantization=nf4", {"model": {"quantization": "nf4"}}))
    if model.embeddings == "full" and model.quantization == "none":
        changes.append(embeddings)
    return changes


def count_parameters(recipe: Recipe, config: dict[str, Any]) -> tuple[int, int]:
    """Trainable and total parameters of a run, counted on a model without memory.

    Returns:
        (trainable, total), the total including the adapter.

    Raises:
        UserError: if adapter.targets names no matrix of the model.
    """
    import torch
    from peft import get_peft_model

    from finetune.adapters.build import adapter_config, check_targets
    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.baichuan.load import Base
    from finetune.baichuan.modeling import BaichuanForCausalLM

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        model = BaichuanForCausalLM(BaichuanConfig.from_dict(plain))
        model.requires_grad_(False)
        settings = recipe.adapter
        check_targets(model, settings)
        if settings.method == "lora":
            settings = settings.model_copy(update={"init": "default", "dora": False})
        from pathlib import Path

        base = Base(recipe.model.base, Path(), recipe.model.base)
        model.name_or_path = base.identity
        peft_config = adapter_config(settings, base)
        peft_model: Any = get_peft_model(model, peft_config)
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    if recipe.adapter.method == "lora" and recipe.adapter.dora:
        trainable += sum(m.out_features for n, m in model.named_modules() if n.endswith("base_layer"))
    total = sum(p.numel() for p in model.parameters() if not p.requires_grad) + trainable
    return trainable, total
