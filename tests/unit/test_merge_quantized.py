"""Adapters of quantised bases: onto the original weights, and onto those that training saw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_adapters import adapted, logits, settings
from test_merge import refusal, weights, write_adapter

from finetune.adapters import attach_adapter, merge_adapter, save_adapter
from finetune.adapters.dequantized import as_trained, stored_weights
from finetune.adapters.merge import merge_summary
from finetune.adapters.merge_record import read_record
from finetune.adapters.training_note import write_training_note
from finetune.baichuan.load import load_model, resolve_base
from finetune.errors import UserError
from finetune.export import export_model
from finetune.export.quantize import QUANTIZED
from finetune.recipe.schema import Model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

CPU = torch.device("cpu")


def held(base: Path, quantization: str) -> Any:
    """The base in memory as training holds it."""
    settings: Any = {"base": str(base), "quantization": quantization, "dtype": "float32"}
    return load_model(Model(**settings), resolve_base(str(base)))


def train(
    base: Path, folder: Path, quantization: str = "nf4", *, note: bool = True, kind: str = "default"
) -> Any:
    """A QLoRA adapter in ``folder`` and the model that it was trained on."""
    torch.manual_seed(0)
    model = attach_adapter(held(base, quantization), settings(kind), resolve_base(str(base))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    save_adapter(model, folder)
    if note:
        write_training_note(folder, base=str(base), quantization=quantization, dtype="float32", stage="sft")
    return model


def test_training_sees_what_is_called_so(tiny_base: Path) -> None:
    """The matrices that bitsandbytes holds in a loaded model, expanded by it."""
    from bitsandbytes.functional import dequantize_4bit

    model = held(tiny_base, "nf4")
    for name, weight in weights(tiny_base).items():
        seen = as_trained(name, weight, "nf4", torch.float32, CPU)
        parameter = model.get_parameter(name)
        if "proj" in name or "W_pack" in name:
            assert torch.equal(seen, dequantize_4bit(parameter.data, parameter.quant_state))
            assert not torch.equal(seen, weight)
        else:
            assert seen is weight


@pytest.mark.parametrize("kind", ["default", "dora", "two_targets"])
def test_dequantized_merge_is_the_adapter_on_the_nf4_base(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """Every matrix is what training saw, adapted or not; the original base gives a larger difference."""
    trained = train(tiny_base, tmp_path / "adapter", kind=kind)
    expected = logits(trained)
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "dequantized", onto="dequantized")
    exact = (logits(held(folder, "none")) - expected).abs().max()
    other = merge_adapter(tmp_path / "adapter", tmp_path / "original", onto="original")
    away = (logits(held(other, "none")) - expected).abs().max()
    assert exact < 1e-4 * expected.std()
    assert away > 100 * exact

    decided = read_record(folder)["verification"]["comparisons"]
    assert [each["reference"] for each in decided] == ["base (nf4) + adapter"]
    reported = read_record(other)["verification"]["comparisons"]
    assert [each["reference"] for each in reported] == ["base + adapter", "base (nf4) + adapter, as trained"]
    assert reported[1]["mean_kl"] > 100 * max(decided[0]["mean_kl"], reported[0]["mean_kl"])
    assert reported[1]["tolerance"] is None


def test_what_fits_when_is_said(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_bases["rope"], tmp_path / "adapter")
    original = merge_adapter(tmp_path / "adapter", tmp_path / "original")
    lines, table = merge_summary(original)
    assert "trained on the nf4 base, merged onto the original weights" in lines[-1]
    assert "mean KL" in lines[-1]
    assert "--onto dequantized gives exactly what training saw" in lines[-1]
    assert len(table) == 3
    unchecked = merge_adapter(tmp_path / "adapter", tmp_path / "unchecked", verify=False)
    lines, table = merge_summary(unchecked)
    assert lines[0] == "not verified: not wanted"
    assert not table
    other = merge_adapter(tmp_path / "adapter", tmp_path / "other", onto="dequantized")
    assert not any("--onto" in line for line in merge_summary(other)[0])


def test_adapter_without_a_note(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Its owner knows that it was QLoRA's; without a word it is merged as any other."""
    trained = train(tiny_bases["rope"], tmp_path / "adapter", note=False)
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "out", onto="dequantized")
    torch.testing.assert_close(logits(held(folder, "none")), logits(trained), atol=1e-4, rtol=0)
    plain = merge_adapter(tmp_path / "adapter", tmp_path / "plain")
    assert len(read_record(plain)["verification"]["comparisons"]) == 1


