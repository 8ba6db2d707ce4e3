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
    hidden_size=5120,
    intermediate_size=13_696,
    num_hidden_layers=40,
    num_attention_heads=40,
    position_embedding="alibi",
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


def test_what_is_kept_and_where() -> None:
    """Of 4,096 tokens through 32 layers of width 4,096, in bytes a token."""

    def activations(keep: bool | str, *, offload: bool = False, layers: int = 32) -> int:
        made = recipe(
            train={"gradient_checkpointing": keep, "activation_offloading": offload, "batch_size": 1},
            data={"train": "t", "max_length": 4096},
        )
        config = {**CONFIG_7B, "num_hidden_layers": layers}
        found = predict_memory(made, config, LORA_64, device_type="cuda")
        assert found.host == (layers * 4096 * 4096 * 2 if offload else 0)
        return found.parts["activations"] // 4096

    inputs = 4096 * 2
    whole = activations(False, layers=1)
    assert activations(False) == 32 * whole
    assert activations(True) == 32 * inputs + whole
    assert activations(True, offload=True) == 3 * inputs + whole
    assert activations("attention") == 32 * (2 * inputs + 32 * 4) + whole
    # q, k, v, attention and its projection, gate and up, the output
    assert activations("matmul") == 32 * (7 * inputs + 2 * 11_008 * 2 + 32 * 4) + whole
    assert activations("matmul") < 0.55 * activations(False)


def test_liger_is_counted_where_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.baichuan.kernels as kernels

    def activations(**train: Any) -> int:
        made = recipe(train={"gradient_checkpointing": False, **train})
        return predict_memory(made, CONFIG_7B, 0, device_type="cuda").parts["activations"]

    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    without = activations()
    monkeypatch.setattr(kernels, "find_spec", lambda _: object())
    assert activations() == activations(kernels="liger") < without
    assert activations(kernels="none") == activations(compile=True) == without


def test_ppo_is_predicted_without_liger_which_it_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.baichuan.kernels as kernels
    from rlhf.ppo.recipe import PPORecipe
    from rlhf.ppo.stage import predict_memory as of_ppo

    made = PPORecipe(
        **{"name": "x", "stage": "ppo", "model": {"base": "b"}, "data": {"train": "t"}},  # type: ignore[arg-type]
        ppo={"reward": "a:b"},  # type: ignore[arg-type]
    )
    found = []
    for installed in (None, object()):
        monkeypatch.setattr(kernels, "find_spec", lambda _, installed=installed: installed)
        found.append(of_ppo(made, CONFIG_7B, 0, longest=2000, device_type="cuda"))
    assert found[0] == found[1]


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
    int8 = recipe(model={"base": "b", "quantization": "nf4", "embeddings": "int8"})
    held = predict_memory(int8, CONFIG_7B, 0, device_type="cuda").parts["weights"]
    assert nf4["weights"] - held == 2 * 125_696 * (4096 - 4)


def test_qlora_of_the_7b_model_fits_a_24_gb_card_and_the_whole_13b_does_not() -> None:
    small = predicted(
        model={"base": "b", "quantization": "nf4"},
        data={"train": "t", "max_length": 1024},
        train={"batch_size": 2},
    )
    assert 6 * GIB < small < 16 * GIB
    assert predicted(CONFIG_13B) > 24 * GIB


