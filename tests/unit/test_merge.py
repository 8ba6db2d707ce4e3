"""Merged folders: the same answers as base plus adapter, nothing else touched, complete or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import IDS, LORA, adapted, logits, settings
from test_checkpoints import as_bin_shards
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.adapters import merge as merge_module
from finetune.adapters import merge_adapter, save_adapter
from finetune.adapters.build import changes_base
from finetune.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def write_adapter(base: Path, folder: Path, kind: str = "default") -> Any:
    """A trained adapter in ``folder``; returns the model it was trained on."""
    initial = folder.with_name("initial") if changes_base(settings(kind)) else None
    model = adapted(base, kind, trained=True, initial=initial)
    save_adapter(model, folder, initial=initial)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture
def adapter(tiny_bases: dict[str, Path], tmp_path: Path) -> Path:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", LORA)
def test_merged_model_answers_as_base_and_adapter(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    trained = write_adapter(tiny_base, tmp_path / "adapter", kind)
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    torch.testing.assert_close(logits(merged), logits(trained), atol=2e-5, rtol=0)
    assert merged.config.position_embedding == trained.config.position_embedding
    assert merged.generation_config.temperature == pytest.approx(0.3)
    base = AutoTokenizer.from_pretrained(tiny_base)
    assert AutoTokenizer.from_pretrained(folder).encode("血压 1 ok") == base.encode("血压 1 ok")


def test_untouched_tensors_stay_bit_for_bit(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter", "two_targets")
    merged = weights(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    before = weights(tiny_bases["rope"])
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(merged[name], before[name])}
    targets = ("self_attn.W_pack", "mlp.down_proj")
    assert changed == {f"model.layers.{i}.{name}.weight" for i in range(2) for name in targets}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_output(adapter: Path, tmp_path: Path, dtype: str) -> None:
    """The sum is made in float32 and rounded once."""
    exact = weights(merge_adapter(adapter, tmp_path / "exact"))
    folder = merge_adapter(adapter, tmp_path / "half", dtype=dtype)
    rounded = weights(folder)
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exact[name].to(getattr(torch, dtype))), name
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == getattr(torch, dtype)


def test_half_precision_base_keeps_its_dtype(
    tiny_bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_bases["rope"], dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "half")
    merged = weights(merge_adapter(adapter, tmp_path / "merged", base=str(tmp_path / "half")))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_merging_onto_bin_shards(tiny_bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    expected = weights(merge_adapter(adapter, tmp_path / "one"))
    copy = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "bin"))
    as_bin_shards(copy, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    merged = weights(merge_adapter(adapter, tmp_path / "two", base=str(copy)))
    merged.pop("model.layers.0.self_attn.rotary_emb.inv_freq", None)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_small_shards(adapter: Path, tmp_path: Path) -> None:
    whole = merge_adapter(adapter, tmp_path / "whole")
    folder = merge_adapter(adapter, tmp_path / "shards", max_shard_size="100KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    # A tensor larger than the limit, such as the embeddings, has a file to itself.
    assert all(len(load_file(file)) == 1 or file.stat().st_size < 110_000 for file in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in weights(folder).values())
    pair = [AutoModelForCausalLM.from_pretrained(each) for each in (whole, folder)]
    assert torch.equal(logits(pair[0], IDS), logits(pair[1], IDS))


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("1000", 1000), ("2KiB", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert merge_module.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "five", "1e400", "nan", "5GBB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--max-shard-size"):
        merge_module.parse_size(text)


# --- refusals: nothing is left behind ---------------------------------------------------------------------


def refusal(adapter: Path, output: Path, **options: Any) -> str:
    """The message; whatever was beside the output before is all that is there after."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(UserError) as caught:
        merge_adapter(adapter, output, **options)
    assert sorted(output.parent.iterdir()) == before
    return str(caught.value)


def test_existing_output(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in refusal(adapter, tmp_path / "out")


@pytest.mark.parametrize("kind", ["ptuning", "prefix"])
def test_prompt_adapters_have_nothing_to_merge(
    tiny_bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / kind, kind)
    assert "has no weights to merge into" in refusal(tmp_path / kind, tmp_path / "out")


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapters_that_hold_a_part_of_the_base(
    tiny_bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """As checkpoints of such runs do; merged onto the whole base that part would count twice."""
    save_adapter(adapted(tiny_bases["rope"], kind, trained=True), tmp_path / "step-3")
    message = refusal(tmp_path / "step-3", tmp_path / "out")
    assert f"its initialisation ({kind}) moved a part of the base into it" in message


def test_base_of_another_shape(adapter: Path, tmp_path: Path) -> None:
    from tiny_model import write_tiny_base

    wide = write_tiny_base(tmp_path / "wide", hidden_size=96)
    assert "weight is 64x128, in" in refusal(adapter, tmp_path / "out", base=str(wide))
    shallow = write_tiny_base(tmp_path / "shallow", num_hidden_layers=1)
    assert "changes model.layers.1" in refusal(adapter, tmp_path / "out", base=str(shallow))


def test_quantised_base(golden: Path, adapter: Path, tmp_path: Path) -> None:
    base = str(golden / "baichuan2-7b-tiny-4bits")
    assert "the weights are quantised" in refusal(adapter, tmp_path / "out", base=base)


def test_full_disk(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "GB are needed, 0.0 GB are free" in refusal(adapter, tmp_path / "out")


def test_damaged_adapters(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2)}, file)
    assert "cannot merge 'base_model.model.lm_head.weight'" in refusal(adapter, tmp_path / "out")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    assert "has only lora_" in refusal(adapter, tmp_path / "out")
    save_file({}, file)
    assert "holds no LoRA matrices" in refusal(adapter, tmp_path / "out")
    file.write_bytes(b"x")
    assert "not a complete safetensors file" in refusal(adapter, tmp_path / "out")
    (adapter / "adapter_config.json").unlink()
    assert "not an adapter folder" in refusal(adapter, tmp_path / "out")


def test_adapter_that_names_no_base(adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    assert "names no base\n  → say which with --base" in refusal(adapter, tmp_path / "out")


def test_interrupted_merge_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_module.ShardWriter, "finish", interrupt)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(adapter, tmp_path / "out", max_shard_size="50KB")
    assert sorted(tmp_path.iterdir()) == before
