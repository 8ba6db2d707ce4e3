"""Adapters on the tiny models: nothing changed at first, the right parameters trained, whole again from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import LAYERS, padded

from finetune.adapters import attach_adapter, load_adapter, save_adapter
from finetune.adapters.build import changes_base, check_adapter_folder
from finetune.baichuan.load import Base, load_model, resolve_base
from finetune.errors import UserError
from finetune.generate import greedy_answers
from finetune.recipe.schema import Adapter, Model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

LONG, SHORT = list(range(1200, 1212)), list(range(1300, 1305))
IDS = torch.tensor([LONG])

LORA: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa_niter": {"init": "pissa_niter_4"},
    "pissa_rslora": {"init": "pissa", "rslora": True},
    "olora": {"init": "olora"},
    "two_targets": {"targets": ["W_pack", "down_proj"]},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "ptuning": {"method": "ptuning"},
    "ptuning_lstm": {"method": "ptuning", "encoder": "lstm", "encoder_layers": 1, "encoder_hidden_size": 24},
    "ptuning_none": {"method": "ptuning", "encoder": "none"},
    "prefix": {"method": "prefix"},
    "prefix_projection": {"method": "prefix", "prefix_projection": True, "encoder_hidden_size": 24},
}


def base_model(folder: Path) -> tuple[Any, Base]:
    base = resolve_base(str(folder))
    return load_model(Model(base=str(folder)), base), base


def settings(kind: str) -> Adapter:
    if kind in LORA:
        return Adapter(rank=4, alpha=8, **LORA[kind])
    return Adapter(num_virtual_tokens=5, **PROMPTS[kind])


def adapted(folder: Path, kind: str, *, trained: bool = False, initial: Path | None = None) -> Any:
    """A model with an adapter, on request as if it had been trained, its first state saved before."""
    torch.manual_seed(0)
    model, base = base_model(folder)
    peft_model = attach_adapter(model, settings(kind), base).eval()
    if initial is not None:
        save_adapter(peft_model, initial)
    if trained:
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
                    if kind in PROMPTS:
                        parameter *= 3
    return peft_model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of the ids; P-Tuning gives logits of its virtual tokens, too."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("kind", LORA)
def test_lora_changes_nothing_at_first(tiny_base: Path, kind: str) -> None:
    base, _ = base_model(tiny_base)
    new = adapted(tiny_base, kind)
    torch.testing.assert_close(logits(new), logits(base), atol=1e-4, rtol=0)
    assert changes_base(settings(kind)) == ("pissa" in kind or kind == "olora")


@pytest.mark.parametrize("kind", [*LORA, *PROMPTS])
def test_only_the_adapter_is_trained(tiny_base: Path, kind: str) -> None:
    model = adapted(tiny_base, kind, trained=True).train()
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned == trainable
    assert all("lora_" in name or "prompt_encoder" in name for name in trainable)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    if kind in LORA:
        targets = 2 if kind == "two_targets" else 5
        parts = 3 if kind == "dora" else 2
        assert len(trainable) == targets * parts * LAYERS


@pytest.mark.parametrize("kind", [*LORA, *PROMPTS])
def test_saved_adapter_loads_on_the_unchanged_base(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """Initialisations that move base weights into the adapter are turned into plain LoRA."""
    initial = tmp_path / "initial" if changes_base(settings(kind)) else None
    model = adapted(tiny_base, kind, trained=True, initial=initial)
    save_adapter(model, tmp_path / "adapter", initial=initial)
    config = check_adapter_folder(tmp_path / "adapter")
    assert config["base_model_name_or_path"] == str(tiny_base)
    assert not list((tmp_path / "adapter").glob("*.bin"))
    if initial is not None:
        assert config["init_lora_weights"] is True
        assert config["r"] == 8

    again = load_adapter(base_model(tiny_base)[0], tmp_path / "adapter").eval()
    expected = logits(model)
    torch.testing.assert_close(logits(again), expected, atol=2e-5, rtol=0)
    assert not any(p.requires_grad for n, p in again.named_parameters() if "prompt_encoder" not in n)
    assert (expected - logits(base_model(tiny_base)[0])).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["default", "ptuning", "prefix"])
def test_adapter_names_its_base_and_not_a_folder_of_this_machine(
    tiny_bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    model, base = base_model(tiny_bases["rope"])
    base = replace(base, identity="baichuan-inc/Baichuan2-7B-Chat", revision="v2.0")
    save_adapter(attach_adapter(model, settings(kind), base), tmp_path / "adapter")
    config = check_adapter_folder(tmp_path / "adapter")
    assert config["base_model_name_or_path"] == "baichuan-inc/Baichuan2-7B-Chat"
    assert config["revision"] == "v2.0"
    assert str(base.folder) not in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")


# --- prompt methods in generation -----------------------------------------------------------------------------


class Letters:
    """Decodes ids to text that shows them."""

    eos_token_id, user_token_id = 2, 195

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def step_by_step(model: Any, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding of one prompt without cache and padding."""
    ids = list(prompt)
    for _ in range(steps):
        tensor = torch.tensor([ids])
        with torch.no_grad():
            out = model(input_ids=tensor, attention_mask=torch.ones_like(tensor), use_cache=False)
        ids.append(int(out.logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["default", *PROMPTS])
def test_batched_generation_equals_step_by_step(tiny_base: Path, kind: str) -> None:
    """Left padding stands between the virtual tokens and the prompt, and must not be a distance."""
    model = adapted(tiny_base, kind, trained=True)
    prompts = [SHORT, LONG, LONG[2:5]]
    expected = [step_by_step(model, prompt, 10) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == 3
    answers = greedy_answers(model, Letters(), prompts, max_new_tokens=10)  # type: ignore[arg-type]
    for row, answer in zip(expected, answers):
        stop = next((i for i, token in enumerate(row) if token in (2, 195)), len(row))
        assert answer == " ".join(map(str, row[:stop]))


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_under_prompt_methods(tiny_base: Path, kind: str, side: str) -> None:
    model = adapted(tiny_base, kind, trained=True)
    ids, mask = padded([LONG, SHORT], side)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits[1, -ids.shape[1] :][mask[1] == 1]
    alone = logits(model, torch.tensor([SHORT]))[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", PROMPTS)
def test_disabled_prompt_adapter_is_the_base(tiny_base: Path, kind: str) -> None:
    """How a run measures the base: loss and answers before training."""
    base, _ = base_model(tiny_base)
    model = adapted(tiny_base, kind, trained=True)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base))
        inside = greedy_answers(model, Letters(), [SHORT, LONG], max_new_tokens=6)  # type: ignore[arg-type]
    assert inside == greedy_answers(base, Letters(), [SHORT, LONG], max_new_tokens=6)  # type: ignore[arg-type]
    assert (logits(model) - logits(base)).abs().max() > 0.05  # and on again


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("lm_head", "normalises its head"),
        ("q_proj", "packs q, k and v into W_pack: target W_pack"),
        ("k_proj", "target W_pack"),
        ("w_pack", "the matrices are W_pack, down_proj, gate_proj"),
        ("embed_tokens", "is no matrix of this model"),
    ],
)
def test_unknown_targets(tiny_bases: dict[str, Path], target: str, says: str) -> None:
    model, base = base_model(tiny_bases["rope"])
    with pytest.raises(UserError, match=r"adapter\.targets: ") as caught:
        attach_adapter(model, Adapter(targets=["W_pack", target]), base)
    assert says in str(caught.value)


