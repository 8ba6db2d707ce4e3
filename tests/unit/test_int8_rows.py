"""Embeddings and head in 8 bits: as good as the float matrices that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import VOCAB_SIZE, tiny_model
from tiny_run import finetune, losses, write_recipe

from finetune.baichuan import int8_rows
from finetune.baichuan.int8_rows import Int8Embedding, Int8Head, quantise_embeddings, quantise_rows
from finetune.baichuan.load import Base, load_model
from finetune.baichuan.loss import tiled_causal_lm_loss
from finetune.recipe.schema import Model

IDS = torch.arange(1200, 1224).view(2, 12)


@pytest.fixture(autouse=True)
def several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny vocabulary takes several steps, the last of them short."""
    monkeypatch.setattr(int8_rows, "STEP", 500)


def dequantised(holder: Any) -> torch.Tensor:
    return holder.weight.float() * holder.scales[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = (torch.randn(1300, 40) * torch.logspace(-6, 3, 1300)[:, None]).to(dtype)
    matrix[7] = 0
    integers, scales = quantise_rows(matrix)
    assert integers.dtype == torch.int8
    error = (integers.float() * scales[:, None] - matrix.float()).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    assert not error[7].any()
    torch.testing.assert_close(scales * 127, matrix.float().abs().amax(1))


def test_looking_up_gives_the_rows() -> None:
    embedding = Int8Embedding(torch.randn(VOCAB_SIZE, 16).bfloat16())
    found = embedding(IDS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, dequantised(embedding)[IDS].bfloat16())


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.05])
def test_loss_and_gradient_are_those_of_the_float_head(z_loss_weight: float) -> None:
    torch.manual_seed(0)
    head = Int8Head(torch.randn(1300, 16))
    labels = torch.randint(0, 1300, (3, 30))
    labels[0, :20] = -100
    found = []
    for weight, scales in ((dequantised(head), None), (head.weight, head.scales)):
        torch.manual_seed(1)
        hidden = torch.randn(3, 30, 16, requires_grad=True)
        loss = tiled_causal_lm_loss(hidden, weight, labels, head_scales=scales, z_loss_weight=z_loss_weight)
        (2 * loss).backward()
        found.append([loss.detach(), hidden.grad])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


def test_bfloat16_is_as_good_as_a_bfloat16_head() -> None:
    """Both judged by float32 over the numbers that the int8 head stands for."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(2, 20, 64).bfloat16(), torch.randint(0, 900, (2, 20))
    head = Int8Head(torch.randn(900, 64).bfloat16())

    def gradient(
        dtype: torch.dtype, weight: torch.Tensor, scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        tiled_causal_lm_loss(leaf, weight, labels, head_scales=scales).backward()
        return leaf.grad.float()

    exact = gradient(torch.float32, dequantised(head))
    rounded = gradient(torch.bfloat16, dequantised(head).bfloat16())
    found = gradient(torch.bfloat16, head.weight, head.scales)
    assert (found - exact).norm() < 1.1 * (rounded - exact).norm()


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_model_is_that_of_the_dequantised_matrices(encoding: str) -> None:
    model, expected = tiny_model(encoding), tiny_model(encoding)
    quantise_embeddings(model)
    expected.freeze_head()
    with torch.no_grad():
        expected.model.embed_tokens.weight.copy_(dequantised(model.model.embed_tokens))
        expected.lm_head.stored_weight.copy_(dequantised(model.lm_head))
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-5)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    assert model.dtype == torch.float32
    for skip_logits in (False, True):
        torch.testing.assert_close(
            model(IDS, labels=IDS, skip_logits=skip_logits).loss, expected(IDS, labels=IDS).loss
        )


def test_vectors_that_begin_as_tokens_begin_as_those_of_the_vocabulary() -> None:
    from finetune.adapters.build import attach_adapter
    from finetune.recipe.schema import Adapter

    model = tiny_model("rope")
    quantise_embeddings(model)
    settings = Adapter(method="ptuning", encoder="none", num_virtual_tokens=4)
    peft_model = attach_adapter(model, settings, Base("tiny", Path(), "tiny"))
    (vectors,) = (p for p in peft_model.parameters() if p.requires_grad)
    rows = dequantised(model.model.embed_tokens)
    assert all((rows == vector).all(-1).any() for vector in vectors)


def test_a_base_is_loaded_so(tiny_base: Path) -> None:
    base = Base("tiny", tiny_base, "tiny")
    model: Any = load_model(Model(base="tiny", quantization="nf4", embeddings="int8"), base)
    full: Any = load_model(Model(base="tiny", quantization="nf4"), base)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.int8
    assert model.get_memory_footprint() < full.get_memory_footprint() - 5 * VOCAB_SIZE * 64  # of 8 in float32
    assert not any(p.requires_grad for p in model.parameters())
    unit = dequantised(model.lm_head).norm(dim=-1)
    torch.testing.assert_close(unit, torch.ones_like(unit), atol=2e-2, rtol=0)


@pytest.mark.parametrize("method", ["lora", "ptuning", "prefix"])
def test_runs_learn_and_their_adapters_fit_the_whole_base(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    rate = {"lora": 2e-2, "ptuning": 2e-2, "prefix": 0.1}[method]
    recipe = write_recipe(
        tmp_path,
        tiny_base,
        model={"base": str(tiny_base), "quantization": "nf4", "embeddings": "int8"},
        adapter={"method": method},
        train={"max_steps": 16, "learning_rate": rate},
    )
    finetune("run", recipe)
    course = losses(tmp_path / "run")
    assert min(course[-3:]) < 0.93 * course[0], course
    talk = ("--prompt", "问题1：怎么办？", "--greedy", "--max-new-tokens", 4)
    assert finetune("chat", "--model", tiny_base, "--adapter", tmp_path / "run" / "adapter", *talk)
    if method == "lora":
        finetune("merge", "--adapter", tmp_path / "run" / "adapter", "--output", tmp_path / "merged")
        merged: Any = load_model(Model(base="merged"), Base("merged", tmp_path / "merged", "merged"))
        assert merged.lm_head.weight.dtype == torch.float32
