"""What is checked, counted and said before the first step, by `run` and `check` alike."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.train.run_folder import RunFolder
from finetune.words import are, plural

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.baichuan.load import Base
    from finetune.data import PreparedData
    from finetune.recipe.schema import Recipe
    from finetune.train.devices import Device
    from finetune.train.memory import MemoryPrediction


SHOWN_ROWS = 10


def with_quantization_of(base: Base, recipe: Recipe) -> Recipe:
    """The recipe as it is on this base: a release that is quantised already is what it is.

    Raises:
        UserError: the recipe asks for another quantisation, or for what does not go with this one.
    """
    if not base.quantized:
        return recipe
    wanted, found = recipe.model.quantization, base.quantization
    if wanted not in ("none", found):
        raise UserError(
            f"model.quantization: found {wanted}, but the weights of {base.name} are {found} already",
            hint=f"set model.quantization to {found}, or take the 16-bit release",
        )
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": found})})
    problems = recipe.problems()
    if problems:
        listed = "; ".join(f"{key}: {reason}" for key, reason in problems)
        raise UserError(f"with {base.name}, which is {found} already: {listed}")
    return recipe


def check_machine(recipe: Recipe, run: RunFolder) -> None:
    """Refuse settings that this machine cannot serve.

    Raises:
        UserError: naming the setting.
    """
    from finetune.adapters.build import check_device
    from finetune.baichuan.attention_choice import check_attention
    from finetune.baichuan.load import compute_dtype, pick_device
    from finetune.train.trainer import training_arguments

    check_device(recipe.adapter)
    device = pick_device()
    check_attention(recipe.model.attention, device, compute_dtype(recipe.model.dtype, device))
    training_arguments(recipe, run, evaluates=False)


AMPERE, HOPPER = (8, 0), (9, 0)
"""Compute capabilities: the first with bfloat16 and FlashAttention 2, and that of FlashAttention 3."""


def describe_card(recipe: Recipe, device: Device, console: Console) -> None:
    """Say what a card cannot compute of what a recipe wants.

    Raises:
        UserError: if it has not the attention that the recipe names.
    """
    if device.capability is None:
        return
    wanted, has = recipe.model.attention, "{}.{}".format(*device.capability)
    if wanted.startswith("flash_attention") and device.capability < AMPERE:
        raise UserError(
            f"model.attention: {wanted} needs a GPU of compute capability 8.0 (Ampere) or newer, "
            f"{device.name} has {has}",
            hint="use model.attention=auto",
        )
    notes = []
    if recipe.model.dtype == "bfloat16" and device.capability < AMPERE:
        settings = recipe.model.model_copy(update={"dtype": "float16"})
        possible = not recipe.model_copy(update={"model": settings}).problems()
        remedy = "set model.dtype=float16" if possible else f"stage {recipe.stage} wants a newer card"
        notes.append(f"{device.name} has no bfloat16: {remedy}")
    if wanted == "flash_attention_3" and device.capability < HOPPER:
        notes.append(
            f"flash_attention_3 is written for compute capability 9.0 (Hopper), {device.name} has {has}: "
            "use model.attention=auto"
        )
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False)


def announce_attention(recipe: Recipe, base: Base, console: Console) -> dict[str, str]:
    """Choose the attention implementation and say which and why.

    Returns:
        the same for environment.json.

    Raises:
        UserError: if the one asked for cannot be used here.
    """
    from dataclasses import asdict

    from finetune.baichuan.load import attention_of

    chosen = attention_of(recipe.model, base, compiled=recipe.train.compile)
    console.print(f"attention: {chosen}", highlight=False, markup=False)
    return asdict(chosen)


def describe_data(data: PreparedData, console: Console) -> None:
    """What was found in the data, in a few lines."""
    for file in data.report.files:
        rows = plural(file.rows, "row")
        kept = f"{file.kept:,} of {rows}" if file.bad else rows
        console.print(
            f"{file.split}: {file.file}: {kept}, layout {file.format}", highlight=False, soft_wrap=True
        )
    if data.report.sampling is not None:
        console.print(data.report.sampling.summary(), highlight=False)
    for what, listed in (("left out", data.report.bad_rows), ("odd, kept", data.report.odd_rows)):
        for row in listed[:SHOWN_ROWS]:
            console.print(f"  {what}: {row}", highlight=False, markup=False, soft_wrap=True)
        if len(listed) > SHOWN_ROWS:
            console.print(f"  and {len(listed) - SHOWN_ROWS:,} more; a run lists all in data_report.json")
    for warning in data.report.warnings:
        console.print(f"note: {warning}", style="yellow", highlight=False, markup=False)


def decide_batch_size(
    recipe: Recipe, config: dict[str, Any], run: RunFolder, *, resume: bool, sequences: int = 1
) -> Recipe:
    """The recipe with ``train.batch_size: auto`` replaced by what fits this device, or by what a resumed run has.

    Args:
        recipe: settled on the base.
        config: the base's.
        run: its folder.
        resume: go on with the batch size of the run in the folder.
        sequences: rows that go through the model for each one that the batch size counts.
    """
    from finetune.recipe.train_section import AUTO
    from finetune.train.devices import present_device
    from finetune.train.memory import count_parameters
    from finetune.train.planning import Plan, with_batch_size

    if recipe.train.batch_size != AUTO:
        return recipe
    if resume and (decided := run.batch_size()) is not None:
        return recipe.model_copy(update={"train": recipe.train.model_copy(update=decided)})
    trainable, _ = count_parameters(recipe, config)
    return with_batch_size(Plan(recipe, config, trainable, present_device(), sequences=sequences))


def predict(
    recipe: Recipe, base: Base, data: PreparedData, console: Console
) -> tuple[MemoryPrediction, int, int]:
    """Count parameters, predict memory, say both.

    Raises:
        UserError: if the frozen weights alone exceed the GPU's memory.
    """
    import torch

    from finetune.train.memory import GIB, MemoryPrediction, count_parameters, predict_memory

    config = base.config
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    trainable, total = count_parameters(recipe, config)
    longest = data.longest
    prediction = predict_memory(
        recipe,
        config,
        trainable,
        device_type=device_type,
        longest=longest,
        sequences=data.sequences,
    )
    processes = _processes_that_share_the_base()
    if processes > 1:
        weights = prediction.parts["weights"] // processes
        prediction = MemoryPrediction({**prediction.parts, "weights": weights}, device_type, prediction.host)
    share = trainable / total
    console.print(
        f"trainable parameters: {trainable:,} of {total:,} ({share:.2%})\npredicted peak memory: {prediction}",
        highlight=False,
    )
    if device_type == "cuda":
        unused = torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if unused > 0:
            console.print(
                f"note: {plural(unused, 'GPU')} of this machine {are(unused)} not used; --processes takes more",
                style="yellow",
                highlight=False,
            )
        card = torch.cuda.get_device_properties(0).total_memory
        if prediction.parts["weights"] > card:
            raise UserError(
                f"not enough memory: the weights of {base.name} take "
                f"{prediction.parts['weights'] / GIB:.1f} GiB, the GPU has {card / GIB:.1f} GiB",
                hint=advice(recipe, config, trainable, card, longest=longest, sequences=data.sequences),
            )
        if prediction.total > card:
            console.print(f"this may not fit the GPU's {card / GIB:.1f} GiB", style="yellow", highlight=False)
    return prediction, trainable, total


def _processes_that_share_the_base() -> int:
    """Over how many GPUs FSDP or ZeRO-3 cut the weights; 1 if each holds them whole."""
    from finetune.baichuan.load import base_is_sharded

    return int(os.environ.get("WORLD_SIZE", "1")) if base_is_sharded() else 1


def advice(
    recipe: Recipe,
    config: dict[str, Any],
    trainable: int,
    budget: int,
    *,
    longest: int | None,
    sequences: int,
) -> str:
    """What to lower so that a run fits ``budget`` bytes, as the hint of a message."""
    from finetune.train.memory import suggestions

    found = suggestions(recipe, config, trainable, budget, longest=longest, sequences=sequences)
    return "try " + ", or ".join(found) if found else "use a smaller base or a GPU with more memory"


@contextlib.contextmanager
def out_of_memory_explained(recipe: Recipe, base: Base, trainable: int, data: PreparedData) -> Iterator[None]:
    """Turn a GPU that is out of memory into a message that says what to lower."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        from finetune.train.memory import GIB, predict_memory

        card = torch.cuda.get_device_properties(0).total_memory
        rows: dict[str, Any] = {"longest": data.longest, "sequences": data.sequences}
        prediction = predict_memory(recipe, base.config, trainable, device_type="cuda", **rows)
        gc.collect()
        raise UserError(
            f"the GPU ({card / GIB:.1f} GiB) is out of memory; the run was predicted to take {prediction}",
            hint=advice(recipe, base.config, trainable, card, **rows),
        ) from error
