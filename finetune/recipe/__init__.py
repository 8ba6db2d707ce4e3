"""Recipes: what a run is told, read from YAML, checked, and written back beside the result.

from finetune.recipe import load_recipe, run_recipe
recipe = load_recipe("recipes/qlora_medical.yaml", ["model.base=baichuan2-nano"])
[run_folder] = run_recipe(recipe)
"""

from finetune.recipe.loading import load_pipeline, load_recipe
from finetune.recipe.schema import Recipe
from finetune.stages import run_recipe

__all__ = ["Recipe", "load_pipeline", "load_recipe", "run_recipe"]
