"""Predict the GPU memory of recipes without a GPU and without weights.

    python examples/python/predict_memory.py                       # every recipe in recipes/ that fine-tunes
    python examples/python/predict_memory.py recipes/qlora_medical.yaml data.max_length=4096

The shapes of 7B and 13B are known, so a machine that is only for planning will do. For one recipe,
`python -m finetune check RECIPE --device 24GiB` says more: whether it fits, and what else would.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from finetune.baichuan.catalog import known_config
from finetune.quiet import quiet_libraries
from finetune.recipe import Recipe, load_pipeline
from finetune.train.memory import GIB, count_parameters, predict_memory

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def row(recipe: Recipe, config: dict[str, Any]) -> list[str]:
    """A recipe's line of the table."""
    trainable, _ = count_parameters(recipe, config)
    prediction = predict_memory(recipe, config, trainable, device_type="cuda")
    rows = f"{recipe.train.batch_size} x {recipe.data.max_length:,}"
    precision = recipe.model.quantization if recipe.model.quantization != "none" else recipe.model.dtype
    return [
        recipe.name,
        recipe.model.base,
        f"{recipe.adapter.method}, {precision}",
        rows,
        f"{trainable / 1e6:,.1f} M",
        f"{prediction.total / GIB:.1f} GiB",
    ]


def main() -> None:
    """Print a line for each recipe that is named, or for all that fine-tune."""
    quiet_libraries()
    files = [argument for argument in sys.argv[1:] if "=" not in argument]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    table = Table(
        "recipe", "base", "method", "tokens at once", "trainable", "predicted peak", box=SIMPLE_HEAD
    )
    for file in files or sorted(map(str, RECIPES.glob("*.yaml"))):
        for recipe in load_pipeline(file, overrides):
            if not isinstance(recipe, Recipe) or recipe.stage not in ("sft", "pretrain"):
                continue  # `check` knows what RLHF needs
            if (config := known_config(recipe.model.base)) is not None:
                table.add_row(*row(recipe, config))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
