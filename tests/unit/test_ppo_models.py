"""Four models on one base: shared storage, exact switching, gradients that go where they belong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_model import tiny_model

from finetune.baichuan.checkpointing import Checkpointing
from finetune.baichuan.loss import tile_rows
from finetune.errors import UserError
from rlhf.ppo import logprobs as logprobs_module
from rlhf.ppo.logprobs import tiled_logprobs
from rlhf.ppo.models import ScalarHead, SharedBase

NAMES = ("actor", "critic", "reward")
IDS = torch.tensor([[195, 1400, 1500, 196, 1600, 1700], [195, 1450, 196, 1650, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def config(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=8, lora_dropout=0.1, target_modules=["W_pack", "down_proj"])


def randomise(models: SharedBase, name: str, seed: int) -> None:
    """An adapter that changes something (B begins at zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in models.named_parameters(name):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=["rope", "alibi"])
def models(request: pytest.FixtureRequest) -> SharedBase:
    shared = SharedBase(tiny_model(request.param))
    for seed, name in enumerate(NAMES):
        shared.add_new(name, config(4 + 2 * seed), trainable=name != "reward")
        randomise(shared, name, seed)
    shared.add_copy("reference", of="actor")
    return shared


def logits(models: SharedBase) -> torch.Tensor:
    with torch.no_grad():
        return models.lm.lm_head(models.hidden(IDS, MASK))


def test_all_models_share_the_frozen_parameters(models: SharedBase) -> None:
    """By storage: what a forward pass of each model reads is the same memory, and there is no second copy."""
    read: dict[str, set[int]] = {}
    for name in (*NAMES, "reference"):
        seen = read.setdefault(name, set())
        hooks = [
            layer.base_layer.register_forward_hook(lambda m, *_, seen=seen: seen.add(m.weight.data_ptr()))
            for layer in models._layers
        ]
        with models.using(name):
            logits(models)
        for hook in hooks:
            hook.remove()
    assert len(read["actor"]) == len(models._layers) == 4
    assert all(seen == read["actor"] for seen in read.values())
    frozen = [p for key, p in models.lm.named_parameters() if "lora_" not in key]
    assert sum(p.numel() for p in frozen) == sum(p.numel() for p in tiny_model().parameters())
    assert not any(p.requires_grad for p in frozen)


def test_switching_gives_exactly_what_separate_models_give(models: SharedBase, tmp_path: Path) -> None:
    encoding = models.lm.config.position_embedding
    with models.using(None):
        bare = logits(models)
    alone = tiny_model(encoding)
    alone.freeze_head()
    with torch.no_grad():
        assert torch.equal(bare, alone(input_ids=IDS, attention_mask=MASK).logits)
    for name in NAMES:
        models.save(name, tmp_path / name)
        separate = PeftModel.from_pretrained(copy.deepcopy(alone), str(tmp_path / name)).eval()
        with torch.no_grad():
            expected = separate(input_ids=IDS, attention_mask=MASK).logits
        with models.using(name):
            assert torch.equal(logits(models), expected)
        assert not torch.equal(bare, expected)
    with models.using("reference"), models.using("critic"):
        with models.using(None):
            assert torch.equal(logits(models), bare)
        with models.using("actor"):
            actor = logits(models)
    with models.using("reference"):
        assert torch.equal(logits(models), actor)
    randomise(models, "actor", 99)
    with models.using("reference"):  # a copy, not a view
        assert torch.equal(logits(models), actor)


def test_an_adapter_is_active_in_its_context_only(models: SharedBase) -> None:
    with pytest.raises(RuntimeError, match="within"), models.using("actor"):
        raise RuntimeError("within")
    base = logits(models)
    with models.using(None):
        assert torch.equal(base, logits(models))
    with pytest.raises(KeyError), models.using("judge"):
        pass


def loss_of(models: SharedBase, name: str, head: ScalarHead) -> torch.Tensor:
    with models.using(name):
        return (head(models.hidden(IDS, MASK)) * MASK).square().mean()


def gradients(models: SharedBase) -> dict[str, Any]:
    found = {
        f"{name}:{key}": parameter.grad
        for name in (*NAMES, "reference")
        for key, parameter in models.named_parameters(name)
    }
    models.lm.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("keep", ["inputs", "matmul"])
@pytest.mark.parametrize("active_in_backward", [None, "critic", "reward"])
def test_gradients_under_checkpointing(models: SharedBase, active_in_backward: str | None, keep: Any) -> None:
    """One backward pass through actor and critic, while anything is active: as without recomputation."""
    head = ScalarHead(64)
    models.lm.train()
    (loss_of(models, "actor", head) + 2 * loss_of(models, "critic", head)).backward()
    expected = gradients(models)
    models.lm.checkpointing = Checkpointing(keep)
    models.checkpoint_activations()
    loss = loss_of(models, "actor", head) + 2 * loss_of(models, "critic", head)
    with models.using("reward"):
        logits(models)
    with models.using(active_in_backward):
        loss.backward()
    found = gradients(models)
    for key, gradient in expected.items():
        if key.startswith(("actor", "critic")):
            assert gradient.any()
            assert torch.equal(found[key], gradient), key
        else:
            assert gradient is None
            assert found[key] is None


