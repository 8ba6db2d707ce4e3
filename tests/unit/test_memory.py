"""The memory prediction moves the right way, and parameters are counted exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_adapters import LORA, PROMPTS, base_model, settings

from finetune.adapters import attach_adapter
from finetune.baichuan import BaichuanConfig
from finetune.recipe.schema import Recipe
from finetune.train.memory import GIB, count_parameters, predict_memory, suggestions

CONFIG_7B = BaichuanConfig().to_dict()
CONFIG_13B = BaichuanConfig(
    hidden_size=5120, intermediate_size=13_696, num_hidden_layers=40, num_attention_heads=40
).to_dict()
LORA_64 = 143_130_624
"""Trainable parameters of rank 64 on every matrix of the 7B model; the test below counts them."""


def recipe(**sections: dict[str, Any]) -> Recipe:
    return Recipe(
        **{"name": "x", "stage": "sft", "model": {"base": "b"}, "data": {"train": "t"}, **sections}  # type: ignore[arg-type]
    )


def predicted(config: dict[str, Any] = CONFIG_7B, longest: int | None = None, **sections: Any) -> int:
    made = recipe(**sections)
    return predict_memory(made, config, LORA_64, device_type="cuda", longest=longest).total


@pytest.mark.parametrize("checkpointing", [True, False])
def test_more_of_anything_takes_more(checkpointing: bool) -> None:
    common = {"gradient_checkpointing": checkpointing}
    sizes = [predicted(train={"batch_size": n, **common}) for n in (1, 2, 8)]
    assert sizes == sorted(set(sizes))
    lengths = [predicted(data={"train": "t", "max_length": n}, train=common) for n in (256, 1024, 4096)]
    assert lengths == sorted(set(lengths))
    assert predicted(CONFIG_13B, train=common) > predicted(train=common)


def test_what_saves_memory_is_predicted_to_save_it() -> None:
    by_kind = [predicted(model={"base": "b", "quantization": kind}) for kind in ("nf4", "int8", "none")]
    assert by_kind == sorted(set(by_kind))
    assert predicted(train={"gradient_checkpointing": True}) < predicted(
        train={"gradient_checkpointing": False}
    )
    assert predicted(train={"optimizer": "adamw_8bit"}) < predicted()
    assert predicted(model={"base": "b", "dtype": "bfloat16"}) < predicted(
        model={"base": "b", "dtype": "float32"}
    )
    assert predicted(longest=300) < predicted()
    assert predicted(longest=10**6) == predicted()  # rows are cut to max_length


def test_weights_of_the_7b_model() -> None:
    """7.5 billion parameters: 14.0 GiB in bfloat16; the quantised layers a good quarter of theirs in nf4."""
    parts = predict_memory(recipe(), CONFIG_7B, 0, device_type="cuda").parts
    assert parts["weights"] == pytest.approx(7_505_973_248 * 2, rel=1e-3)
    nf4 = predict_memory(
        recipe(model={"base": "b", "quantization": "nf4"}), CONFIG_7B, 0, device_type="cuda"
    ).parts
    embeddings = 2 * 125_696 * 4096 * 2
    assert nf4["weights"] - embeddings == pytest.approx((parts["weights"] - embeddings) * 0.258, rel=0.01)
    assert parts["optimizer"] == parts["gradients"] == parts["adapter"] == 0


def test_qlora_of_the_7b_model_fits_a_24_gb_card_and_the_whole_13b_does_not() -> None:
    small = predicted(
        model={"base": "b", "quantization": "nf4"},
        data={"train": "t", "max_length": 1024},
        train={"batch_size": 2},
    )
    assert 6 * GIB < small < 16 * GIB
    assert predicted(CONFIG_13B) > 24 * GIB


def test_suggestions_fit_what_they_promise() -> None:
    made = recipe(train={"batch_size": 16, "gradient_checkpointing": False})
    budget = 24 * GIB
    assert predict_memory(made, CONFIG_7B, LORA_64, device_type="cuda").total > budget
    found = suggestions(made, CONFIG_7B, LORA_64, budget)
    assert any("train.gradient_checkpointing=true" in text for text in found)
    for text in found:
        changes: dict[str, dict[str, Any]] = {"train": {"batch_size": 16, "gradient_checkpointing": False}}
        for override in text.partition(" (")[0].split():
            key, _, value = override.partition("=")
            section, _, name = key.partition(".")
            parsed = int(value) if value.isdigit() else {"true": True, "nf4": "nf4"}[value]
            changes.setdefault(section, {"model": {"base": "b"}, "data": {"train": "t"}}.get(section, {}))[
                name
            ] = parsed
        assert predicted(**changes) <= budget or len(found) == 1
    # Where no single change is enough, all together are named.
    (everything,) = suggestions(made, CONFIG_13B, LORA_64, 16 * GIB)
    assert "batch_size=1" in everything
    assert "nf4" in everything
    assert suggestions(made, CONFIG_13B, LORA_64, 4 * GIB) == []  # nothing that would not fit either


# --- counting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*LORA, *PROMPTS])
def test_count_is_that_of_the_attached_adapter(tiny_base: Path, kind: str) -> None:
    model, base = base_model(tiny_base)
    made = recipe(model={"base": str(tiny_base)}, adapter=settings(kind).model_dump(exclude_unset=True))
    attached = attach_adapter(model, settings(kind), base)
    trainable = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in attached.parameters() if not p.requires_grad)
    assert count_parameters(made, base.config) == (trainable, trainable + frozen)


def test_count_of_the_7b_model_by_hand() -> None:
    """rank x (in + out) for each matrix; without memory for the model itself."""
    hidden, wide = 4096, 11_008
    pairs = [(hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]
    expected = 32 * 64 * sum(a + b for a, b in pairs)
    assert expected == LORA_64
    trainable, total = count_parameters(recipe(), CONFIG_7B)
    assert trainable == expected
    assert total == 7_505_973_248 + expected