def test_int8(tiny_base: Path, tmp_path: Path) -> None:
    """LLM.int8 rounds the inputs of its products, too, which no weights can do."""
    trained = train(tiny_base, tmp_path / "adapter", "int8")
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "out", onto="dequantized")
    difference = (logits(held(folder, "none")) - logits(trained)).abs().mean()
    assert difference < 0.1 * logits(trained).std()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_base_that_is_a_bitsandbytes_checkpoint(tiny_base: Path, tmp_path: Path, kind: Any) -> None:
    """Its matrices are expanded; the result is a plain folder, the same as from the base it was made of."""
    small = export_model(tiny_base, tmp_path / "small", format=kind, max_shard_size="40KB").folder
    train(tiny_base, tmp_path / "adapter", kind)
    ours = merge_adapter(tmp_path / "adapter", tmp_path / "ours", base=str(small))
    expected = merge_adapter(tmp_path / "adapter", tmp_path / "expected", onto="dequantized")
    assert "quantization_config" not in (ours / "config.json").read_text()
    found, wanted = weights(ours), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "there are no original ones here" in refusal(
        tmp_path / "adapter", tmp_path / "no", base=str(small), onto="original"
    )


def test_official_four_bit_release(golden: Path, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(golden / "baichuan2-7b-tiny-4bits", tmp_path / "Baichuan2-7B-Chat-4bits"))
    expected = load_file(golden / "baichuan2-7b-tiny-4bits" / "expected_dequantized.safetensors")
    found = dict(stored_weights(base, torch.float16))
    assert {name.removesuffix(".weight") for name in expected} <= {
        name.removesuffix(".weight") for name in found
    }
    for name, tensor in expected.items():
        key = name if name in found else f"{name}.weight"
        assert torch.equal(found[key], tensor), name
    # It has no tokenizer of its size: any will do to be refused by, and none is what it comes with.
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    assert "has neither tokenizer.model" in refusal(tmp_path / "adapter", tmp_path / "out", base=str(base))


def write_official_4bit(base: Path, folder: Path) -> Path:
    """The base in the layout of the official 4-bit releases, tokenizer included."""
    from bitsandbytes.functional import quantize_4bit

    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    entries: dict[str, Any] = {}
    for name, weight in weights(base).items():
        if not QUANTIZED.fullmatch(name):
            entries[name] = weight.half()
            continue
        packed, state = quantize_4bit(weight.half(), compress_statistics=True, quant_type="nf4")
        inner = state.state2
        second = [inner.absmax, inner.code, inner.blocksize, False, inner.dtype, None, None]
        entries[f"{name}.data"] = packed
        entries[f"{name}.quant_state"] = [
            *(state.absmax, state.shape, state.dtype, state.blocksize),
            *([state.offset, second], "nf4", state.code),
        ]
    torch.save(entries, folder / "pytorch_model.bin")
    settings = {
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "load_in_4bit": True,
    }
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "float16", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_adapter_of_an_official_four_bit_release(tiny_base: Path, tmp_path: Path) -> None:
    """LoRA trained on it, merged into it: a plain 16-bit folder with the same answers."""
    base = write_official_4bit(tiny_base, tmp_path / "Baichuan2-7B-Chat-4bits")
    trained = train(base, tmp_path / "adapter")
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "merged", verify=True)
    merged = weights(folder)
    assert merged.keys() == weights(tiny_base).keys()
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    expected = logits(trained)
    assert (logits(held(folder, "none")) - expected).abs().max() < 0.02 * expected.std()


def test_adapters_of_16_bit_bases_were_not_trained_on_4(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(adapted(tiny_bases["rope"], "default", trained=True), tmp_path / "adapter")
    write_training_note(tmp_path / "adapter", quantization="none")
    message = refusal(tmp_path / "adapter", tmp_path / "out", onto="dequantized")
    assert "was trained on a base that was not quantised" in message


def test_several_adapters_of_bases_held_differently(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """No one rounding is what all of them saw, whichever comes first; the advice counts every one."""
    base = tiny_bases["rope"]
    train(base, tmp_path / "nf4")
    save_adapter(adapted(base, "default", trained=True), tmp_path / "plain")
    write_training_note(tmp_path / "plain", base=str(base), quantization="none", dtype="float32")
    adapters = [tmp_path / "nf4", tmp_path / "plain"]
    for order in (adapters, adapters[::-1]):
        with pytest.raises(UserError, match="bases of several kinds"):
            merge_adapter(order, tmp_path / "out", weights=[0.5, 0.5], onto="dequantized")
    folder = merge_adapter(adapters[::-1], tmp_path / "out", weights=[0.5, 0.5])
    assert "trained on the nf4 base" in merge_summary(folder)[0][-1]


def test_expanded_matrices_are_written_as_the_config_says(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever this machine computes in: a 16-bit model stays one of 16 bits, and its size is foreseen."""
    small = export_model(tiny_bases["rope"], tmp_path / "small", format="nf4", dtype="bfloat16").folder
    train(tiny_bases["rope"], tmp_path / "adapter", note=False)
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(small))
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    exact = merge_adapter(tmp_path / "adapter", tmp_path / "exact", base=str(small), dtype="float32")
    assert {tensor.dtype for tensor in weights(exact).values()} == {torch.float32}


def test_damaged_note(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    note = write_training_note(tmp_path / "adapter", quantization="q5")
    assert "expected an object whose quantization is one of none, int8, nf4" in refusal(
        tmp_path / "adapter", tmp_path / "out"
    )
    note.write_text("{")
    assert "not valid JSON" in refusal(tmp_path / "adapter", tmp_path / "out")
