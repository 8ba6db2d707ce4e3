"""``finetune check``: everything short of training."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from finetune.errors import UserError
from finetune.files import check_writable
from finetune.stage_table import STAGES
from finetune.train.planning import HEADROOM
from finetune.user_functions import check_functions
from finetune.words import plural

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.data import DataReport, PreparedData
    from finetune.recipe.schema import Recipe, Step
    from finetune.train.devices import Device
    from finetune.train.planning import Plan
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

    check_functions(recipes)
    made: dict[Path, Step] = {}
    for step in recipes:
        check_writable(Path(step.output_dir), called="output_dir")
        awaited = next(_awaited(step, made), None)
        if awaited is not None and isinstance(step, Recipe):
            step = _with_awaited_adapter(step, made)
            print(
                f"{step.name}: stage {step.stage}: {awaited} is not there yet, so only the recipe was checked"
            )
            for line in step.held_to():
                print(line)
            if device is not None:
                STAGES[step.stage].load("plan")(step, device=device)
        else:
            check(step, device=device)
        made[Path(step.output_dir).absolute()] = step


def _with_awaited_adapter(step: Recipe, made: Mapping[Path, Step]) -> Recipe:
    """The step with the size of the adapter that an earlier one will leave it to go on from."""
    given = getattr(step.model, "adapter", None)
    earlier = made.get(Path(step.resolve(given)).absolute().parent) if given else None
    size = getattr(earlier, "adapter", None)
    if size is None:
        return step
    values = {key: getattr(size, key) for key in ("rank", "targets", "dora")}
    return step.model_copy(update={"adapter": step.adapter.model_copy(update=values)})


def _awaited(step: Step, made: Collection[Path]) -> Iterator[str]:
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
        _print_full_rows(console, recipe, kind, config, planned)
        return
    recipe = kind.settle(recipe, base)
    tokenizer = load_tokenizer(base.folder)
    data = kind.prepare(recipe, tokenizer)
    describe_data(data, console)
    _print_statistics(console, data.report)
    if planned is None:
        announce_attention(recipe, base, console)
    chosen = planned or present_device(measured_for=base.config["hidden_size"])
    print_plan(console, recipe, base.config, chosen, data)
    if holds_run:
        console.print(f"note: {run.path} holds a run already: use --resume or --overwrite", style="yellow")
    if planned is None:
        console.print("the recipe can run", style="green")


def plan_by_shapes(recipe: Recipe, session_class: type[Session] | None = None, *, device: str) -> None:
    """Print what a step takes of a card whose data or adapter are not there yet: every row is taken as full.

    Args:
        recipe: as for `check_training`; of a base that is neither here nor known nothing is printed.
        session_class: as for `check_training`.
        device: as for `check`.

    Raises:
        UserError: see `print_plan`.
    """
    from rich.console import Console

    from finetune.train.devices import parse_device
    from finetune.train.runner import Session

    if config := shapes_of(recipe):
        console = Console(soft_wrap=True)
        _print_full_rows(console, recipe, session_class or Session, config, parse_device(device))


def shapes_of(recipe: Recipe) -> dict[str, Any] | None:
    """The configuration of a recipe's base, read where it is here, else as known; None without either."""
    from finetune.baichuan.catalog import known_config
    from finetune.baichuan.load import resolve_base

    settings = recipe.model
    try:
        base = resolve_base(settings.base, revision=settings.revision, source=settings.source, download=False)
    except UserError:
        return known_config(settings.base)
    return base.config


def _print_full_rows(
    console: Console, recipe: Recipe, kind: type[Session], config: dict[str, Any], device: Device
) -> None:
    print_plan(console, recipe, config, device, sequences=kind.sequences, references=kind.reference_passes)


def print_plan(
    console: Console,
    recipe: Recipe,
    config: dict[str, Any],
    device: Device,
    data: PreparedData | None = None,
    *,
    sequences: int = 1,
    references: int = 0,
) -> None:
    """Say what a run takes of a device, whether it fits, what else would, and how long a step will be.

    Without data every row is taken as full, `sequences` of them go through the model for each one that
    train.batch_size counts, and `references` times more through a reference.

    Raises:
        UserError: if the frozen weights alone are larger than a card, or it lacks the attention that is named.
    """
    from finetune.recipe.train_section import AUTO
    from finetune.train.memory import GIB, count_parameters
    from finetune.train.planning import Plan, with_batch_size
    from finetune.train.preflight import advice, describe_card

    describe_card(recipe, device, console)
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
    _print_what_fits(console, plan)
    full = {"sequences": sequences, "references": references}
    _print_steps(console, recipe, config, device, data, **full)


def _print_what_fits(console: Console, plan: Plan) -> None:
    """The longest rows and the largest batch that fit, each with the recipe's other one."""
    recipe = plan.recipe
    rows = "full rows"
    if plan.longest is not None:
        rows = f"rows of {min(plan.longest, recipe.data.max_length):,} tokens"
    limits = []
    if length := plan.longest_length():
        limits.append(f"data.max_length up to {length:,} with train.batch_size {recipe.train.batch_size}")
    if batch := plan.largest_batch():
        limits.append(f"train.batch_size up to {batch:,} with {rows}")
    fitting = ", or ".join(limits)
    console.print(
        f"what fits it: {fitting}"
        if limits
        else "nothing fits it by data.max_length or train.batch_size alone",
        highlight=False,
    )


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
    console: Console,
    recipe: Recipe,
    config: dict[str, Any],
    device: Device,
    data: PreparedData | None,
    **full: int,
) -> None:
    """Steps and predicted time; without data every row is full and learned whole."""
    from finetune.report.formatting import duration, step_time
    from finetune.train.speed import predict_seconds

    train = recipe.train
    steps = None
    if data is not None:
        batch, rows = train.batch_size * train.gradient_accumulation, len(data.train)
        per_epoch = -(-rows // batch)
        steps = train.max_steps or math.ceil(per_epoch * train.epochs)
        console.print(
            f"{plural(rows, 'row')}, {batch} to a step: {plural(per_epoch, 'step')} an epoch, {steps:,} in all "
            "(one process)",
            highlight=False,
        )
    seconds = predict_seconds(recipe, config, device, data, **full)
    if seconds is not None:
        whole = f", {duration(seconds * steps)} in all" if steps else ""
        console.print(
            f"estimated time on {device.name}: {step_time(seconds)} a step{whole} (training only)",
            highlight=False,
        )
