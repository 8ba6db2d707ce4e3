"""Position encodings: published values, closed forms, and what bfloat16 does to them."""

from __future__ import annotations

import math

import pytest
import torch

from finetune.baichuan.attention import (
    ALIBI_DIMS,
    alibi_key_features,
    alibi_query_features,
    alibi_slopes,
    eager_attention,
    fold_alibi,
    rotate,
)

HEAD_DIM = 32
SCALING = HEAD_DIM**-0.5


def attention_inputs(
    length: int, heads: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, heads, length, HEAD_DIM)
    query, key, value = torch.randn(shape, generator=generator).to(dtype).unbind(0)
    return query, key, value


def causal_mask(length: int) -> torch.Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


def explicit_alibi(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention with the bias matrix of the paper, slope x (key position - query position), in float32."""
    length = query.shape[2]
    positions = torch.arange(length)
    bias = alibi_slopes(query.shape[1])[:, None, None] * (positions[None] - positions[:, None])
    scores = query.float() @ key.float().mT * SCALING + bias + causal_mask(length)
    return scores.softmax(-1) @ value.float()


def folded_alibi(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    folded = fold_alibi(query, key, value, alibi_slopes(query.shape[1]), SCALING)
    output = torch.nn.functional.scaled_dot_product_attention(*folded, is_causal=True, scale=SCALING)
    return output[..., :HEAD_DIM]


# --- slopes ---------------------------------------------------------------------------------------------


def test_slopes_of_a_power_of_two_are_the_published_ones() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]  # 1/2 … 1/256


@pytest.mark.parametrize(("heads", "lower"), [(40, 32), (12, 8), (6, 4), (3, 2)])
def test_slopes_of_other_numbers_interleave_those_of_the_next_power(heads: int, lower: int) -> None:
    """The rule of the paper: those of the lower power, then every other one of the next."""
    first = [2 ** (-8 * n / lower) for n in range(1, lower + 1)]
    between = [2 ** (-8 * n / (2 * lower)) for n in range(1, 2 * lower + 1, 2)][: heads - lower]
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(first + between), rtol=1e-6, atol=0)


def test_slopes_of_the_13b_model_are_distinct_and_float32() -> None:
    slopes = alibi_slopes(40)
    assert slopes.dtype == torch.float32
    assert slopes.shape == (40,)
    assert slopes.unique().numel() == 40


# --- ALiBi folded into the head dimension ------------------------------------------------------------------


@pytest.mark.parametrize(("length", "tolerance"), [(64, 1e-5), (512, 1e-4)])
def test_folded_alibi_equals_the_explicit_bias(length: int, tolerance: float) -> None:
    """Up to float32's spacing: without the row's constant, scores grow to slope x length (430 at 512)."""
    query, key, value = attention_inputs(length)
    torch.testing.assert_close(
        folded_alibi(query, key, value), explicit_alibi(query, key, value), atol=tolerance, rtol=0
    )


def test_folded_alibi_in_bfloat16_keeps_positions_that_a_bfloat16_bias_loses() -> None:
    """Judged by float32 attention over the very same bfloat16 queries, keys and values."""
    length = 1024
    query, key, value = attention_inputs(length, heads=8, dtype=torch.bfloat16)
    exact = explicit_alibi(query, key, value)

    folded = fold_alibi(query, key, value, alibi_slopes(8), SCALING)
    features_exact = folded_attention(folded, length)
    assert (features_exact - exact).abs().max() < 1e-3  # the bfloat16 features lose nothing
    kernel = folded_alibi(query, key, value).float()
    assert (kernel - exact).abs().max() < 0.02

    bias = (alibi_slopes(8)[:, None, None] * torch.arange(length)).bfloat16()  # as the official code has it
    naive_scores = query.float() @ key.float().mT * SCALING + bias + causal_mask(length)
    naive = naive_scores.softmax(-1) @ value.float()
    assert (naive - exact).abs().max() > 0.5


def folded_attention(folded: tuple[torch.Tensor, ...], length: int) -> torch.Tensor:
    """Attention over folded inputs with float32 arithmetic."""
    query, key, value = (part.float() for part in folded)
    module = torch.nn.Module().eval()
    output, _ = eager_attention(module, query, key, value, causal_mask(length), SCALING)
    return output.transpose(1, 2)[..., :HEAD_DIM]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_are_exact(dtype: torch.dtype) -> None:
    features = alibi_key_features(torch.arange(65_536)[None], dtype)[0]
    assert features.shape == (65_536, ALIBI_DIMS)
    high, low = features[:, 0].double(), features[:, 3].double()
    assert torch.equal(high + low, torch.arange(65_536, dtype=torch.float64))
    assert torch.equal(features[:, 0:3], features[:, 0:1].expand(-1, 3))
    assert torch.equal(features[:, 3:6], features[:, 3:4].expand(-1, 3))


def test_slope_parts_add_up_far_beyond_bfloat16() -> None:
    slopes = alibi_slopes(40)
    parts = alibi_query_features(slopes, SCALING, torch.bfloat16)[:, :3].double()
    exact = slopes.double() / SCALING
    assert ((parts[:, 0] - exact).abs() / exact).max() > 1e-4  # what one part would leave
    assert ((parts.sum(-1) - exact).abs() / exact).max() < 1e-7


# --- rotary -------------------------------------------------------------------------------------------------


def rotary_tables(positions: torch.Tensor, base: float = 10_000.0) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = base ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.cat([positions[..., None] * frequencies] * 2, dim=-1)
    return angles.cos(), angles.sin()


def test_rotation_is_multiplication_by_complex_numbers() -> None:
    query, key, _ = attention_inputs(64, heads=2)
    positions = torch.arange(64)[None].float()
    rotated = rotate(query, key, *rotary_tables(positions))

    half = HEAD_DIM // 2
    frequencies = 10_000.0 ** (-torch.arange(half) * 2 / HEAD_DIM)
    turn = torch.polar(torch.ones(64, half), positions[0, :, None] * frequencies)
    for given, result in zip((query, key), rotated):
        turned = torch.complex(given[..., :half], given[..., half:]) * turn
        expected = torch.cat([turned.real, turned.imag], dim=-1)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    query, key, _ = attention_inputs(16, heads=2)

    def scores(shift: float) -> torch.Tensor:
        q, k = rotate(query, key, *rotary_tables(torch.arange(16)[None] + shift))
        return q @ k.mT

    torch.testing.assert_close(scores(0), scores(1000), atol=2e-3, rtol=0)
    assert not torch.allclose(scores(0), query @ key.mT, atol=0.1)


def test_rotation_of_bfloat16_is_computed_in_float32() -> None:
    query, key, _ = attention_inputs(256, heads=2, dtype=torch.bfloat16)
    tables = rotary_tables(torch.arange(256)[None] + 3000)
    rotated, _ = rotate(query, key, *tables)
    exact, _ = rotate(query.float(), key.float(), *tables)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, exact.bfloat16())


def test_eager_attention_rows_sum_to_one_and_match_the_fused_kernel() -> None:
    query, key, value = attention_inputs(32, heads=2)
    output, weights = eager_attention(
        torch.nn.Module().eval(), query, key, value, causal_mask(32), 1 / math.sqrt(HEAD_DIM)
    )
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 32))
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(output.transpose(1, 2), fused, atol=1e-5, rtol=0)


def test_eager_scores_are_float32_under_autocast() -> None:
    """In which training in 16 bits runs."""
    inputs = attention_inputs(256, heads=2, dtype=torch.bfloat16)
    given = (torch.nn.Module().eval(), *inputs, causal_mask(256), 1 / math.sqrt(HEAD_DIM))
    expected, _ = eager_attention(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = eager_attention(*given)
    assert torch.equal(found, expected)
