"""Several adapters in one merge: peft's own results, exact sums, reproducible choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from test_adapters import IDS, adapted, base_model, logits
from test_merge import refusal, weights, write_adapter

from finetune.adapters import load_adapter, merge_adapter, save_adapter
from finetune.adapters.combine import COMBINATIONS, parse_weights
from finetune.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

FACTORS = (0.7, -0.4)


def write_two(base: Path, root: Path, kinds: tuple[str, str] = ("default", "rslora")) -> list[Path]:
    """Two adapters that were trained apart."""
    folders = []
    for seed, kind in enumerate(kinds):
        model = adapted(base, kind)
        torch.manual_seed(10 + seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        folder = root / f"adapter-{seed}"
        save_adapter(model, folder)
        folders.append(folder)
    return folders


def peft_with_both(base: Path, folders: list[Path]) -> Any:
    model = load_adapter(base_model(base)[0], folders[0]).eval()
    model.load_adapter(str(folders[1]), adapter_name="second")
    return model


def merged_logits(folder: Path) -> torch.Tensor:
    return logits(base_model(folder)[0], IDS)


def test_linear_is_pefts_exact_sum(tiny_base: Path, tmp_path: Path) -> None:
    """peft's ``cat``, whose result is the weighted sum of what the adapters add."""
    folders = write_two(tiny_base, tmp_path)
    model = peft_with_both(tiny_base, folders)
    model.add_weighted_adapter(["default", "second"], list(FACTORS), "both", combination_type="cat")
    model.set_adapter("both")
    model.eval()  # the new layers drop out otherwise
    folder = merge_adapter(folders, tmp_path / "merged", weights=FACTORS)
    torch.testing.assert_close(merged_logits(folder), logits(model), atol=1e-5, rtol=0)


def test_ties_is_pefts_at_full_rank(tiny_base: Path, tmp_path: Path) -> None:
    """peft works on the same differences and then cuts them back to a rank, here one that loses nothing."""
    folders = write_two(tiny_base, tmp_path)
    model = peft_with_both(tiny_base, folders)
    model.add_weighted_adapter(
        ["default", "second"], list(FACTORS), "both", combination_type="ties_svd", svd_rank=64, density=0.4
    )
    model.set_adapter("both")
    model.eval()  # the new layers drop out otherwise
    folder = merge_adapter(folders, tmp_path / "merged", weights=FACTORS, combine="ties", density=0.4)
    torch.testing.assert_close(merged_logits(folder), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_function_on_whole_differences(
    tiny_bases: dict[str, Path], tmp_path: Path, method: str
) -> None:
    from zlib import crc32

    base = tiny_bases["rope"]
    folders = write_two(base, tmp_path)
    model = peft_with_both(base, folders)
    options: dict[str, Any] = {"weights": FACTORS, "combine": method, "density": 0.3, "seed": 5}
    merged = weights(merge_adapter(folders, tmp_path / "merged", **options))
    before = weights(base)
    for name in before:
        if "W_pack" not in name:
            continue
        layer = model.get_submodule("base_model.model." + name.removesuffix(".weight"))
        differences = [layer.get_delta_weight(adapter) for adapter in ("default", "second")]
        torch.manual_seed(5 ^ crc32(name.encode()))
        change = getattr(merge_utils, method)(differences, torch.tensor(FACTORS), density=0.3)
        torch.testing.assert_close(merged[name], before[name] + change, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_choices_are_the_seeds(tiny_bases: dict[str, Path], tmp_path: Path, method: str) -> None:
    """Whatever the shards and whatever happened to torch's generator before."""
    folders = write_two(tiny_bases["rope"], tmp_path)
    options: dict[str, Any] = {"weights": (1, 1), "combine": method, "verify": False}
    first = weights(merge_adapter(folders, tmp_path / "first", seed=1, **options))
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = weights(merge_adapter(folders, tmp_path / "again", seed=1, max_shard_size="50KB", **options))
    assert torch.equal(torch.random.get_rng_state(), state)
    other = weights(merge_adapter(folders, tmp_path / "other", seed=2, **options))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_dora_is_combined_by_what_it_changes(tiny_base: Path, tmp_path: Path) -> None:
    """Its change depends on the base, so that its factors cannot be added up."""
    folders = write_two(tiny_base, tmp_path, ("dora", "default"))
    parts = [
        weights(merge_adapter(folder, tmp_path / f"m{i}", verify=False)) for i, folder in enumerate(folders)
    ]
    before = weights(tiny_base)
    both = weights(merge_adapter(folders, tmp_path / "both", weights=FACTORS))
    for name, base in before.items():
        expected = base + sum(
            factor * (part[name] - base) for factor, part in zip(FACTORS, parts, strict=True)
        )
        torch.testing.assert_close(both[name], expected, atol=1e-6, rtol=0)


def test_adapters_of_different_matrices(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Where only one changes a matrix, its weight still counts."""
    base = tiny_bases["rope"]
    folders = write_two(base, tmp_path, ("two_targets", "default"))
    both = weights(merge_adapter(folders, tmp_path / "both", weights=(1, 0.5)))
    alone = weights(merge_adapter(folders[1], tmp_path / "alone", weights=(0.5,)))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(both[name], alone[name])
    assert not torch.equal(both[name], weights(base)[name])


def test_half_of_an_adapter(tiny_base: Path, tmp_path: Path) -> None:
    write_adapter(tiny_base, tmp_path / "adapter")
    whole = weights(merge_adapter(tmp_path / "adapter", tmp_path / "whole"))
    half = weights(merge_adapter(tmp_path / "adapter", tmp_path / "half", weights=[0.5]))
    before = weights(tiny_base)
    for name, base in before.items():
        torch.testing.assert_close(half[name], (base + whole[name]) / 2, atol=1e-6, rtol=0)


def test_unclear_wishes(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    folders: Any = write_two(tiny_bases["rope"], tmp_path)
    out = tmp_path / "out"
    assert "2 adapters, but no --weights\n  → say how much of each, such as --weights 0.5,0.5" in refusal(
        folders, out
    )
    assert "expected 2 finite numbers, one for each --adapter" in refusal(folders, out, weights=(1, 2, 3))
    assert "expected 2 finite numbers" in refusal(folders, out, weights=(1, float("nan")))
    assert "expected one of linear, ties" in refusal(folders, out, weights=(1, 1), combine="svd")
    for density in (0, 1.5):
        assert "--density" in refusal(folders, out, weights=(1, 1), combine="ties", density=density)
    with pytest.raises(UserError, match="--weights: found 'a,b', expected numbers such as"):
        parse_weights("a,b")
    assert parse_weights("0.7, -1") == (0.7, -1.0)
    assert COMBINATIONS[0] == "linear"


def test_prompt_adapters_are_not_combined(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "lora")
    write_adapter(tiny_bases["rope"], tmp_path / "ptuning", "ptuning")
    pair: Any = [tmp_path / "lora", tmp_path / "ptuning"]
    assert "merge this adapter alone" in refusal(pair, tmp_path / "out", weights=(1, 1))
    assert "have no weight" in refusal(tmp_path / "ptuning", tmp_path / "out", weights=(0.5,))
