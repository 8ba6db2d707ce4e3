"""Predict the GPU memory of recipes without a GPU and without weights.

    python examples/python/predict_memory.py                                   # every recipe in recipes/
    python examples/python/predict_memory.py recipes/qlora_medical.yaml data.max_length=4096

The shapes of 7B and 13B are known, so a machine that is only for planning will do. Where base and GPU are there,
`python -m finetune check RECIPE` says the same for your data (its longest row in place of data.max_length).
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from finetune.baichuan import BaichuanConfig
from finetune.baichuan.catalog import CATALOG
from finetune.recipe import Recipe, load_pipeline
from finetune.train.memory import GIB, count_parameters, predict_memory
from finetune.train.runner import quiet_libraries

SHAPES = {
    "7b": BaichuanConfig(),
    "13b": BaichuanConfig(
        hidden_size=5120,
        intermediate_size=13_696,
        num_hidden_layers=40,
        num_attention_heads=40,
        position_embedding="alibi",
    ),
}
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def row(recipe: Recipe) -> list[str]:
    """A recipe's line of the table."""
    config = SHAPES[CATALOG[recipe.model.base].size].to_dict()
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
    """Print a line for each recipe that is named, or for all."""
    quiet_libraries()
    files = [argument for argument in sys.argv[1:] if "=" not in argument]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    table = Table(
        "recipe", "base", "method", "tokens at once", "trainable", "predicted peak", box=SIMPLE_HEAD
    )
    for file in files or sorted(map(str, RECIPES.glob("*.yaml"))):
        for recipe in load_pipeline(file, overrides):
            if recipe.model.base in CATALOG and CATALOG[recipe.model.base].size in SHAPES:
                table.add_row(*row(recipe))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