def test_switching_decides_nothing_about_training(models: SharedBase) -> None:
    for name in (*NAMES, "reference", None):
        with models.using(name):
            logits(models)
        trained = {n for n in (*NAMES, "reference") for _, p in models.named_parameters(n) if p.requires_grad}
        assert trained == {"actor", "critic"}


def test_adapters_have_no_dropout(models: SharedBase) -> None:
    models.lm.train()
    with models.using("actor"):
        assert torch.equal(logits(models), logits(models))


def test_saved_adapter_comes_back(models: SharedBase, tmp_path: Path) -> None:
    models.save("critic", tmp_path / "critic")
    other = SharedBase(tiny_model(models.lm.config.position_embedding))
    other.add_saved("value", tmp_path / "critic", trainable=True)
    other.add_saved("frozen", tmp_path / "critic")
    with models.using("critic"):
        expected = logits(models)
    for name in ("value", "frozen"):
        with other.using(name):
            assert torch.equal(logits(other), expected)
    assert all(p.requires_grad for _, p in other.named_parameters("value"))
    assert not any(p.requires_grad for _, p in other.named_parameters("frozen"))
    wider = SharedBase(tiny_model(models.lm.config.position_embedding, hidden_size=128))
    with pytest.raises(UserError, match="does not fit the base"):
        wider.add_saved("value", tmp_path / "critic")
    with pytest.raises(UserError, match="adapter_config"):
        wider.add_saved("value", tmp_path)


# --- tiled log-probabilities ------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiles of 16 positions; returns the sizes of logits that were made."""
    made: list[int] = []

    def rows(vocab_size: int, device_type: str) -> int:
        made.append(vocab_size)
        return 16

    monkeypatch.setattr(logprobs_module, "tile_rows", rows)
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tiled_logprobs_against_log_softmax(small_tiles: list[int], temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(301, 24, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 301, (37,), generator=generator)
    upstream = torch.randn(37, generator=generator)
    logprobs, entropy = tiled_logprobs(hidden, weight, targets, temperature=temperature)
    logprobs.backward(upstream)
    found, hidden.grad = hidden.grad, None

    whole = (hidden @ weight.T / temperature).log_softmax(-1)
    expected = whole.gather(1, targets[:, None])[:, 0]
    expected.backward(upstream.double())
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(whole.exp() * whole).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, hidden.grad, rtol=1e-4, atol=1e-5)
    assert not entropy.requires_grad
    assert small_tiles


def test_entropy_is_float32_where_autocast_would_have_less() -> None:
    hidden, weight, targets = torch.randn(5, 16), torch.randn(4000, 16), torch.arange(5)
    _, expected = tiled_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, entropy = tiled_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
        _, exact = tiled_logprobs(hidden.bfloat16().float(), weight.bfloat16().float(), targets)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy, exact, rtol=0, atol=0.02)
    torch.testing.assert_close(entropy, expected, rtol=0, atol=0.1)


def test_tiled_logprobs_without_positions_and_with_a_trainable_head() -> None:
    weight = torch.randn(50, 8)
    empty, _ = tiled_logprobs(torch.zeros(0, 8, requires_grad=True), weight, torch.zeros(0, dtype=torch.long))
    assert empty.shape == (0,)
    empty.sum().backward()
    with pytest.raises(ValueError, match="frozen"):
        tiled_logprobs(torch.zeros(1, 8), weight.requires_grad_(), torch.zeros(1, dtype=torch.long))


def test_tiled_logprobs_hold_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory beside the result, forward and backward, does not grow with the number of positions."""
    vocab, width = 20_000, 16
    monkeypatch.setattr(logprobs_module, "tile_rows", lambda *_: 32)
    weight = torch.randn(vocab, width)
    largest = []
    for n in (64, 512):
        hidden = torch.randn(n, width, requires_grad=True)
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as prof:
            logprobs, _ = tiled_logprobs(hidden, weight, torch.randint(0, vocab, (n,)))
            logprobs.sum().backward()
        largest.append(max(event.cpu_memory_usage for event in prof.events()))
    tile_bytes = 32 * vocab * 4
    assert all(tile_bytes <= size < 4 * tile_bytes for size in largest), largest
    assert tile_rows(125_696, "cuda") * 125_696 * 4 <= 2**28
    assert [tile_rows(size, "cpu") for size in (125_696, 2**24, 2**18)] == [128, 16, 64]
