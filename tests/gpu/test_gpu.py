"""What only a GPU shows: fused kernels, bitsandbytes' kernels, bfloat16, and memory as predicted."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import padded, tiny_model
from tiny_run import finetune, losses, write_recipe
from transformers.utils import is_flash_attn_2_available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs the package flash-attn")

LONG, SHORT = list(range(1200, 1300)), list(range(1300, 1340))


@pytest.fixture(params=["rope", "alibi"])
def encoding(request: pytest.FixtureRequest) -> str:
    return request.param


def on_gpu(encoding: str, attention: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Head size 32: FlashAttention wants a multiple of 8, and 40 with the ALiBi features."""
    model = tiny_model(encoding, hidden_size=128, num_attention_heads=4).to("cuda", dtype)
    model.set_attn_implementation(attention)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).square().mean().sqrt() / expected.float().std())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_attention_kernels_agree_with_the_cpu(encoding: str, attention: str) -> None:
    ids, mask = padded([LONG, SHORT], "left")
    reference = tiny_model(encoding, hidden_size=128, num_attention_heads=4)
    expected = reference(ids, attention_mask=mask).logits[mask == 1]
    model = on_gpu(encoding, attention, torch.float32)
    logits = model(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()[mask == 1]
    assert relative_error(logits, expected) < 1e-2  # TF32, where torch uses it
    half = on_gpu(encoding, attention)
    logits = half(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()[mask == 1]
    assert relative_error(logits, expected) < 0.1


@needs_flash
@torch.no_grad()
def test_flash_attention_agrees_with_sdpa(encoding: str) -> None:
    """Padded, packed in a batch of two rows, and in generation."""
    flash, sdpa = (on_gpu(encoding, name) for name in ("flash_attention_2", "sdpa"))
    ids, mask = (tensor.cuda() for tensor in padded([LONG, SHORT], "left"))
    real = mask == 1
    expected = sdpa(ids, attention_mask=mask).logits[real]
    assert relative_error(flash(ids, attention_mask=mask).logits[real], expected) < 0.05

    packed = torch.tensor([LONG[:60] + SHORT, SHORT + LONG[:60]], device="cuda")
    positions = torch.tensor([[*range(60), *range(40)], [*range(40), *range(60)]], device="cuda")
    expected = sdpa(packed, position_ids=positions).logits
    logits = flash(packed, position_ids=positions).logits
    assert relative_error(logits, expected) < 0.05
    alone = sdpa(packed[:1, 60:]).logits
    assert relative_error(logits[:1, 60:], alone) < 0.05
    together = sdpa(packed).logits  # documents that see each other are another matter
    assert relative_error(together[:1, 60:], alone) > 0.2

    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    assert flash.generate(ids, **options).shape == sdpa.generate(ids, **options).shape


@torch.no_grad()
def test_alibi_in_bfloat16_keeps_far_positions() -> None:
    """Judged by float32 over the same weights; 2,048 tokens are far beyond what bfloat16 can count."""
    ids = torch.randint(1100, 1800, (1, 2048), generator=torch.Generator().manual_seed(0))
    exact = on_gpu("alibi", "eager", torch.float32)
    half = on_gpu("alibi", "sdpa")
    exact.load_state_dict(half.state_dict())
    assert relative_error(half(ids.cuda()).logits, exact(ids.cuda()).logits) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_generation_in_bfloat16(encoding: str, cache: str) -> None:
    """The static cache is compiled by ``generate`` on a GPU."""
    model = on_gpu(encoding, "sdpa", torch.float32)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    alone = model.generate(torch.tensor([SHORT], device="cuda"), **options)
    ids, mask = (tensor.cuda() for tensor in padded([LONG, SHORT], "left"))
    both = model.generate(ids, attention_mask=mask, cache_implementation=cache, **options)
    assert both[1, -8:].tolist() == alone[0, -8:].tolist()
    half = on_gpu(encoding, "sdpa").generate(ids, attention_mask=mask, cache_implementation=cache, **options)
    assert half.shape == both.shape


RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"model": {"quantization": "nf4"}},
    "qlora_checkpointing": {
        "model": {"quantization": "nf4"},
        "train": {"gradient_checkpointing": True},
    },
    "matmul_kept": {"train": {"gradient_checkpointing": "matmul", "kernels": "auto"}},
    "qlora_matmul_kept": {
        "model": {"quantization": "nf4"},
        "train": {"gradient_checkpointing": "matmul", "kernels": "auto"},
    },
    "packed_attention_kept": {  # named, so that no one has tried torch's kernel before the first layer does
        "model": {"attention": "sdpa"},
        "data": {"packing": True},
        "train": {"gradient_checkpointing": "attention"},
    },
    "offloaded": {"train": {"gradient_checkpointing": True, "activation_offloading": True}},
    "int8_embeddings": {"model": {"quantization": "nf4", "embeddings": "int8"}},
    "compiled": {"train": {"compile": True, "gradient_checkpointing": "matmul"}, "data": {"packing": True}},
    "int8": {"model": {"quantization": "int8"}},
    "float16": {"model": {"dtype": "float16"}},
    "loftq": {"adapter": {"init": "loftq"}},
    "paged_8bit": {"train": {"optimizer": "paged_adamw_8bit"}},
    "ptuning": {"adapter": {"method": "ptuning"}},
    "prefix": {"adapter": {"method": "prefix"}},
    "flash": {"model": {"attention": "flash_attention_2"}, "data": {"packing": True}},
}


