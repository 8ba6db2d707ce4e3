"""What fits a device, and how long a step takes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_memory import CONFIG_7B, CONFIG_13B, LORA_64, recipe
from tiny_run import ROOT, finetune, metrics, write_recipe

from finetune.baichuan.catalog import known_config
from finetune.errors import UserError
from finetune.recipe.train_section import AUTO, Train
from finetune.train.devices import CARDS, GIB, Device, parse_device
from finetune.train.planning import HEADROOM, Plan, with_batch_size
from finetune.train.preflight import describe_card
from finetune.train.speed import predict_seconds, seconds_per_step, step_flops
from rlhf.ppo.recipe import PPORecipe


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("24GiB", 24),
        ("24 g", 24),
        ("RTX 4090", 23.6),
        ("NVIDIA a100", 79.2),
        ("22.5GiB", 22.5),
        ("1TiB", 1024),
    ],
)
def test_devices_by_name_and_by_size(text: str, gib: float) -> None:
    assert parse_device(text).memory == int(gib * GIB)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-16"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("A100-80GB", "A100"),
        ("a100-40", "A100-40"),
        ("A100 40GB", "A100-40"),
        ("A100 80GiB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("A6000", "RTX A6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_devices_as_nvidia_smi_and_people_call_them(text: str, name: str) -> None:
    assert parse_device(text).name == name


def test_every_card_is_known_by_its_own_name() -> None:
    assert [parse_device(card.name) for card, _ in CARDS] == [card for card, _ in CARDS]


def test_this_machine_is_no_card() -> None:
    with pytest.raises(UserError, match="leave --device out to plan for this machine"):
        parse_device("cpu")


@pytest.mark.parametrize(
    ("name", "sold_as"), [("T4", 16), ("L4", 24), ("RTX 4090", 24), ("L20", 48), ("H100", 80)]
)
def test_a_card_has_less_than_it_is_sold_by(name: str, sold_as: int) -> None:
    """What is fitted into 16 GiB of a T4 does not fit the 14.6 that CUDA gives."""
    assert 0.9 * sold_as < parse_device(name).memory / GIB < 0.995 * sold_as


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("rtx4080", "RTX 4090"),
        ("", "A100"),
        ("0GiB", "A100"),
        ("many", "A100"),
        ("24", "did you mean 24GiB?"),
        ("22.5", "did you mean 22.5GiB?"),
        ("4080", "did you mean RTX 4090?"),
        ("A100 24GB", "A100-40"),
        ("NVIDIA H100 NVL", "did you mean H100?"),  # of 94 GB
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090"),  # of 16 GB
    ],
)
def test_unknown_devices_are_refused(text: str, hint: str) -> None:
    with pytest.raises(UserError, match="--device: found") as caught:
        parse_device(text)
    assert hint in str(caught.value)


def said_of(card: str, **model: str) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    describe_card(recipe(model={"base": "b", **model}), parse_device(card), console)
    return console.export_text()


def test_what_a_card_cannot_compute() -> None:
    for card in ("T4", "V100"):
        assert said_of(card) == f"{card} has no bfloat16: set model.dtype=float16\n"
        assert said_of(card, dtype="float16") == said_of("A100") == said_of("14GiB") == ""
        for attention in ("flash_attention_2", "flash_attention_3"):
            with pytest.raises(UserError, match=rf"{attention} needs .* 8\.0 .*{card} has 7\."):
                said_of(card, attention=attention, dtype="float16")
    assert (
        said_of("RTX 4090", attention="flash_attention_2")
        == said_of("H100", attention="flash_attention_3")
        == ""
    )
    assert "RTX 4090 has 8.9" in said_of("RTX 4090", attention="flash_attention_3")


def test_ppo_is_not_sent_to_float16_which_it_refuses() -> None:
    made = PPORecipe(
        **{"name": "x", "stage": "ppo", "model": {"base": "b"}, "data": {"train": "t"}},  # type: ignore[arg-type]
        ppo={"reward": "a:b"},  # type: ignore[arg-type]
    )
    console = Console(record=True, width=200, file=io.StringIO())
    describe_card(made, parse_device("T4"), console)
    assert console.export_text() == "T4 has no bfloat16: stage ppo wants a newer card\n"


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
    with pytest.raises(ValueError, match="at least 1, or auto, found 'atuo'"):
        Train(batch_size="atuo")  # type: ignore[arg-type]


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
    beside = step_flops(made, CONFIG_7B, tokens=10.0, document=100.0, supervised=0.5, references=1) - found
    assert beside == pytest.approx(10 * (2 * body + 2 * 32 * 4096 * 100 + 2 * 125_696 * 4096 * 0.5))


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


def test_a_step_of_full_rows_where_there_is_no_data() -> None:
    made = recipe(train={"batch_size": 2, "gradient_accumulation": 3})
    length = float(made.data.max_length)
    flops = step_flops(made, CONFIG_7B, tokens=6 * length, document=length, supervised=1.0)
    card = parse_device("A100")
    assert predict_seconds(made, CONFIG_7B, card) == seconds_per_step(flops, made, card)
    assert predict_seconds(made, CONFIG_7B, parse_device("24GiB")) is None
    cpu = Device("a CPU", 2**34, 1e11, "cpu")
    narrow, wide = (predict_seconds(made, {**CONFIG_7B, "hidden_size": size}, cpu) for size in (511, 512))
    assert narrow is not None
    assert narrow > 1.5 * wide, "what is no product weighs more"
    pairs = predict_seconds(made, CONFIG_7B, card, sequences=2, references=1)
    assert pairs is not None
    assert (
        pairs / predict_seconds(made, CONFIG_7B, card) > 2.5
    )  # two rows, half as much again for the reference


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
    output = finetune("check", "recipes/qlora_medical_13b.yaml", "--device", "9GiB")
    assert "nothing fits it by data.max_length or train.batch_size alone" in output
    assert "up to 0" not in output
    output = finetune("check", "recipes/qlora_medical_13b.yaml", "--device", "4GiB", expect=2)
    assert "use a smaller base or a GPU with more memory" in output
    output = finetune("check", "recipes/lora_medical.yaml", "--device", "12GiB", expect=2)
    assert "the weights of baichuan2-7b-chat take 14.0 GiB" in output
    assert "model.quantization=nf4" in output


def test_check_plans_ppo_without_base_and_reward_model() -> None:
    output = finetune("check", "recipes/ppo_helpful.yaml", "--device", "24GiB")
    assert "baichuan2-7b-chat is not here: planned by its shapes" in output
    assert "predicted peak memory" in output
    assert "\nfits 24GiB (24.0 GiB)" in output
    output = finetune("check", "recipes/ppo_helpful.yaml", "--device", "10GiB")
    assert "does not fit 10GiB (10.0 GiB): lower train.batch_size" in output
    full = ("check", "recipes/ppo_helpful.yaml", "--device", "24GiB", "data.max_length=4096")
    assert "does not fit" in finetune(*full, "ppo.rollout_batch_size=64")  # prompts are as long as may be


def test_check_plans_the_steps_that_wait_for_an_adapter(tmp_path: Path) -> None:
    """Each with the size of the adapter that it will go on from: rank 16 here, where the default is 64."""
    for name in ("sft", "reward", "ppo"):
        text = (ROOT / f"recipes/rlhf_medical/{name}.yaml").read_text(encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(text.replace("rank: 64", "rank: 16"), encoding="utf-8")
    pipeline = tmp_path / "all.yaml"
    pipeline.write_text("pipeline: [sft.yaml, reward.yaml, ppo.yaml]\n", encoding="utf-8")
    output = finetune("check", pipeline, "--device", "A100 40GB")
    _, _, reward, ppo = output.split(": stage ")
    assert "sft/adapter is not there yet, so only the recipe was checked" in reward
    assert f"trainable parameters: {LORA_64 // 4:,} of" in reward
    assert "fits A100-40" in reward
    assert f"trainable parameters: {LORA_64 // 2:,} (actor and critic)" in ppo
    assert "fits A100-40" in ppo


def test_check_with_a_base_says_time_and_memory(tiny_base: Path, tmp_path: Path) -> None:
    output = finetune("check", write_recipe(tmp_path, tiny_base), "--device", "RTX 4090")
    assert "estimated time on RTX 4090" in output
    assert "the recipe can run" not in output  # that card is not here
    assert "the recipe can run" in finetune("check", write_recipe(tmp_path, tiny_base))
