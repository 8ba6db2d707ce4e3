"""Packed and padded batches attend as their documents would alone, under every implementation there is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_model import LAYERS, padded, tiny_model
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from finetune.baichuan import attend
from finetune.baichuan.attention import alibi_slopes
from finetune.baichuan.documents import Documents, find_documents

LONG, SHORT = list(range(1200, 1212)), list(range(1300, 1305))
ROWS = [[LONG[:7], SHORT], [SHORT, LONG[5:]]]
"""Documents of two rows of 12 tokens."""


@pytest.fixture(params=["rope", "alibi"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def one_after_another(query: Any, key: Any, value: Any, bounds: Any, scale: float, slopes: Any = None) -> Any:
    """What FlashAttention's variable-length call computes: (tokens, heads, head_dim), documents apart."""
    parts = []
    for start, end in pairwise(bounds.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        scores = (q.float() @ k.float().mT) * scale
        if slopes is not None:
            scores = scores + slopes[:, None, None] * torch.arange(end - start)
        hidden = torch.ones(end - start, end - start).triu(1).bool()
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        parts.append((weights @ v.float()).to(query.dtype).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def calls() -> list[list[int]]:
    """Bounds of the documents of each call of `flash_reference`."""
    return []


@pytest.fixture
def flash_reference(calls: list[list[int]]) -> str:
    """An implementation that transformers takes for FlashAttention, which itself needs a GPU."""

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        assert mask is None
        bounds = kwargs["cu_seq_lens_q"]
        assert bounds.dtype == torch.int32
        assert torch.equal(bounds, kwargs["cu_seq_lens_k"])
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(bounds.diff().max())
        calls.append(bounds.tolist())
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        output = one_after_another(*flat, bounds, kwargs["scaling"])
        return output.view(*query.transpose(1, 2).shape), None

    AttentionInterface.register("flash_reference", forward)
    AttentionMaskInterface.register("flash_reference", flash_attention_mask)
    return "flash_reference"


@pytest.fixture(params=["eager", "sdpa", "flash"])
def implementation(request: pytest.FixtureRequest, model: Any, flash_reference: str) -> str:
    name = flash_reference if request.param == "flash" else request.param
    model.config._attn_implementation = name
    return name


def packed(marks: str) -> dict[str, torch.Tensor]:
    """The rows, their documents marked in one of the two ways."""
    ids = torch.tensor([first + second for first, second in ROWS])
    if marks == "positions":
        positions = [[*range(len(a)), *range(len(b))] for a, b in ROWS]
        return {"input_ids": ids, "position_ids": torch.tensor(positions)}
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * len(a) + [2] * len(b) for a, b in ROWS])}


def gradients(
    model: Any, batches: list[dict[str, torch.Tensor]], keep: Any = None
) -> dict[str, torch.Tensor]:
    """Of a fixed function of the logits at all real positions."""
    model.zero_grad()
    logits = [model(**batch).logits.flatten(0, 1) for batch in batches]
    flat = torch.cat(logits)
    flat = flat if keep is None else flat[keep]
    (flat * torch.linspace(-1, 1, flat.numel()).view_as(flat)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in found.items():
        close(gradient, expected[name], 2e-5 * max(1.0, float(expected[name].abs().max())))


@pytest.mark.parametrize("marks", ["positions", "numbers"])
def test_packed_equals_unpacked(model: Any, implementation: str, marks: str, calls: list[list[int]]) -> None:
    alone = [{"input_ids": torch.tensor([document])} for row in ROWS for document in row]
    with torch.no_grad():
        expected = torch.cat([model(**each).logits[0] for each in alone])
        calls.clear()
        close(model(**packed(marks)).logits.flatten(0, 1), expected)
        if implementation == "flash_reference":
            assert calls == [[0, 7, 12, 17, 24]] * LAYERS
        together = model(packed(marks)["input_ids"]).logits.flatten(0, 1)
        assert (together - expected).abs().max() > 0.1  # not the same by chance
    assert_same_gradients(gradients(model, [packed(marks)]), gradients(model, alone))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(model: Any, implementation: str, side: str) -> None:
    ids, mask = padded([LONG, SHORT], side)
    batch = {"input_ids": ids, "attention_mask": mask}
    alone = [{"input_ids": torch.tensor([row])} for row in (LONG, SHORT)]
    real = mask.flatten() == 1
    with torch.no_grad():
        expected = torch.cat([model(**each).logits[0] for each in alone])
        close(model(**batch).logits.flatten(0, 1)[real], expected)
    assert_same_gradients(gradients(model, [batch], real), gradients(model, alone))


def test_packed_rows_under_gradient_checkpointing(model: Any) -> None:
    expected = gradients(model, [packed("positions")])
    model.train()
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, [packed("positions")]), expected)


