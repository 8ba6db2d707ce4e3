"""``finetune check``: everything short of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from finetune.errors import UserError
from finetune.stage_table import STAGES
from finetune.train.planning import HEADROOM
from finetune.words import plural

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.data import DataReport, PreparedData
    from finetune.recipe.schema import Recipe, Step
    from finetune.train.devices import Device
    from finetune.train.runner import Session

STATISTICS = {
    "documents": "count",
    "min": "min",
    "median": "median",
    "p95": "p95",
    "max": "max",
    "total": "total",
}


def check_all(recipes: Sequence[Step], *, device: str | None = None) -> None:
    """`check` each step; one that trains on what an earlier step has not made yet is named and passed over.

    Raises:
        UserError: what would stop a run.
    """
    from finetune.recipe.schema import Recipe

    made: list[Path] = []
    for step in recipes:
        awaited = next(_awaited(step, made), None)
        if awaited is not None and isinstance(step, Recipe):
            print(
                f"{step.name}: stage {step.stage}: {awaited} is not there yet, so only the recipe was checked"
            )
        else:
            check(step, device=device)
        made.append(Path(step.output_dir).absolute())


def _awaited(step: Step, made: Sequence[Path]) -> Iterator[str]:
    """Paths in a step's settings that earlier steps, given their folders, have still to make."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for each in value.values() if isinstance(value, dict) else value:
                yield from texts(each)

    for text in texts(step.settings()):
        path = Path(step.resolve(text)).absolute()
        if any(path.is_relative_to(folder) for folder in made) and not path.exists():
            yield text


def check(recipe: Step, *, device: str | None = None) -> None:
    """Do and print everything short of the stage's training; weights are not loaded.

    Args:
        recipe: of any stage.
        device: a card's name or a size such as 24GiB to plan for; None is this machine's.

    Raises:
        UserError: what would stop the run.
    """
    STAGES[recipe.stage].load("check")(recipe, device=device)


def check_training(
    recipe: Recipe, session_class: type[Session] | None = None, *, device: str | None = None
) -> None:
    """Validate recipe and data and print token statistics, parameters, predicted memory and time.

    Weights are not loaded, and nothing is written but the token cache.

    Args:
        recipe: of any stage that trains on rows.
        session_class: that of the stage; None is supervised training.
        device: as in `check`. With one, a 7B or 13B base need not be here: its shapes are known, and rows are
            taken as full.

    Raises:
        UserError: what would stop the run.
    """
    from rich.console import Console

    from finetune.baichuan.catalog import known_config
    from finetune.baichuan.load import load_tokenizer, resolve_base
    from finetune.data.prepare import read
    from finetune.quiet import quiet_libraries
    from finetune.train.devices import parse_device, present_device
    from finetune.train.preflight import announce_attention, check_machine, describe_data
    from finetune.train.run_folder import RunFolder
    from finetune.train.runner import Session

    planned = parse_device(device) if device is not None else None
    quiet_libraries()
    kind = session_class or Session
    console = Console(soft_wrap=True)
    console.print(
        f"{recipe.name}: stage {recipe.stage} on {recipe.model.base}", style="bold", highlight=False
    )
    run = RunFolder(recipe.output_dir)
    holds_run = (run.path / "recipe.yaml").is_file()
    run.examine(recipe, resume=False, overwrite=holds_run)
    if planned is None:
        check_machine(recipe, run)
    try:
        base = resolve_base(
            recipe.model.base,
            revision=recipe.model.revision,
            source=recipe.model.source,
            download=planned is None,  # no 28 GB for the question whether they fit
        )
    except UserError:
        config = known_config(recipe.model.base) if planned is not None else None
        if planned is None or config is None:
            raise
        if recipe.stage in ("sft", "pretrain"):
            loaded, _ = read(recipe.data, stage=recipe.stage, seed=recipe.seed, resolve=recipe.resolve)
            rows = sum(len(file.records) for files in loaded["train"] for file in files)
            read_rows = f"{plural(rows, 'training row')} not tokenised"
        else:
            read_rows = "its data not read"
        console.print(
            f"{recipe.model.base} is not here: planned by its shapes, {read_rows}, every row taken as full",
            highlight=False,
        )
        print_plan(console, recipe, config, planned, sequences=kind.sequences)
        return
    recipe = kind.settle(recipe, base)
    tokenizer = load_tokenizer(base.folder)
    data = kind.prepare(recipe, tokenizer)
    describe_data(data, console)
    _print_statistics(console, data.report)
    if planned is None:
        announce_attention(recipe, base, console)
    chosen = planned or present_device(measure=True)
    print_plan(console, recipe, base.config, chosen, data)
    if holds_run:
        console.print(f"note: {run.path} holds a run already: use --resume or --overwrite", style="yellow")
    if planned is None:
        console.print("the recipe can run", style="green")


