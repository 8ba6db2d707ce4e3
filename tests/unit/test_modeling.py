"""The model on transformers' machinery: masks, caches, checkpointing, compilation, dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import HIDDEN, LAYERS, VOCAB_SIZE, padded, tiny_model
from transformers import AutoModelForCausalLM

ENCODINGS = ("rope", "alibi")
LONG, SHORT = list(range(1200, 1212)), list(range(1300, 1305))


@pytest.fixture(params=ENCODINGS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_parameters_have_the_official_names(model: Any) -> None:
    matrices = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    inner = (*matrices, "input_layernorm", "post_attention_layernorm")
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"model.layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in inner}
    assert set(model.state_dict()) == expected  # no slopes, no frequencies
    assert model.model.layers[0].self_attn.W_pack.weight.shape == (3 * HIDDEN, HIDDEN)


def test_every_parameter_learns(model: Any) -> None:
    ids = torch.tensor([LONG])
    model.train()
    model(ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_buffers_are_right_after_loading_on_the_meta_device(tiny_base: Path) -> None:
    """Models are created without memory and filled; what is computed in ``__init__`` would be garbage."""
    loaded = AutoModelForCausalLM.from_pretrained(tiny_base, trust_remote_code=False)
    fresh = tiny_model(loaded.config.position_embedding)
    buffers = dict(loaded.named_buffers())
    assert buffers
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@torch.no_grad()
def test_a_changed_past_changes_the_present_and_no_earlier_token(model: Any) -> None:
    ids = torch.tensor([LONG])
    changed = ids.clone()
    changed[0, 5] = 1500
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_word_order_matters(model: Any) -> None:
    """Without position encodings the last token would see a bag of words (in a single layer)."""
    swapped = [LONG[1], LONG[0], *LONG[2:]]
    difference = model(torch.tensor([LONG])).logits[:, -1] - model(torch.tensor([swapped])).logits[:, -1]
    assert difference.abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: Any, side: str) -> None:
    ids, mask = padded([LONG, SHORT], side)
    logits = model(ids, attention_mask=mask).logits
    close(logits[1][mask[1] == 1], model(torch.tensor([SHORT])).logits[0])


@torch.no_grad()
def test_padding_between_real_tokens_changes_nothing(model: Any) -> None:
    """As left padding does behind a prompt's virtual tokens: masked slots are no distance."""
    ids = torch.tensor([LONG[:4] + [0] * 6 + LONG[4:]])
    mask = (ids != 0).long()
    expected = model(torch.tensor([LONG])).logits[0]
    close(model(ids, attention_mask=mask).logits[0][mask[0] == 1], expected)
    # The same with the tokens before the gap in the cache already.
    cache = model(torch.tensor([LONG[:4]]), use_cache=True).past_key_values
    rest = torch.tensor([[0] * 6 + LONG[4:]])
    logits = model(rest, attention_mask=mask, past_key_values=cache).logits[0]
    close(logits[6:], expected[4:])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_generation(model: Any, cache: str) -> None:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    alone = model.generate(torch.tensor([SHORT]), attention_mask=torch.ones(1, 5).long(), **options)
    ids, mask = padded([LONG, SHORT], "left")
    both = model.generate(
        ids, attention_mask=mask, cache_implementation=cache, disable_compile=True, **options
    )
    assert both[1, -8:].tolist() == alone[0, -8:].tolist()


@torch.no_grad()
def test_output_attentions(model: Any) -> None:
    model.set_attn_implementation("eager")
    attentions = model(torch.tensor([LONG]), output_attentions=True).attentions
    assert len(attentions) == LAYERS
    for weights in attentions:
        close(weights.sum(-1), torch.ones(1, model.config.num_attention_heads, len(LONG)))
        assert not weights.triu(1).any()


def test_gradient_checkpointing_gives_the_same_gradients(model: Any) -> None:
    ids = torch.tensor([LONG])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model.train()
    expected = gradients()
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for name, gradient in gradients().items():
        close(gradient, expected[name], 1e-6)
    assert len(calls) == 2  # once more in the backward pass


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_and_agrees(tiny_base: Path, dtype: torch.dtype) -> None:
    exact = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    half = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype, device_map={"": "cpu"})
    assert {p.dtype for p in half.parameters()} == {dtype}
    ids = torch.arange(1100, 1400)[None]
    expected = exact(ids).logits
    error = (half(ids).logits.float() - expected).square().mean().sqrt()
    assert error < 0.05 * expected.std()


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_compiled_model_agrees(encoding: str) -> None:
    model = tiny_model(encoding)
    ids, mask = padded([LONG, SHORT], "left")
    expected = model(ids, attention_mask=mask).logits
    compiled = torch.compile(model, fullgraph=True)
    close(compiled(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1], 1e-4)
    numbers = torch.tensor([[1] * 5 + [2] * 7] * 2)  # packed documents
    expected = model(ids, attention_mask=numbers).logits
    close(compiled(ids, attention_mask=numbers).logits, expected, 1e-4)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_flex_attention_agrees(encoding: str) -> None:
    model = tiny_model(encoding)
    ids, mask = padded([LONG, SHORT], "left")
    expected = model(ids, attention_mask=mask).logits
    numbers = torch.tensor([[1] * 5 + [2] * 7] * 2)  # packed documents
    packed = model(ids, attention_mask=numbers).logits
    model.set_attn_implementation("flex_attention")
    close(model(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1], 1e-4)
    close(model(ids, attention_mask=numbers).logits, packed, 1e-4)


def test_ids_and_embeddings_exclude_each_other(model: Any) -> None:
    ids = torch.tensor([LONG])
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(1, 12, HIDDEN))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    embedded = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embedded).logits, model(ids).logits)
    assert model(ids, logits_to_keep=1).logits.shape == (1, 1, VOCAB_SIZE)