def test_folders_that_are_no_adapter(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_adapter(base_model(tiny_bases["rope"])[0], folder)
        return str(caught.value)

    assert "no adapter_config.json, so not an adapter folder" in refusal(tmp_path / "absent")
    run = tmp_path / "run"
    save_adapter(adapted(tiny_bases["rope"], "default", trained=True), run / "adapter")
    assert f"give {run / 'adapter'}" in refusal(run)

    weights = run / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert f"{weights}: not a complete safetensors file" in refusal(run / "adapter")
    weights.rename(weights.with_suffix(".bin"))
    assert "since they are pickles" in refusal(run / "adapter")
    weights.write_bytes(whole)
    assert load_file(weights)
    (run / "adapter" / "adapter_config.json").write_text("{")
    assert "adapter_config.json: not valid JSON" in refusal(run / "adapter")


@pytest.mark.parametrize("kind", ["default", "ptuning", "prefix"])
def test_adapter_of_a_model_of_another_shape(tiny_bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    from tiny_model import tiny_model

    save_adapter(adapted(tiny_bases["rope"], kind, trained=True), tmp_path / "adapter")
    other = tiny_model("rope", hidden_size=96, num_hidden_layers=3)
    with pytest.raises(UserError, match="does not fit the base") as caught:
        load_adapter(other, tmp_path / "adapter")
    assert "base_model_name_or_path" in str(caught.value)
