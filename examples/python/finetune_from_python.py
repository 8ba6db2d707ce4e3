"""Fine-tune from Python: load a recipe, run it, read the result, merge, and ask the merged model.

    python examples/python/finetune_from_python.py
    python examples/python/finetune_from_python.py train.max_steps=5 report.samples=2        # a quick look

Runs on the nano model, without a GPU; arguments are overrides as on the command line. With a GPU and weights,
pass model.base=baichuan2-7b-chat.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

# Importing the package registers the Baichuan classes, so that the Auto classes above need no remote code.
from finetune.adapters import merge_adapter
from finetune.baichuan.chat import build_prompt
from finetune.errors import UserError
from finetune.generate import greedy_answers
from finetune.recipe import load_recipe, run_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "qlora_medical.yaml"
QUESTION = "血压多高才算高血压？"


def main() -> None:
    """Train, report, merge, ask."""
    overrides = ["model.base=baichuan2-nano", "output_dir=runs/from_python", *sys.argv[1:]]
    recipe = load_recipe(RECIPE, overrides)
    print(f"{recipe.name}: {recipe.train.epochs:g} epochs at {recipe.train.learning_rate}")

    [folder] = run_recipe(recipe, overwrite=True)

    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    print(f"validation loss {result['eval_loss_before']:.3f} -> {result['eval_loss_after']:.3f}")

    with tempfile.TemporaryDirectory() as temporary:
        merged = merge_adapter(folder / "adapter", Path(temporary) / "merged")
        model = AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    prompt = build_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    [answer] = greedy_answers(model, tokenizer, [prompt], max_new_tokens=128)
    print(f"{QUESTION}\n{answer}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
