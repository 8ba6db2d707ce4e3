"""How long an optimiser step will take, from the arithmetic it needs and what the device can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.baichuan.cpu_matmul import MIN_HIDDEN_SIZE

if TYPE_CHECKING:
    from finetune.data import PreparedData
    from finetune.recipe.schema import Recipe
    from finetune.train.devices import Device

SHARE_OF_PEAK = {"cuda": 0.5, "cpu": 0.7}
"""Of the matrix products' peak, what a whole step reaches. CPU: benchmarks/train_step.py; CUDA: the target there."""

NARROW_SHARE = 0.4
"""The same of a CPU where the model is narrow, as the nano is: what is no product weighs more (`make quickstart`)."""

QUANTIZED_SPEED = {"none": 1.0, "int8": 0.6, "nf4": 0.75}
"""Unpacking the weights takes time: speed against 16-bit weights."""


def step_flops(
    recipe: Recipe,
    config: dict[str, Any],
    *,
    tokens: float,
    document: float,
    supervised: float,
    references: int = 0,
    recomputed: bool = True,
) -> float:
    """Floating-point operations of an optimiser step of one process.

    A frozen weight costs 4 a token (forward, and the gradient of its input), and 2 more where its product is
    computed again; a LoRA weight 6 and 2; the head, of which only supervised positions are computed, 4; causal
    attention 6 x layers x hidden a token and key seen, which is half of the document, and 2 more. A reference has
    the forward pass alone, a third of attention's and half of the rest.

    Args:
        recipe: the run.
        config: the base's configuration as a dictionary.
        tokens: tokens of a step.
        document: mean tokens of a document.
        supervised: share of the tokens with a label.
        references: forward passes of a reference beside the step.
        recomputed: count what is computed again; without, it is what the step needs, however it is done.
    """
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    # Of the base's products, the adapter's and attention, in units of a forward pass.
    again = {
        False: (0, 0, 0),
        True: (2, 2, 2),
        "attention": (2, 2, 0),
        "matmul": (0, 2, 0),
    }[recomputed and recipe.train.gradient_checkpointing]
    body = layers * (4 * hidden**2 + 3 * hidden * wide)
    adapter = 0
    if recipe.adapter.method == "lora":
        adapter = layers * recipe.adapter.rank * (4 * hidden + 2 * hidden + 3 * (hidden + wide))
    attention = (6 + again[2]) * layers * hidden * document
    head = 4 * config["vocab_size"] * hidden * supervised
    reference = references * (2 * body + 2 * layers * hidden * document + head / 2)
    return tokens * ((4 + again[0]) * body + (6 + again[1]) * adapter + attention + head + reference)


def predict_seconds(
    recipe: Recipe,
    config: dict[str, Any],
    device: Device,
    data: PreparedData | None = None,
    *,
    sequences: int = 1,
    references: int = 0,
) -> float | None:
    """Predicted seconds of an optimiser step.

    Args:
        recipe: the run.
        config: the base's configuration as a dictionary.
        device: what it runs on.
        data: what is learned from; without it every row is full and learned whole.
        sequences: without data, rows that go through the model for each one that the batch size counts.
        references: without data, forward passes of a reference beside the step.

    Returns:
        None where the device's speed is not known.
    """
    length = float(recipe.data.max_length)
    batch = recipe.train.batch_size * recipe.train.gradient_accumulation
    tokens, document, supervised = batch * sequences * length, length, 1.0
    if data is not None:
        found = data.report.train.tokens
        tokens, references = data.row_tokens * min(batch, len(data.train)), data.reference_passes
        document, supervised = found.total / max(1, found.count), data.supervised_share
    flops = step_flops(
        recipe, config, tokens=tokens, document=document, supervised=supervised, references=references
    )
    seconds = seconds_per_step(flops, recipe, device)
    if seconds is not None and device.kind == "cpu" and config["hidden_size"] < MIN_HIDDEN_SIZE:
        seconds *= SHARE_OF_PEAK["cpu"] / NARROW_SHARE
    return seconds


def seconds_on_this_machine(recipe: Recipe, config: dict[str, Any], data: PreparedData) -> float | None:
    """`predict_seconds` of the device here, whose speed is measured first."""
    from finetune.train.devices import present_device

    device = present_device(measured_for=config["hidden_size"])
    return predict_seconds(recipe, config, device, data)


def seconds_per_step(flops: float, recipe: Recipe, device: Device) -> float | None:
    """Predicted seconds of an optimiser step; None where the device's speed is not known."""
    if device.flops is None:
        return None
    slower = QUANTIZED_SPEED[recipe.model.quantization] if device.kind == "cuda" else 1.0
    return flops / (device.flops * SHARE_OF_PEAK[device.kind] * slower)
