"""bitsandbytes checkpoints: tensor for tensor what transformers writes, the logits of quantising at load."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export_llama import IDS, logits, weights
from tiny_run import finetune
from transformers import AutoModelForCausalLM

from finetune.baichuan.load import load_model, quantization_config, resolve_base
from finetune.export import export_model
from finetune.recipe.schema import Model

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
KINDS = ["nf4", "int8"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quantised_at_load(base: Path, kind: str, dtype: str) -> Any:
    target = getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=target, quantization_config=quantization_config(kind, target), device_map={"": "cpu"}
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reloaded_checkpoint_equals_quantising_at_load(
    tiny_base: Path, tmp_path: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.baichuan.load.pick_device", lambda: torch.device("cpu"))
    folder = export_model(tiny_base, tmp_path / "out", format=kind, dtype=dtype).folder  # type: ignore[arg-type]
    expected = quantised_at_load(tiny_base, kind, dtype)
    expected.save_pretrained(tmp_path / "saved")
    saved, written = weights(tmp_path / "saved"), weights(folder)
    assert written.keys() == saved.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == written[name].dtype, name
        assert torch.equal(tensor, written[name]), name
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == getattr(torch, dtype)
    assert torch.equal(logits(again, IDS), logits(expected, IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_toolkit_loads_it_without_being_told(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """As `chat --model FOLDER` does, the head normalised once."""
    folder = export_model(tiny_base, tmp_path / "out", format=kind).folder  # type: ignore[arg-type]
    base = resolve_base(str(folder))
    assert base.quantization == kind
    model = load_model(Model(base=str(folder)), base, device=torch.device("cpu"))
    expected = logits(quantised_at_load(tiny_base, kind, "float32"), IDS)
    torch.testing.assert_close(logits(model, IDS), expected, atol=1e-4, rtol=0)
    arguments = ("--prompt", "头痛怎么办？", "--greedy", "--max-new-tokens", 4)
    answer = finetune("chat", "--model", folder, *arguments)
    assert answer == finetune("chat", "--model", tiny_base, "--quantization", kind, *arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_reported(tiny_bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    printed = finetune(
        "export", "--model", tiny_bases["rope"], "--output", out, "--format", kind, "--dtype", "bfloat16"
    )
    tensors = weights(out)
    kept = sum(
        t.nbytes for n, t in tensors.items() if n in weights(tiny_bases["rope"]) and t.dtype == torch.bfloat16
    )
    assert "0.5 MB of them embeddings, head and norms, which are not quantised" in printed
    record = json.loads((out / "export.json").read_text())
    assert record["unquantized_bytes"] == kept
    assert record["bytes"] == sum(t.nbytes for t in tensors.values())
    matrices = sum(t.numel() for n, t in weights(tiny_bases["rope"]).items() if "_proj" in n or "W_pack" in n)
    statistics = {"nf4": 0.2, "int8": 0.1}[kind]  # a share that shrinks as matrices grow
    values = {"nf4": 0.5, "int8": 1.0}[kind] * matrices
    assert values < record["bytes"] - kept < values * (1 + statistics) + 2500 * 10
