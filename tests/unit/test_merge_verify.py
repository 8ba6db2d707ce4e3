"""Verification: silent when rounding explains the difference, loud when it does not."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import LORA
from test_merge import refusal, weights, write_adapter

from finetune.adapters import merge_adapter
from finetune.adapters.lora_weights import LoraUpdate
from finetune.adapters.merge import merge_summary
from finetune.adapters.merge_record import read_record
from finetune.adapters.verify import TOLERANCE, Comparison, compare
from finetune.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def comparison(folder: Path) -> dict[str, Any]:
    return read_record(folder)["verification"]["comparisons"][0]


@pytest.mark.parametrize("kind", [*LORA, "ptuning", "ptuning_lstm"])
def test_float32_merges_differ_by_rounding_only(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    write_adapter(tiny_base, tmp_path / "adapter", kind)
    found = comparison(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    assert found["max_difference"] < 2e-5  # of 400,000 logits of up to 40: a few units in the last place
    assert found["relative_difference"] < 2e-6
    assert found["mean_kl"] < 1e-9
    assert found["agreement"] == 1
    assert found["adapter_effect"] > 0.01
    assert found["tokens"] > 100


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loses_a_little(tiny_base: Path, tmp_path: Path, dtype: str) -> None:
    write_adapter(tiny_base, tmp_path / "adapter")
    found = comparison(merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=dtype))
    assert 1e-5 < found["relative_difference"] < TOLERANCE[dtype]
    assert found["adapter_effect"] > 10 * found["relative_difference"]


@pytest.mark.parametrize("exact", ["norm", "o_proj"])
def test_base_of_several_dtypes(tiny_bases: dict[str, Path], tmp_path: Path, exact: str) -> None:
    """Some of float32 among bfloat16: the config says what most are, the tolerance is that of the coarsest."""
    base = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "base"))
    tensors = {n: t if n.endswith(f"{exact}.weight") else t.bfloat16() for n, t in weights(base).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    write_adapter(base, tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", verify=True)
    assert {name: t.dtype for name, t in weights(merged).items()} == {n: t.dtype for n, t in tensors.items()}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert read_record(merged)["settings"]["dtype"] == "bfloat16"
    assert comparison(merged)["tolerance"] == TOLERANCE["bfloat16"]


@pytest.mark.parametrize("kind", ["default", "ptuning"])
def test_one_model_in_memory_at_a_time(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """None of them waits for the garbage collector to come by."""
    import finetune.baichuan.load as load

    models: list[weakref.ref[Any]] = []
    original = load.load_model

    def tracked(*args: Any, **options: Any) -> Any:
        assert not any(model() is not None for model in models)
        models.append(weakref.ref(model := original(*args, **options)))
        return model

    write_adapter(tiny_bases["rope"], tmp_path / "adapter", kind)
    gc.collect()
    monkeypatch.setattr(load, "load_model", tracked)
    gc.disable()
    try:
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", verify=True)
    finally:
        gc.enable()
    assert len(models) == 2


def test_llama_folders_are_verified_as_what_they_are(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("default", "ptuning"):
        write_adapter(tiny_bases["rope"], tmp_path / kind, kind)
        folder = merge_adapter(tmp_path / kind, tmp_path / f"{kind}-merged", format="llama")
        assert comparison(folder)["max_difference"] < 1e-4
        assert '"LlamaForCausalLM"' in (folder / "config.json").read_text()
        assert any("q_proj" in name for name in weights(folder))


def test_wrong_weights_do_not_appear(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a bug, or a bit that a disk has flipped."""
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    right = LoraUpdate.apply

    def wrong(self: LoraUpdate, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        merged = right(self, weight, dtype)
        merged[0] += 0.5
        return merged

    monkeypatch.setattr(LoraUpdate, "apply", wrong)
    message = refusal(tmp_path / "adapter", tmp_path / "out")
    assert "does not answer as base + adapter: written in float32" in message
    assert "(tolerance 0.10%)" in message
    assert "Nothing was written" in message
    assert "check that base and adapter belong together; --no-verify" in message
    merge_adapter(tmp_path / "adapter", tmp_path / "out", verify=False)


def test_adapter_that_rounding_swallows(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """What the adapter changes is smaller than what bfloat16 can express: most of it would be lost."""
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        tensors[name] = tensors[name] * (0.02 if "lora_B" in name else 1)
    save_file(tensors, file)
    message = refusal(tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert "write it with --dtype float32, which rounds nothing" in message
    merge_adapter(tmp_path / "adapter", tmp_path / "out", dtype="float32")


def test_too_large_to_verify(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    monkeypatch.setattr("finetune.adapters.verify.room_to_verify", lambda plan: (30 * 10**9, 10**9))
    message = refusal(tmp_path / "adapter", tmp_path / "out", verify=True)
    assert "--verify: needs 30.0 GB of memory, 1.0 GB are free" in message
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    lines, table = merge_summary(folder)
    assert lines == ["not verified: needs 30.0 GB of memory, 1.0 GB are free"]
    assert not table


def test_comparison_against_a_closed_form() -> None:
    """Two tokens and two words: a logit gap of ln 3 is probabilities of 3/4 and 1/4."""
    gap = torch.log(torch.tensor(3.0)).item()
    want = torch.tensor([[gap, 0.0], [0.0, 0.0]])
    have = torch.tensor([[0.0, 0.0], [0.0, 0.1]])
    alone = torch.zeros(2, 2)
    found = compare("it", [want], [have], [alone], 0.1)
    spread = (2 * (gap / 2) ** 2) / 4
    first = 0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5))
    second = torch.nn.functional.kl_div(have[1].log_softmax(-1), want[1].softmax(-1), reduction="sum")
    assert found.max_difference == pytest.approx(gap)
    assert found.relative_difference == pytest.approx(((gap**2 + 0.01) / 4 / spread) ** 0.5)
    assert found.adapter_effect == pytest.approx((gap**2 / 4 / spread) ** 0.5)
    assert found.mean_kl == pytest.approx(float(first + second) / 2, rel=1e-5)
    assert found.agreement == 0.5
    assert found.tokens == 2
    assert not found.passed


@pytest.mark.parametrize(
    ("difference", "effect", "passed"),
    [
        (0.001, 0.5, True),
        (0.06, 0.5, False),  # beyond the tolerance
        (0.04, 0.05, False),  # within, but most of what the adapter does
        (0.009, 0.009, True),  # the adapter does nothing that could be told from rounding
        (float("inf"), 0.5, False),
    ],
)
def test_what_passes(difference: float, effect: float, passed: bool) -> None:
    found = Comparison("it", 1.0, difference, effect, 0.0, 1.0, 10, tolerance=0.05, floor=0.01)
    assert found.passed == passed


def test_logits_that_are_not_finite_fail() -> None:
    broken = [torch.full((2, 3), float("nan"))]
    found = compare("it", [torch.randn(2, 3)], broken, [torch.randn(2, 3)], 0.1)
    assert not found.passed


def test_nothing_is_verified_unless_wanted(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "out", verify=False)
    assert read_record(folder)["verification"] == {"skipped": "not wanted"}
    with pytest.raises(UserError, match="exists already"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