def test_suggestions_fit_what_they_promise() -> None:
    train = {"batch_size": 16, "gradient_checkpointing": False}
    made = recipe(train=train)

    def followed(text: str, config: dict[str, Any]) -> int:
        """The memory of the recipe with a suggestion's overrides; what it promises is that."""
        overrides, _, promise = text.partition(" (predicted ")
        changes: dict[str, dict[str, Any]] = {
            "model": {"base": "b"},
            "data": {"train": "t"},
            "train": {**train},
        }
        for override in overrides.split():
            key, _, value = override.partition("=")
            section, _, name = key.partition(".")
            changes[section][name] = int(value) if value.isdigit() else True if value == "true" else value
        total = predicted(config, None, **changes)
        assert promise == f"{total / GIB:.1f} GiB)"
        return total

    assert predicted(train=train) > 24 * GIB
    found = suggestions(made, CONFIG_7B, LORA_64, 24 * GIB)
    assert any("train.gradient_checkpointing=true" in text for text in found)
    assert all(followed(text, CONFIG_7B) <= 24 * GIB for text in found)
    # Where no single change is enough, all together are named.
    (everything,) = suggestions(made, CONFIG_13B, LORA_64, 16 * GIB)
    assert "batch_size=1" in everything
    assert "nf4" in everything
    assert followed(everything, CONFIG_13B) <= 16 * GIB
    assert "quantization=nf4 model.embeddings=int8 (" in everything  # which goes with nf4 only
    assert suggestions(made, CONFIG_13B, LORA_64, 4 * GIB) == []  # nothing that would not fit either


def test_a_lower_rank_is_suggested_where_it_is_enough() -> None:
    """The highest of 32, 16 and 8 that fits, alone or with everything else."""

    def predicted_at(rank: int, **model: str) -> int:
        made = recipe(
            model={"base": "b", "quantization": "nf4", **model},
            adapter={"rank": rank},
            train={"batch_size": 1, "activation_offloading": offloading},
            data={"train": "t", "max_length": 512},
        )
        trainable, _ = count_parameters(made, CONFIG_7B)
        return predict_memory(made, CONFIG_7B, trainable, device_type="cuda").total

    offloading = False
    made = recipe(
        model={"base": "b", "quantization": "nf4"},
        train={"batch_size": 1},
        data={"train": "t", "max_length": 512},
    )
    for rank in (32, 16, 8):
        size = predicted_at(rank)
        found = suggestions(made, CONFIG_7B, LORA_64, size)
        assert f"adapter.rank={rank} (predicted {size / GIB:.1f} GiB)" in found
    offloading = True
    size = predicted_at(16, embeddings="int8")
    (everything,) = suggestions(made, CONFIG_7B, LORA_64, size)
    assert everything.endswith(f"model.embeddings=int8 adapter.rank=16 (predicted {size / GIB:.1f} GiB)")
    prompts = recipe(
        model={"base": "b", "quantization": "nf4"},
        adapter={"method": "ptuning"},
        data={"train": "t", "packing": False},
    )
    assert "adapter.rank" not in " ".join(suggestions(prompts, CONFIG_7B, 10**8, 7 * GIB))


def test_suggestions_count_both_rows_of_a_pair() -> None:
    """DPO has two rows for each one of the batch size."""
    made = recipe(train={"batch_size": 2}, data={"train": "t", "max_length": 4096})
    one_pair = recipe(train={"batch_size": 1}, data={"train": "t", "max_length": 4096})
    fits = predict_memory(one_pair, CONFIG_7B, LORA_64, device_type="cuda", sequences=2).total

    def smaller_batch(budget: int) -> bool:
        found = suggestions(made, CONFIG_7B, LORA_64, budget, sequences=2)
        return any(text.startswith("train.batch_size=1 train.gradient_accumulation=8 (") for text in found)

    assert smaller_batch(fits)
    assert not smaller_batch(fits - 1)


def test_suggestions_can_be_followed() -> None:
    """Nothing is suggested that the rest of the recipe refuses."""
    quantised = recipe(model={"base": "b", "quantization": "nf4"}, train={"batch_size": 1})
    tight = predict_memory(quantised, CONFIG_7B, LORA_64, device_type="cuda").total - GIB // 2
    named = [text.partition(" (")[0] for text in suggestions(quantised, CONFIG_7B, LORA_64, tight)]
    assert named == ["model.embeddings=int8", "adapter.rank=32"]
    prefix = recipe(
        adapter={"method": "prefix"},
        data={"train": "t", "packing": False, "max_length": 1024},
        train={"batch_size": 1},
    )
    listed = " ".join(suggestions(prefix, CONFIG_7B, 0, 12 * GIB))
    assert "model.quantization=nf4" in listed
    assert "checkpointing" not in listed
    assert "embeddings" not in listed


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
