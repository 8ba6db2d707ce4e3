"""Stage `ppo` from recipe to run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.train.run_folder import RunFolder
from finetune.words import plural

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

    from finetune.baichuan.load import Base
    from finetune.train.devices import Device
    from rlhf.ppo.prompts import Prompts
    from rlhf.ppo.recipe import PPORecipe


MEMORY_HINT = (
    "lower train.batch_size and ppo.rollout_batch_size, shorten data.max_length or ppo.max_new_tokens, or set "
    "model.quantization=nf4 and train.gradient_checkpointing=true"
)


def run(recipe: PPORecipe, *, resume: bool, overwrite: bool) -> Path:
    """Train an actor as a recipe says and fill its run folder.

    Args:
        recipe: of stage ppo.
        resume: continue from the last checkpoint.
        overwrite: replace the run that the folder holds.

    Returns:
        The run folder.

    Raises:
        UserError: the recipe, the data, a reward or the machine does not allow it.
        KeyboardInterrupt: interrupted; attribute ``checkpoint`` names the saved state.
    """
    from finetune.files import write_json
    from finetune.quiet import quiet_libraries
    from finetune.train.environment import record_environment
    from finetune.train.preflight import announce_attention
    from rlhf.ppo.session import Session

    quiet_libraries()
    accelerator = _accelerator(recipe)
    console = _console(accelerator.is_main_process)
    folder = RunFolder(recipe.output_dir)
    if resume and folder.result().get("status") == "finished":
        console.print(f"{folder.path}: finished already, nothing to resume", highlight=False)
        return folder.path
    if accelerator.is_main_process:
        folder.refuse_taken(resume=resume, overwrite=overwrite)
    recipe, base, tokenizer, prompts = _prepare(recipe, accelerator)
    _describe(recipe, prompts, console)
    attention = announce_attention(recipe, base, console)
    if accelerator.is_main_process:
        folder.claim(recipe, resume=resume, overwrite=overwrite)
        write_json(folder.path / "data_report.json", prompts.report())
        record_environment(folder.path, attention=attention)
    accelerator.wait_for_everyone()
    checkpoint = folder.last_checkpoint() if resume else None
    try:
        with _out_of_memory_explained():
            return Session(recipe, folder, base, tokenizer, prompts, accelerator, console).train(checkpoint)
    except UserError:
        if accelerator.is_main_process:
            folder.abandon()  # unless a step was saved
        raise


def check(recipe: PPORecipe, *, device: str | None = None) -> None:
    """Validate recipe, prompts and rewards and print what was found; weights are not loaded.

    Args:
        recipe: the run.
        device: a card's name or a size such as 24GiB to plan for; None is this machine's. With one, a 7B or 13B base
            need not be here: its shapes are known, and prompts are taken as long as may be.

    Raises:
        UserError: what would stop the run.
    """
    from rich.console import Console

    from finetune.baichuan.catalog import known_config
    from finetune.baichuan.load import resolve_base
    from finetune.quiet import quiet_libraries
    from finetune.train.devices import parse_device, present_device
    from finetune.train.preflight import announce_attention

    planned = present_device() if device is None else parse_device(device)
    quiet_libraries()
    console = Console(soft_wrap=True)
    RunFolder(recipe.output_dir).examine(recipe, resume=False, overwrite=True)
    if device is not None:
        settings = recipe.model
        try:
            resolve_base(settings.base, revision=settings.revision, source=settings.source, download=False)
        except UserError:
            config = known_config(settings.base)
            if config is None:
                raise
            console.print(
                f"{settings.base} is not here: planned by its shapes, prompts and rewards not read, every prompt "
                "taken as long as may be",
                highlight=False,
            )
            _print_plan(recipe, config, planned, _longest_prompt(recipe), console)
            return
    recipe, base, _, prompts = _prepare(recipe, _accelerator(recipe), here=device is None)
    _describe(recipe, prompts, console)
    if device is None:
        announce_attention(recipe, base, console)
    lengths = sorted(len(prompt.ids) for prompt in prompts.train)
    console.print(
        f"{plural(len(lengths), 'prompt')} of {lengths[0]:,} to {lengths[-1]:,} tokens, median "
        f"{lengths[len(lengths) // 2]:,}",
        highlight=False,
    )
    for part in recipe.reward_parts():
        console.print(f"reward: {part.name}: {part.path} (weight {part.weight:g})", highlight=False)
    for line in recipe.held_to():
        console.print(line, highlight=False, markup=False)
    _print_plan(recipe, base.config, planned, lengths[-1], console)


def plan(recipe: PPORecipe, *, device: str) -> None:
    """Print what the run takes of a card while its adapters are not there: prompts are as long as may be.

    Args:
        recipe: of a base that is neither here nor known nothing is printed.
        device: a card's name or a size such as 24GiB.
    """
    from rich.console import Console

    from finetune.check import shapes_of
    from finetune.train.devices import parse_device

    if config := shapes_of(recipe):
        console = Console(soft_wrap=True)
        _print_plan(recipe, config, parse_device(device), _longest_prompt(recipe), console)


def _longest_prompt(recipe: PPORecipe) -> int:
    """Tokens of the longest prompt that the recipe allows."""
    return recipe.data.max_length - recipe.ppo.max_new_tokens


def _print_plan(
    recipe: PPORecipe, config: dict[str, Any], device: Device, longest: int, console: Console
) -> None:
    """Parameters, memory, whether that fits a device, and the iterations; `longest` is tokens of a prompt."""
    from finetune.train.memory import count_parameters
    from finetune.train.planning import HEADROOM
    from finetune.train.preflight import describe_card

    describe_card(recipe, device, console)
    trainable, total = count_parameters(recipe, config)
    console.print(
        f"trainable parameters: {2 * trainable:,} (actor and critic) beside {total - trainable:,} frozen ones",
        highlight=False,
    )
    parts = predict_memory(recipe, config, trainable, longest=longest, device_type=device.kind)
    listed = ", ".join(f"{phase} {size / 2**30:.2f}" for phase, size in parts.items())
    console.print(f"predicted peak memory: {max(parts.values()) / 2**30:.2f} GiB ({listed})", highlight=False)
    free = 1 - recipe.ppo.vllm_memory if recipe.ppo.rollout_engine == "vllm" else 1.0
    fits = max(parts.values()) <= HEADROOM * free * device.memory
    console.print(
        f"{'fits' if fits else 'does not fit'} {device.name} ({free * device.memory / 2**30:.1f} GiB"
        f"{', the rest is vLLM' if free < 1 else ''})" + ("" if fits else ": " + MEMORY_HINT),
        style="green" if fits else "yellow",
        highlight=False,
    )
    console.print(
        f"{plural(recipe.ppo.iterations, 'iteration')} of {plural(recipe.ppo.batch_size, 'response')}, "
        f"{recipe.ppo.critic_warmup} of them for the critic alone",
        highlight=False,
    )


def predict_memory(
    recipe: PPORecipe, config: dict[str, Any], trainable: int, *, longest: int, device_type: str
) -> dict[str, int]:
    """Predicted peak in bytes by phase: while responses are sampled, and while they are learned from.

    Args:
        recipe: the run.
        config: the base's configuration.
        trainable: parameters of one adapter; a reward adapter is taken to be as large.
        longest: tokens of the longest prompt.
        device_type: ``cuda`` or ``cpu``.
    """
    from finetune.train.memory import DTYPE_BYTES
    from finetune.train.memory import predict_memory as of_training
    from finetune.user_functions import is_function

    length = longest + recipe.ppo.max_new_tokens
    update = of_training(recipe, config, 2 * trainable, device_type=device_type, longest=length).parts
    frozen = bool(recipe.model.adapter) + sum(not is_function(part.path) for part in recipe.reward_parts())
    update["frozen adapters"] = 4 * frozen * trainable
    width = 4 if device_type == "cpu" else DTYPE_BYTES[recipe.model.dtype]
    cache = 2 * config["num_hidden_layers"] * config["hidden_size"] * width
    held = ("weights", "adapter", "optimizer", "frozen adapters", "workspace")
    return {
        "rollout": sum(update[name] for name in held) + recipe.ppo.rollout_batch_size * length * cache,
        "update": sum(update.values()),
    }


def _accelerator(recipe: PPORecipe) -> Accelerator:
    import torch
    from accelerate import Accelerator

    cuda = torch.cuda.is_available()
    precision = "bf16" if cuda and recipe.model.dtype == "bfloat16" else "no"
    return Accelerator(cpu=not cuda, mixed_precision=precision)


def _console(main: bool) -> Console:
    from rich.console import Console

    return Console(stderr=True, quiet=not main, soft_wrap=True)


def _prepare(
    recipe: PPORecipe, accelerator: Accelerator, *, here: bool = True
) -> tuple[PPORecipe, Base, Any, Prompts]:
    """Everything that can be refused before weights are loaded and before anything is written.

    Unless it is to run `here`, this machine's GPU is not asked for what the recipe wants.
    """

    from finetune.baichuan.attention_choice import check_attention
    from finetune.baichuan.load import (
        base_is_sharded,
        compute_dtype,
        load_tokenizer,
        pick_device,
        resolve_base,
    )
    from finetune.train.base import check_gpu_settings
    from finetune.train.preflight import with_quantization_of
    from rlhf.ppo.engines import check_engine
    from rlhf.ppo.prompts import load_prompts
    from rlhf.ppo.rewards import check_rewards

    processes = accelerator.num_processes
    if base_is_sharded():
        raise UserError(
            "stage ppo holds the base whole on each device: FSDP and ZeRO-3 cut it up",
            hint="use recipes/accelerate/ddp.yaml, and model.quantization=nf4 where the base does not fit",
        )
    if recipe.ppo.batch_size < processes:
        raise UserError(
            f"ppo.batch_size: {plural(recipe.ppo.batch_size, 'response')} for {processes} processes",
            hint=f"set it to {processes} or more",
        )
    if here:
        check_gpu_settings(recipe.train)
        device = pick_device()
        check_attention(recipe.model.attention, device, compute_dtype(recipe.model.dtype, device))
    with accelerator.main_process_first():
        base = resolve_base(recipe.model.base, revision=recipe.model.revision, source=recipe.model.source)
        recipe = with_quantization_of(base, _with_start_adapter(recipe, base))  # type: ignore[assignment]
        tokenizer = load_tokenizer(base.folder)
        prompts = load_prompts(recipe, tokenizer)
    check_rewards(recipe, base, tokenizer)
    check_engine(recipe, base, processes=processes)
    return recipe, base, tokenizer, prompts


def _with_start_adapter(recipe: PPORecipe, base: Base) -> PPORecipe:
    """Section adapter as of the adapter to start from, but for its dropout: the critic gets the same."""
    from rlhf.session import with_start_adapter

    if recipe.model.adapter is None:
        return recipe
    settings = with_start_adapter(recipe, base).adapter.model_copy(update={"dropout": 0.0})
    return recipe.model_copy(update={"adapter": settings})


def _describe(recipe: PPORecipe, prompts: Prompts, console: Console) -> None:
    for split, name, rows, kept in prompts.files:
        console.print(f"{split}: {name}: {plural(kept, 'prompt')} in {plural(rows, 'row')}", highlight=False)
    if prompts.sampling is not None:
        console.print(prompts.sampling.summary(), highlight=False)
        for warning in prompts.sampling.warnings():
            console.print(f"note: {warning}", style="yellow", highlight=False)
    for row in prompts.bad_rows[:10]:
        console.print(f"  left out: {row}", highlight=False, markup=False)
    if len(prompts.bad_rows) > 10:
        console.print(f"  and {len(prompts.bad_rows) - 10} more, all listed in data_report.json")
    for note in _held_otherwise(recipe):
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def _held_otherwise(recipe: PPORecipe) -> Iterator[str]:
    """Adapters that were trained on the same base in another precision."""
    from finetune.adapters.training_note import read_training_note

    for path in filter(None, [recipe.model.adapter, *(part.path for part in recipe.reward_parts())]):
        held = read_training_note(recipe.resolve(path)).get("quantization")
        if held and held != recipe.model.quantization:
            yield (
                f"{path} was trained with model.quantization={held}, and this run has "
                f"{recipe.model.quantization}: it may answer, or score, otherwise than it did there"
            )


@contextlib.contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU is out of memory: {str(error).splitlines()[0]}",
            hint=MEMORY_HINT,
        ) from error
