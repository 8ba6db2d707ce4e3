"""What fits a device, and how long a step takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_memory import CONFIG_7B, CONFIG_13B, LORA_64, recipe
from tiny_run import finetune, metrics, write_recipe

from finetune.baichuan.catalog import known_config
from finetune.errors import UserError
from finetune.recipe.train_section import AUTO, Train
from finetune.train.devices import GIB, Device, parse_device
from finetune.train.planning import HEADROOM, Plan, with_batch_size
from finetune.train.speed import seconds_per_step, step_flops


@pytest.mark.parametrize(
    ("text", "gib"), [("24GiB", 24), ("24 g", 24), ("RTX 4090", 24), ("NVIDIA a100", 80), ("22.5GiB", 22.5)]
)
def test_devices_by_name_and_by_size(text: str, gib: float) -> None:
    assert parse_device(text).memory == gib * GIB


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("rtx4080", "RTX 4090"),
        ("", "A100"),
        ("0GiB", "A100"),
        ("many", "A100"),
        ("24", "did you mean 24GiB?"),
        ("22.5", "did you mean 22.5GiB?"),
    ],
)
def test_unknown_devices_are_refused(text: str, hint: str) -> None:
    with pytest.raises(UserError, match="--device: found") as caught:
        parse_device(text)
    assert hint in str(caught.value)


def plan(gib: float = 24, config: dict[str, Any] = CONFIG_7B, **sections: dict[str, Any]) -> Plan:
    sections = {"model": {"base": "b", "quantization": "nf4"}, **sections}
    return Plan(recipe(**sections), config, LORA_64, Device("card", int(gib * GIB), 1e14))


def test_largest_is_the_last_that_fits() -> None:
    made = plan()
    batch, length = made.largest_batch(), made.longest_length()
    assert made.fits(made.memory(batch_size=batch))
    assert not made.fits(made.memory(batch_size=batch + 1))
    assert made.fits(made.memory(length=length))
    assert not made.fits(made.memory(length=length + 128))
    assert made.memory(batch_size=batch).total <= HEADROOM * made.device.memory
    nothing = plan(gib=3)
    assert (nothing.largest_batch(), nothing.longest_length()) == (0, 0)
    assert plan(gib=48).longest_length() > length > plan(config=CONFIG_13B).longest_length()


def test_auto_takes_the_largest_divisor_that_fits() -> None:
    for gib in (7.5, 10, 14, 24, 80):
        made = plan(gib, train={"batch_size": "auto", "gradient_accumulation": 12})
        assert made.recipe.train.batch_size == AUTO
        train = with_batch_size(made).train
        assert train.batch_size * train.gradient_accumulation == 12
        best = made.largest_batch()
        assert train.batch_size == max([n for n in (1, 2, 3, 4, 6, 12) if n <= best], default=1)


def test_auto_in_recipes() -> None:
    assert Train(batch_size="auto").model_dump()["batch_size"] == "auto"  # type: ignore[arg-type]
    assert Train(batch_size=2).model_dump()["batch_size"] == 2
    for bad in (0, -1, "many", 1.5, True):
        with pytest.raises(ValueError, match="batch_size"):
            Train(batch_size=bad)  # type: ignore[arg-type]


def test_a_run_decides_auto_and_resumes_with_it(tiny_base: Path, tmp_path: Path) -> None:
    import yaml

    made = write_recipe(
        tmp_path, tiny_base, train={"batch_size": "auto", "gradient_accumulation": 6, "max_steps": 2}
    )
    finetune("run", made)
    decided = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))["train"]
    assert (decided["batch_size"], decided["gradient_accumulation"]) == (6, 1)
    finetune("run", made, "train.max_steps=3", "--resume")
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line][-1] in (2, 3)


def test_flops_of_a_step() -> None:
    """7B, rank 64: 6.48 billion frozen weights in the layers, 143 million in the adapter."""
    made = recipe(train={"gradient_checkpointing": False})
    body, adapter = 32 * (4 * 4096**2 + 3 * 4096 * 11_008), LORA_64
    expected = 4 * body + 6 * adapter + 4 * 125_696 * 4096 * 0.5 + 6 * 32 * 4096 * 100
    found = step_flops(made, CONFIG_7B, tokens=10.0, document=100.0, supervised=0.5)
    assert found == pytest.approx(10 * expected, rel=1e-12)
    again = recipe(train={"gradient_checkpointing": True})
    more = step_flops(again, CONFIG_7B, tokens=10.0, document=100.0, supervised=0.5)
    assert more - found == pytest.approx(10 * (2 * body + 2 * adapter + 2 * 32 * 4096 * 100))


def test_what_is_kept_is_not_computed_again() -> None:
    def flops(keep: bool | str) -> float:
        made = recipe(train={"gradient_checkpointing": keep})
        return step_flops(made, CONFIG_7B, tokens=1.0, document=4096.0, supervised=0.5)

    assert flops(True) - flops("attention") == pytest.approx(2 * 32 * 4096 * 4096)
    assert flops("matmul") - flops(False) == pytest.approx(2 * LORA_64)


def test_seconds_follow_the_card() -> None:
    made = recipe(model={"base": "b", "quantization": "nf4"})
    slow, fast = (seconds_per_step(1e15, made, parse_device(name)) for name in ("RTX 3090", "H100"))
    assert slow is not None
    assert fast is not None
    assert slow / fast == pytest.approx(989 / 71)
    assert seconds_per_step(1e15, made, parse_device("24GiB")) is None


def test_known_shapes() -> None:
    for name, vocabulary, layers, head in (
        ("baichuan2-7b-chat", 125_696, 32, True),
        ("baichuan2-13b-base", 125_696, 40, True),
        ("baichuan-13b-chat", 64_000, 40, False),
    ):
        config = known_config(name)
        assert config is not None
        shape = (config["vocab_size"], config["num_hidden_layers"], config["norm_head"])
        assert shape == (vocabulary, layers, head)
    assert known_config("baichuan2-nano") is None
    assert known_config("elsewhere/model") is None


def test_check_plans_for_a_card_without_base_and_gpu(tmp_path: Path) -> None:
    output = finetune(
        "check", "recipes/qlora_medical_13b.yaml", "--device", "24GiB", f"output_dir={tmp_path / 'x'}"
    )
    assert "baichuan2-13b-chat is not here: planned by its shapes" in output
    assert "fits 24GiB: 10." in output
    assert "what fits it: data.max_length up to" in output
    assert not (tmp_path / "x").exists()
    output = finetune("check", "recipes/qlora_medical_13b.yaml", "--device", "14.2GiB")
    assert "does not fit 14.2GiB" in output
    assert "try " in output
    output = finetune("check", "recipes/qlora_medical_13b.yaml", "--device", "4GiB", expect=2)
    assert "use a smaller base or a GPU with more memory" in output
    output = finetune("check", "recipes/lora_medical.yaml", "--device", "12GiB", expect=2)
    assert "the weights of baichuan2-7b-chat take 14.0 GiB" in output
    assert "model.quantization=nf4" in output


def test_check_with_a_base_says_time_and_memory(tiny_base: Path, tmp_path: Path) -> None:
    output = finetune("check", write_recipe(tmp_path, tiny_base), "--device", "RTX 4090")
    assert "estimated time on RTX 4090" in output
    assert "the recipe can run" not in output  # that card is not here
    assert "the recipe can run" in finetune("check", write_recipe(tmp_path, tiny_base))
