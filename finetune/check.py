"""``finetune check``: everything short of training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.data import DataReport
    from finetune.recipe.schema import Recipe

STATISTICS = {
    "documents": "count",
    "min": "min",
    "median": "median",
    "p95": "p95",
    "max": "max",
    "total": "total",
}


def check(recipe: Recipe) -> None:
    """Validate recipe and data and print token statistics, parameters and predicted memory.

    Weights are not loaded, and nothing is written but the token cache.

    Raises:
        UserError: what would stop the run.
    """
    from rich.console import Console

    from finetune.baichuan.load import load_tokenizer, resolve_base
    from finetune.data import prepare
    from finetune.train.run_folder import RunFolder
    from finetune.train.runner import (
        check_machine,
        describe_data,
        predict,
        quiet_libraries,
        with_quantization_of,
    )

    quiet_libraries()
    console = Console(soft_wrap=True)
    console.print(
        f"{recipe.name}: stage {recipe.stage} on {recipe.model.base}", style="bold", highlight=False
    )
    run = RunFolder(recipe.output_dir)
    holds_run = (run.path / "recipe.yaml").is_file()
    run.examine(recipe, resume=False, overwrite=holds_run)
    check_machine(recipe, run)
    base = resolve_base(recipe.model.base, revision=recipe.model.revision, source=recipe.model.source)
    recipe = with_quantization_of(base, recipe)
    tokenizer = load_tokenizer(base.folder)
    data = prepare(recipe.data, tokenizer, stage=recipe.stage, seed=recipe.seed, resolve=recipe.resolve)
    describe_data(data, console)
    _print_statistics(console, data.report)
    predict(recipe, base, data, console)
    _print_steps(console, recipe, len(data.train))
    if holds_run:
        console.print(f"note: {run.path} holds a run already: use --resume or --overwrite", style="yellow")
    console.print("the recipe can run", style="green")


def _print_statistics(console: Console, report: DataReport) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

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


def _print_steps(console: Console, recipe: Recipe, rows: int) -> None:
    train = recipe.train
    batch = train.batch_size * train.gradient_accumulation
    per_epoch = -(-rows // batch)
    steps = train.max_steps or math.ceil(per_epoch * train.epochs)
    console.print(
        f"{rows:,} rows, {batch} to a step: {per_epoch:,} steps an epoch, {steps:,} in all (one process)",
        highlight=False,
    )
