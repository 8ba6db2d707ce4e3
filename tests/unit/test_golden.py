"""The implementation against numbers computed with Baichuan 2's own code (see the golden folder's README)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import finetune  # noqa: F401  (registers the Auto classes)

SHAPES = ["baichuan2-7b-tiny", "baichuan2-13b-tiny"]
ATTENTIONS = ["sdpa", "eager"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, golden: Path) -> Path:
    return golden / request.param


@pytest.fixture(scope="module")
def values(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "inputs.safetensors") | load_file(folder / "expected.safetensors")


@pytest.fixture(params=ATTENTIONS)
def model(request: pytest.FixtureRequest, folder: Path):
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, attn_implementation=request.param
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_config_says_what_official_configs_leave_out(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert config.position_embedding == ("rope" if "7b" in folder.name else "alibi")
    assert config.norm_head
    assert config.to_dict()["position_embedding"] == config.position_embedding


@torch.no_grad()
def test_logits_and_hidden_states(model, values) -> None:
    out = model(values["ids"], output_hidden_states=True)
    assert_close(out.logits, values["logits"])
    assert_close(out.hidden_states[-1], values["hidden_last"])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model, values, side: str) -> None:
    mask = values[f"mask_{side}pad"]
    logits = model(values[f"ids_{side}pad"], attention_mask=mask).logits
    assert_close(logits[mask == 1], values[f"logits_{side}pad"][mask == 1])


@torch.no_grad()
def test_long_sequence(model, values) -> None:
    assert_close(model(values["ids_long"]).logits[0, -8:], values["logits_long_last8"])


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model, values) -> None:
    a, b = values["doc_a"], values["doc_b"]
    ids = torch.cat([a, b])[None]
    expected = torch.cat([values["logits_doc_a"], values["logits_doc_b"]])
    positions = torch.cat([torch.arange(len(a)), torch.arange(len(b))])[None]
    assert_close(model(ids, position_ids=positions).logits[0], expected)
    numbers = torch.cat([torch.ones_like(a), torch.full_like(b, 2)])[None]
    assert_close(model(ids, attention_mask=numbers).logits[0], expected)


@pytest.mark.parametrize("weight", ["0", "0.0002"])
def test_loss_and_gradients(model, values, weight: str) -> None:
    model.train()
    model.config.z_loss_weight = float(weight)
    loss = model(values["ids"], labels=values["ids"]).loss
    assert_close(loss, values[f"loss_z{weight}"][0], 1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = values.get(f"grad_z{weight}/{name}")
        if expected is not None:
            scale = expected.abs().max()
            assert_close(parameter.grad / scale, expected / scale)


def test_masked_loss(model, values) -> None:
    loss = model(values["ids"], labels=values["labels_masked"]).loss
    assert_close(loss, values["loss_masked"][0], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_greedy_generation(model, values, cache: str) -> None:
    prompt, expected = values["prompt"], values["greedy"]
    options: dict = {"use_cache": cache != "none"}
    if cache == "static":
        options["past_key_values"] = StaticCache(config=model.config, max_cache_len=expected.shape[1])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=None,
        **options,
    )
    assert out.tolist() == expected.tolist()


@torch.no_grad()
def test_left_padded_generation_equals_unpadded(model, values) -> None:
    prompt, expected = values["prompt"], values["greedy"]
    short = prompt[:, 6:]
    alone = model.generate(
        short, attention_mask=torch.ones_like(short), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    ids = torch.cat([prompt, torch.cat([prompt.new_zeros(1, 6), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    both = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert both[0].tolist() == expected[0, :32].tolist()
    assert both[1, 6:].tolist() == alone[0].tolist()


@torch.no_grad()
def test_frozen_head_gives_the_same_logits(model, values) -> None:
    model.freeze_head()
    assert_close(model(values["ids"]).logits, values["logits"])
    rows = model.lm_head.stored_weight.norm(dim=-1)
    assert_close(rows, torch.ones_like(rows), 1e-5)


@torch.no_grad()
def test_head_weight_reads_normalised_for_libraries_that_multiply_themselves(model, values) -> None:
    hidden = model.model(values["ids"]).last_hidden_state
    assert_close(hidden @ model.lm_head.weight.T, values["logits"])
    stored = model.state_dict()["lm_head.weight"]
    assert not torch.allclose(stored.norm(dim=-1), torch.ones(stored.shape[0]))


@torch.no_grad()
def test_save_and_reload(model, values, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert_close(again(values["ids"]).logits, values["logits"])


def test_official_4bit_layout(golden: Path, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    folder = golden / "baichuan2-7b-tiny-4bits"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    expected = load_file(folder / "expected_dequantized.safetensors")
    for name, matrix in expected.items():
        weight = model.get_parameter(name)
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), matrix), name
    plain = AutoModelForCausalLM.from_pretrained(golden / "baichuan2-7b-tiny")
    with torch.no_grad():
        for name, matrix in expected.items():
            plain.get_parameter(name).copy_(matrix)
        ids = load_file(golden / "baichuan2-7b-tiny" / "inputs.safetensors")["ids"]
        assert_close(model(ids).logits.float(), plain(ids).logits, 0.02)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert torch.equal(again(ids).logits, model(ids).logits)