def print_plan(
    console: Console,
    recipe: Recipe,
    config: dict[str, Any],
    device: Device,
    data: PreparedData | None = None,
    *,
    sequences: int = 1,
) -> None:
    """Say what a run takes of a device, whether it fits, what else would, and how long a step will be.

    Without data every row is taken as full, and `sequences` of them go through the model for each one that
    train.batch_size counts.

    Raises:
        UserError: if the frozen weights alone are larger than a card.
    """
    from finetune.recipe.train_section import AUTO
    from finetune.train.memory import GIB, count_parameters
    from finetune.train.planning import Plan, with_batch_size
    from finetune.train.preflight import advice

    trainable, total = count_parameters(recipe, config)
    console.print(
        f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})", highlight=False
    )
    longest, sequences = (data.longest, data.sequences) if data is not None else (None, sequences)
    plan = Plan(recipe, config, trainable, device, longest, sequences)
    if recipe.train.batch_size == AUTO:
        recipe = with_batch_size(plan)
        plan = Plan(recipe, config, trainable, device, longest, sequences)
        train = recipe.train
        console.print(
            f"train.batch_size: auto is {train.batch_size} here, with gradient_accumulation "
            f"{train.gradient_accumulation}",
            highlight=False,
        )
    prediction, size = plan.memory(), device.memory / GIB
    table = Table("predicted peak memory", Column("GiB", justify="right"), box=SIMPLE_HEAD)
    for name, part in prediction.parts.items():
        table.add_row(name, f"{part / GIB:.2f}")
    table.add_row("total", f"{prediction.total / GIB:.2f}", style="bold")
    console.print(table)
    if prediction.host:
        console.print(f"and {prediction.host / GIB:.2f} GiB of host memory, pinned", highlight=False)
    if prediction.parts["weights"] > device.memory:
        raise UserError(
            f"not enough memory: the weights of {recipe.model.base} take "
            f"{prediction.parts['weights'] / GIB:.1f} GiB, {device.name} has {size:.1f} GiB",
            hint=advice(recipe, config, trainable, device.memory, longest=longest, sequences=sequences),
        )
    if plan.fits(prediction):
        spare = size - prediction.total / GIB
        console.print(
            f"fits {device.name}: {spare:.1f} of {size:.1f} GiB to spare", style="green", highlight=False
        )
    else:
        budget = int(HEADROOM * device.memory)
        hint = advice(recipe, config, trainable, budget, longest=longest, sequences=sequences)
        console.print(
            f"does not fit {device.name} ({size:.1f} GiB less {1 - HEADROOM:.0%} headroom): {hint}",
            style="yellow",
            highlight=False,
        )
    rows = "full rows" if longest is None else f"rows of {min(longest, recipe.data.max_length):,} tokens"
    console.print(
        f"what fits it: data.max_length up to {plan.longest_length():,} with train.batch_size "
        f"{recipe.train.batch_size}, or train.batch_size up to {plan.largest_batch():,} with {rows}",
        highlight=False,
    )
    _print_steps(console, recipe, config, device, data)


def _print_statistics(console: Console, report: DataReport) -> None:
    splits = {"train": report.train, "validation": report.validation}
    splits = {name: split for name, split in splits.items() if split is not None}
    table = Table("tokens of a document", box=SIMPLE_HEAD)
    for name in splits:
        table.add_column(name, justify="right")
    tokens = [split.tokens for split in splits.values() if split is not None]
    for label, attribute in STATISTICS.items():
        table.add_row(label, *(f"{getattr(each, attribute):,.0f}" for each in tokens))
    table.add_row("cut to max_length", *(f"{each.truncated_share:.1%}" for each in tokens))
    table.add_row("supervised", *(f"{each.supervised_share:.1%}" for each in tokens))
    table.add_row("rows", *(f"{split.rows:,}" for split in splits.values() if split is not None))
    if report.train.packing is not None:
        packings = [split.packing for split in splits.values() if split is not None]
        table.add_row("packed rows filled", *(f"{each.efficiency:.1%}" if each else "–" for each in packings))
    console.print(table)


def _print_steps(
    console: Console, recipe: Recipe, config: dict[str, Any], device: Device, data: PreparedData | None
) -> None:
    """Steps and predicted time; without data every row is full and learned whole."""
    from finetune.report.formatting import duration
    from finetune.train.speed import seconds_per_step, step_flops

    train = recipe.train
    batch = train.batch_size * train.gradient_accumulation
    steps = None
    tokens, document, supervised = float(batch * recipe.data.max_length), float(recipe.data.max_length), 1.0
    if data is not None:
        report, rows = data.report, len(data.train)
        per_epoch = -(-rows // batch)
        steps = train.max_steps or math.ceil(per_epoch * train.epochs)
        found = report.train.tokens
        tokens = found.total / rows * min(batch, rows)  # those of a preference's responses are all in total
        document, supervised = found.total / max(1, found.count), found.supervised_share
        console.print(
            f"{plural(rows, 'row')}, {batch} to a step: {plural(per_epoch, 'step')} an epoch, {steps:,} in all "
            "(one process)",
            highlight=False,
        )
    flops = step_flops(recipe, config, tokens=tokens, document=document, supervised=supervised)
    seconds = seconds_per_step(flops, recipe, device)
    if seconds is not None:
        whole = f", {duration(seconds * steps)} in all" if steps else ""
        console.print(
            f"estimated time on {device.name}: {seconds:.2g} s a step{whole} (training only)", highlight=False
        )
