"""Model folders: every official layout loads, every broken one is named by file, no pickle runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from finetune.baichuan import checkpoints
from finetune.baichuan.load import Base, load_model, load_tokenizer, resolve_base
from finetune.errors import UserError
from finetune.recipe.schema import Model

IDS = torch.arange(1200, 1212)[None]


@pytest.fixture
def folder(tiny_bases: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bases["rope"], tmp_path / "model"))


def load(folder: Path) -> Any:
    return load_model(Model(base=str(folder)), resolve_base(str(folder)))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)(IDS).logits


def as_bin_shards(folder: Path, extra: dict[str, torch.Tensor] | None = None) -> None:
    """What the official repositories hold: two shards and an index, no safetensors."""
    tensors = load_file(folder / "model.safetensors") | (extra or {})
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def refusal(folder: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve_base(str(folder), **settings)
    return str(caught.value)


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_sharded_bin_equals_safetensors(folder: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    """Also in torch's format before 1.6, which is a bare pickle."""
    expected = logits(folder)
    if legacy:
        save = torch.save
        monkeypatch.setattr(torch, "save", lambda *a: save(*a, _use_new_zipfile_serialization=False))
    as_bin_shards(folder)
    assert torch.equal(logits(folder), expected)
    model = load(folder)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in model.parameters())


def test_frequencies_in_a_checkpoint_are_ignored(folder: Path) -> None:
    expected = logits(folder)
    name = "self_attn.rotary_emb.inv_freq"
    as_bin_shards(folder, {f"model.layers.{layer}.{name}": torch.full((8,), 1e6) for layer in range(2)})
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(folder), expected)


def test_find_weight_files_prefers_safetensors(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    assert [file.name for file in checkpoints.find_weight_files(folder)] == ["model.safetensors"]


# --- pickles that want to run ---------------------------------------------------------------------------------


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_runs_code_is_refused(
    folder: Path, tmp_path: Path, quantized: bool, legacy: bool
) -> None:
    """Through our loader and through the Auto classes, the reader of 4-bit releases included."""
    target = tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    torch.save(
        {"model.norm.weight": torch.ones(64), "x": Attack(target)},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=not legacy,
    )
    if quantized:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"refused, this pickle.*could run code.*mkdir"):
        load(folder)
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(Exception, match=r"(?i)weights.only|refused|unpickl"):
            auto.from_pretrained(folder, trust_remote_code=False)
    assert not target.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert target.exists()  # it would have


# --- broken folders -------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json, so not a model folder" in refusal(folder)
    assert "finetune catalog" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "this is an adapter: give its base" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list"), ("\udc80", "not valid JSON")],
)
def test_config_that_is_no_config(folder: Path, content: str, says: str) -> None:
    (folder / "config.json").write_text(content, errors="surrogateescape")
    assert f"{folder / 'config.json'}: {says}" in refusal(folder)


def test_config_of_another_family(folder: Path) -> None:
    edit_config(folder, model_type="qwen2")
    assert "model_type is 'qwen2', expected 'baichuan'" in refusal(folder)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "big"}, {"num_attention_heads": 5}, {"position_embedding": "learned"}]
)
def test_config_with_impossible_values(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert next(iter(changes)) in message


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


def test_incomplete_shards(folder: Path) -> None:
    as_bin_shards(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    message = refusal(folder)
    assert "1 of 2 weight files that pytorch_model.bin.index.json names is missing" in message
    assert "pytorch_model-00002-of-00002.bin" in message
    (folder / "pytorch_model.bin.index.json").write_text('{"metadata": {}}')
    assert "has no weight_map" in refusal(folder)
    (folder / "pytorch_model.bin.index.json").write_text("<html>")
    assert "not valid JSON" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_safetensors(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(folder)
    assert f"{path}: not a complete safetensors file" in message
    assert "download or make it again" in message


def test_safetensors_that_is_something_else(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "not a complete safetensors file" in refusal(folder) or "Git LFS" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<html>not found</html>", "not a PyTorch checkpoint"),
        (b"", "not a PyTorch checkpoint"),
    ],
)
def test_bin_that_is_no_checkpoint(folder: Path, content: bytes, says: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert f"{folder / 'pytorch_model.bin'}" in refusal(folder)
    assert says in refusal(folder)


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00", b"\x80\x02garbage"])
def test_damaged_legacy_bin(folder: Path, content: bytes) -> None:
    """Only reading shows it."""
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin|model cannot be loaded|refused"):
        load(folder)
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        checkpoints.read_bin(path)


def test_bin_cut_short(folder: Path) -> None:
    as_bin_shards(folder)
    path = folder / "pytorch_model-00001-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-2000])
    assert f"{path}: not a PyTorch checkpoint" in refusal(folder)


def test_missing_and_misshapen_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weight missing or of another shape: .*layers\.1\.mlp\.up_proj"):
        load(folder)
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": gone[:, :3].contiguous()}, path)
    with pytest.raises(UserError, match=r"1 weight missing or of another shape.*up_proj"):
        load(folder)


def test_4bit_release_with_a_matrix_that_lost_its_statistics() -> None:
    entries = {"model.layers.0.mlp.up_proj.weight.data": torch.zeros(8, 1, dtype=torch.uint8)}
    with pytest.raises(UserError, match=r"x\.bin: .*up_proj.weight is not in the layout"):
        checkpoints.bitsandbytes_state_dict(entries, "x.bin")
    entries["model.layers.0.mlp.up_proj.weight.quant_state"] = [1, 2]  # type: ignore[assignment]
    with pytest.raises(UserError, match="download the release again"):
        checkpoints.bitsandbytes_state_dict(entries, "x.bin")


def test_tokenizer_that_is_missing_or_broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: not valid JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    assert len(load_tokenizer(folder)) == 1800  # from tokenizer.model
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(folder)


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("baichuan2-7b-chatt", "did you mean baichuan2-7b-chat?"),
        ("./no/such/folder", "is no folder and no name in the catalogue"),
        ("~/nowhere", "is no folder and no name in the catalogue"),
    ],
)
def test_unknown_names(base: str, says: str) -> None:
    message = refusal(base)
    assert says in message
    assert "model.base=baichuan2-nano" in message


@pytest.mark.parametrize("base", ["baichuan2-7b-chat", "baichuan2-7b-base-00220b", "someone/some-model"])
def test_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(base)
    assert f"{base} (" in message
    assert "cannot be downloaded" in message
    assert "hf download" in message
    assert "model.base=baichuan2-nano" in message
    assert ("--revision train_00220B" in message) == base.endswith("220b")


def test_base_in_a_folder_keeps_its_path_as_identity(folder: Path) -> None:
    assert resolve_base(str(folder)) == Base(str(folder), folder, str(folder))