@torch.no_grad()
def test_sdpa_gets_no_mask_where_it_can_do_without(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask costs a fused kernel more than the attention itself."""
    masks = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return kernel(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    ids, mask = padded([LONG, SHORT], "right")
    model(ids, attention_mask=mask)
    model(ids, attention_mask=mask.flip(-1))
    model(ids)
    model(**packed("positions"))
    model(**packed("numbers"))
    assert masks
    assert all(each is None for each in masks)


def documents_of(positions: list[list[int]], mask: Any = None) -> list[int] | None:
    found = find_documents(torch.tensor(positions), None if mask is None else torch.tensor(mask))
    if found is None:
        return None
    assert found.bounds.dtype == torch.int32
    assert found.bounds.diff().tolist() == found.lengths
    return found.lengths


def test_documents_are_found() -> None:
    count = [0, 1, 2, 3]
    assert documents_of([[0, 1, 0, 1], count]) == [2, 2, 4]
    assert documents_of([[7, 8, 9, 10], [0, 0, 0, 1]]) == [4, 1, 1, 2]
    assert documents_of([count, count], [[1, 1, 1, 1], [1, 1, 0, 0]]) == [4, 2, 2]
    assert documents_of([count, count], [[0, 1, 1, 1], [0, 0, 0, 0]]) == [1, 3, 4]
    assert documents_of([count], [[True, True, False, False]]) == [2, 2]
    assert documents_of([[0, 1, 2, 0]], [[1, 1, 1, 1]]) == [4]  # a mask says who belongs together
    assert documents_of([[*range(6)]], [[1, 1, 2, 0, 3, 3]]) == [2, 1, 1, 2]


def test_documents_that_are_known_are_not_looked_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config._attn_implementation = "sdpa"
    batch = packed("positions")
    expected = model(**batch).logits

    def look(*args: Any) -> None:
        raise AssertionError("looked for documents")

    monkeypatch.setattr("finetune.baichuan.modeling.find_documents", look)
    known = Documents.of([len(document) for row in ROWS for document in row]).to("cpu", non_blocking=True)
    assert torch.equal(model(**batch, documents=known).logits, expected)


def test_documents_in_pieces_need_a_mask() -> None:
    assert documents_of([[0, 1, 2, 3]], [[1, 0, 0, 1]]) is None
    assert documents_of([[0, 1, 2, 3]], [[1, 2, 2, 1]]) is None
    assert documents_of([[0, 1, 2, 3]], [[2, 2, 1, 1]]) is None  # numbered backwards: a mask is right as well
    assert documents_of([[0, 1, 2, 3]], [[1.0, 1.0, 0.0, 0.0]]) is None
    assert documents_of([[0, 1]], [[1, 1, 1, 1]]) is None  # keys of a cache


# --- what runs on GPUs only, its kernels played on the CPU ---------------------------------------------------


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package flash-attn, its two functions in plain tensor operations."""

    def varlen(q: Any, k: Any, v: Any, **kwargs: Any) -> torch.Tensor:
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert kwargs["causal"]
        assert kwargs["alibi_slopes"].dtype == torch.float32
        bounds = kwargs["cu_seqlens_q"]
        assert torch.equal(bounds, kwargs["cu_seqlens_k"])
        assert kwargs["max_seqlen_q"] == kwargs["max_seqlen_k"] == int(bounds.diff().max())
        return one_after_another(q, k, v, bounds, kwargs["softmax_scale"], kwargs["alibi_slopes"])

    def dense(q: Any, k: Any, v: Any, *, softmax_scale: float, causal: bool, alibi_slopes: Any) -> Any:
        """The causal diagonal ends at the last query and the last key, as since FlashAttention 2.1."""
        queries, keys = q.shape[1], k.shape[1]
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * softmax_scale
        scores = scores + alibi_slopes[:, None, None] * torch.arange(keys)
        scores = scores.masked_fill(torch.ones(queries, keys).triu(1 + keys - queries).bool(), float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func, module.flash_attn_func = varlen, dense  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def test_flash_attention_2_computes_alibi_itself(flash_attn: ModuleType) -> None:
    """Packed, padded, and with a cache: as the float32 model, up to bfloat16."""
    model = tiny_model("alibi").bfloat16()
    exact = tiny_model("alibi")
    exact.load_state_dict(model.state_dict())
    model.config._attn_implementation = "flash_attention_2"
    ids, mask = padded([LONG, SHORT], "left")
    with torch.no_grad():
        for batch in (
            packed("positions"),
            packed("numbers"),
            {"input_ids": ids, "attention_mask": mask},
            {"input_ids": torch.tensor([LONG])},
        ):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
            found, expected = (each(**batch).logits[real] for each in (model, exact))
            assert attend.relative_error(found, expected) < 0.03
        cache = model(torch.tensor([LONG[:8]]), use_cache=True).past_key_values
        found = model(torch.tensor([LONG[8:]]), past_key_values=cache).logits
        assert attend.relative_error(found, exact(torch.tensor([LONG])).logits[:, 8:]) < 0.03


@pytest.fixture
def varlen_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """torch's variable-length attention in plain tensor operations; the list counts its calls."""
    import torch.nn.attention.varlen as module

    count: list[int] = []

    def played(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **kwargs: Any) -> Any:
        assert kwargs["window_size"] == (-1, 0)
        assert max_q == max_k == int(cu_q.diff().max())
        count.append(len(q))
        return one_after_another(q, k, v, cu_q, kwargs["scale"])

    monkeypatch.setattr(module, "varlen_attn", played)
    attend.varlen_works.cache_clear()
    yield count
    attend.varlen_works.cache_clear()


CPU = torch.device("cpu")


def test_torch_varlen_is_taken_where_it_is_right(varlen_attn: list[int]) -> None:
    assert attend.varlen_works(CPU, torch.bfloat16, 40)
    documents = Documents(torch.tensor([0, 5, 8], dtype=torch.int32), [5, 3])
    query, key, value = torch.randn(3, 8, 2, 16).unbind(0)
    found = attend.varlen(query, key, value, documents, 0.25)
    close(found, attend.each_document(query, key, value, [5, 3], 0.25))
    assert varlen_attn == [200, 8]


def test_torch_varlen_is_not_taken_where_it_fails(
    varlen_attn: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def confused(q: Any, k: Any, v: Any, documents: Documents, scaling: float) -> torch.Tensor:
        return attend.each_document(q, k, v, [len(q)], scaling)

    monkeypatch.setattr(attend, "varlen", confused)
    assert not attend.varlen_works(CPU, torch.bfloat16, 32)
    assert "variable-length attention fails" in caplog.text
    attend.varlen_works.cache_clear()

    def missing(*_: Any) -> torch.Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(attend, "varlen", missing)
    assert not attend.varlen_works(CPU, torch.bfloat16, 32)
    assert "only supports Ampere" in caplog.text


def test_played_alibi_is_that_of_the_paper() -> None:
    """The tests above lean on it."""
    query, key, value = torch.randn(3, 9, 4, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    slopes = alibi_slopes(4)
    positions = torch.arange(9)
    bias = slopes[:, None, None] * (positions[None] - positions[:, None])
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.25 + bias
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    close(one_after_another(query, key, value, torch.tensor([0, 9]), 0.25, slopes), expected)
