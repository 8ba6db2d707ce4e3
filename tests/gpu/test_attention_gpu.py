"""Attention on a GPU: every implementation that is installed, packed documents apart, and what `auto` makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_model import padded, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune.baichuan import attend
from finetune.baichuan.attend import relative_error
from finetune.baichuan.attention_choice import (
    check_attention,
    choose_attention,
    self_test,
)
from finetune.errors import UserError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LONG, SHORT = list(range(1200, 1300)), list(range(1300, 1340))
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
GPU = torch.device("cuda")


@pytest.fixture(params=["rope", "alibi"])
def encoding(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    try:
        check_attention(request.param, GPU, torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error).splitlines()[0])
    return request.param


def ampere() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


def on_gpu(encoding: str, implementation: str, dtype: torch.dtype) -> Any:
    """Heads of 64: FlashAttention 3 has no kernels for fewer; 72 with the ALiBi features."""
    model = tiny_model(encoding, hidden_size=128, num_attention_heads=2).to("cuda", dtype)
    model.set_attn_implementation(implementation)
    return model


def test_the_self_test_passes(encoding: str, implementation: str) -> None:
    errors = dict(self_test(implementation, GPU, torch.bfloat16, encoding))
    assert max(errors.values()) < 0.06, errors


def test_packed_equals_unpacked(encoding: str, implementation: str) -> None:
    """Values and gradients, judged by the documents alone in float32."""
    exact = on_gpu(encoding, "eager", torch.float32)
    model = on_gpu(encoding, implementation, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    rows = [[LONG[:60], SHORT], [SHORT, LONG[:60]]]
    ids = torch.tensor([a + b for a, b in rows], device="cuda")
    positions = torch.tensor([[*range(len(a)), *range(len(b))] for a, b in rows], device="cuda")
    alone = [exact(torch.tensor([document], device="cuda")).logits[0] for row in rows for document in row]
    expected = torch.cat(alone)
    found = model(ids, position_ids=positions).logits.flatten(0, 1)
    assert relative_error(found, expected) < 0.06
    weights = torch.linspace(-1, 1, expected.numel(), device="cuda").view_as(expected)
    (expected * weights).sum().backward()
    (found.float() * weights).sum().backward()
    for (name, one), other in zip(model.named_parameters(), exact.parameters()):
        assert relative_error(one.grad, other.grad) < 0.1, name


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(encoding: str, implementation: str, side: str) -> None:
    ids, mask = (tensor.cuda() for tensor in padded([LONG, SHORT], side))
    model = on_gpu(encoding, implementation, torch.bfloat16)
    both = model(ids, attention_mask=mask).logits
    for row, tokens in enumerate((LONG, SHORT)):
        alone = model(torch.tensor([tokens], device="cuda")).logits[0]
        assert relative_error(both[row][mask[row] == 1], alone) < 0.06


@pytest.mark.parametrize("layout", ["packed", "padded", "whole"])
def test_sdpa_needs_no_other_kernel_than_flash(encoding: str, layout: str) -> None:
    """A mask would forbid it; so would a head that it does not know."""
    if not ampere():
        pytest.skip("FlashAttention needs compute capability 8.0")
    model = on_gpu(encoding, "sdpa", torch.bfloat16)
    ids, mask = (tensor.cuda() for tensor in padded([LONG, SHORT], "right"))
    steps = torch.arange(100, device="cuda")
    given: dict[str, dict[str, torch.Tensor]] = {
        "packed": {"position_ids": torch.stack([steps % 50, steps % 25])},
        "padded": {"attention_mask": mask},
        "whole": {},
    }
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(ids, labels=ids, **given[layout]).loss.backward()


@pytest.mark.parametrize("head_dim", [64, 72, 128, 136])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_varlen_works_from_ampere_on(dtype: torch.dtype, head_dim: int) -> None:
    """128 are the released models' heads, 136 with ALiBi folded in."""
    assert attend.varlen_works(GPU, dtype, head_dim) == ampere()


def test_documents_one_by_one_in_float32(encoding: str) -> None:
    model = on_gpu(encoding, "sdpa", torch.float32)
    ids = torch.tensor([LONG[:60] + SHORT], device="cuda")
    positions = torch.tensor([[*range(60), *range(40)]], device="cuda")
    with torch.no_grad():
        found = model(ids, position_ids=positions).logits[:, 60:]
        assert relative_error(found, model(ids[:, 60:]).logits) < 1e-2  # TF32, where torch uses it


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_what_auto_takes(encoding: str, cache: str) -> None:
    chosen = choose_attention("auto", GPU, torch.bfloat16, encoding)
    assert "fails" not in chosen.reason, chosen
    model = on_gpu(encoding, chosen.implementation, torch.bfloat16)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    ids, mask = (tensor.cuda() for tensor in padded([LONG, SHORT], "left"))
    tokens = model.generate(
        ids, attention_mask=mask, cache_implementation=cache, disable_compile=True, **options
    )
    assert tokens.shape == (2, 108)
    exact = on_gpu(encoding, "eager", torch.float32)
    exact.load_state_dict(model.state_dict())
    logits = exact(tokens, attention_mask=torch.nn.functional.pad(mask, (0, 8), value=1)).logits[:, -9:-1]
    taken = logits.gather(-1, tokens[:, -8:, None]).squeeze(-1)
    assert (logits.amax(-1) - taken).max() < 0.1 * logits.std()  # the best word, or one as good in 16 bits