@pytest.mark.parametrize("kind", RUNS)
def test_runs_learn(tiny_bases: dict[str, Path], tmp_path: Path, encoding: str, kind: str) -> None:
    if kind == "flash" and not is_flash_attn_2_available():
        pytest.skip("needs the package flash-attn")
    sections = RUNS[kind]
    rate = 0.1 if kind == "prefix" else 2e-2
    train = {
        "max_steps": 16,
        "learning_rate": rate,
        "gradient_checkpointing": False,
        **sections.get("train", {}),
    }
    finetune("run", write_recipe(tmp_path, tiny_bases[encoding], **{**sections, "train": train}))
    course = losses(tmp_path / "run")
    assert min(course[-3:]) < 0.93 * course[0], course
    talk = ("--prompt", "问题1：怎么办？", "--greedy", "--max-new-tokens", 8)
    adapter = tmp_path / "run" / "adapter"
    assert finetune("chat", "--model", tiny_bases[encoding], "--adapter", adapter, *talk)


@pytest.mark.parametrize("kind", ["lora", "qlora", "packed", "matmul_kept", "offloaded"])
def test_steps_do_not_wait_for_the_device(
    tiny_bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
    kind: str,
) -> None:
    """Between the first logged step and the last; whatever waits raises."""
    from finetune.train.adapter_training import AdapterTraining

    sections: dict[str, Any] = {
        "qlora": {"model": {"quantization": "nf4"}},
        "packed": {"data": {"packing": True}},
        "matmul_kept": {"train": {"gradient_checkpointing": "matmul"}},
        "offloaded": {"train": {"activation_offloading": True}},
    }.get(kind, {})
    train = {"max_steps": 8, "log_every": 8, **sections.get("train", {})}
    original = AdapterTraining._maybe_log_save_evaluate

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        original(self, *args, **kwargs)
        if 2 <= self.state.global_step < 7:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(AdapterTraining, "_maybe_log_save_evaluate", watched)
    try:
        finetune("run", write_recipe(tmp_path, tiny_bases[encoding], **{**sections, "train": train}))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses(tmp_path / "run")) == 2  # the first step, and the last


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs the package liger-kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_kernels_agree_with_ours(encoding: str, dtype: torch.dtype) -> None:
    from finetune.baichuan.kernels import use_liger

    ids = torch.randint(1100, 1800, (2, 200), generator=torch.Generator().manual_seed(0)).cuda()

    def run(with_liger: bool, kind: torch.dtype) -> list[torch.Tensor]:
        model = on_gpu(encoding, "sdpa", dtype).to(kind).train()
        if with_liger:
            use_liger(model)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        first = model.model.layers[0]
        return [loss.detach(), first.self_attn.W_pack.weight.grad, first.mlp.gate_proj.weight.grad]

    exact, ours, liger = run(False, torch.float32), run(False, dtype), run(True, dtype)
    for right, here, there in zip(exact, ours, liger):
        error = (there.float() - right).norm() / right.norm()
        assert error < max(1.5 * (here.float() - right).norm() / right.norm(), 1e-3)


def test_offloaded_inputs_give_the_same_gradients_and_leave_the_device(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.baichuan.checkpointing import Checkpointing, HostMemory

    monkeypatch.setattr(HostMemory, "SMALLEST", 1)
    ids = torch.randint(1100, 1800, (1, 4096), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for offload in (False, True):
        model = tiny_model(encoding, hidden_size=512, num_attention_heads=4, num_hidden_layers=24)
        model = model.to("cuda", torch.bfloat16).train().requires_grad_(False)
        model.freeze_head()
        model.checkpointing = Checkpointing(offload=offload)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        first = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
        for _ in range(2):  # the second step uses what the first has left
            first.grad = None
            torch.cuda.reset_peak_memory_stats()
            loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
            after_forward = torch.cuda.memory_allocated()
            loss.backward()
        found.append((first.grad, after_forward))
        del model, first, loss
    assert torch.equal(found[0][0], found[1][0])
    one = 4096 * 512 * 2
    assert found[0][1] - found[1][1] > 20 * one  # of 24 inputs two or three stay


def test_predicted_memory_is_near_the_measured(tmp_path: Path) -> None:
    """On a model large enough that its parts matter: 150 million parameters, long rows."""
    from tiny_model import write_rows, write_tiny_base

    base = write_tiny_base(
        tmp_path / "base",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=8,
        model_max_length=4096,
    )
    rows = [{"question": f"问题{i}", "answer": "控制饮食，定期检查血糖。" * 400} for i in range(16)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    for checkpointing in (True, False):
        folder = tmp_path / str(checkpointing)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        recipe = write_recipe(
            folder,
            base,
            data={"train": str(data), "max_length": 1024},
            train={"batch_size": 8, "max_steps": 2, "gradient_checkpointing": checkpointing},
        )
        finetune("run", recipe)
        result = json.loads((folder / "run" / "result.json").read_text())
        # torch counts its own tensors; the prediction includes 0.6 GiB that CUDA itself takes.
        predicted = result["predicted_peak_memory_bytes"] - 0.6 * 2**30
        assert 0.6 < predicted / result["measured_peak_memory_bytes"] < 1.7


def test_out_of_memory_says_what_to_lower(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.train.trainer import AdapterTrainer

    def exhausted(*args: Any, **kwargs: Any) -> Any:
        return torch.empty(2**50, device="cuda")

    monkeypatch.setattr(AdapterTrainer, "training_step", exhausted)
    recipe = write_recipe(tmp_path, tiny_bases["rope"], data={"max_length": 2048})
    output = finetune("run", recipe, expect=2)
    assert "is out of memory" in output
    assert "train.batch_size=1" in output
    assert not (tmp_path / "run").exists()
