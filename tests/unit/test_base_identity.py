"""Whether a base is the adapter's: by what is in the weights, else by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import as_bin_shards
from test_merge import refusal, write_adapter
from tiny_model import write_tiny_base
from transformers import AutoModelForCausalLM

from finetune.adapters import merge_adapter
from finetune.adapters.base_identity import check_same_base
from finetune.adapters.training_note import write_training_note
from finetune.baichuan.fingerprint import fingerprint, same_model
from finetune.baichuan.load import Base
from finetune.errors import UserError
from finetune.export import export_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shape, trained differently."""
    return write_tiny_base(tmp_path_factory.mktemp("other") / "other", seed=7)


def test_fingerprint_of_copies(tiny_bases: dict[str, Path], other: Path, tmp_path: Path) -> None:
    """Another file format, dtype, quantisation or layout is the same model; other weights are not."""
    base = tiny_bases["rope"]
    own = fingerprint(base)
    assert own == fingerprint(base)
    pickled = Path(shutil.copytree(base, tmp_path / "bin"))
    as_bin_shards(pickled, {})
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", max_shard_size="100KB")
    copies = [pickled, tmp_path / "half"]
    for format in ("nf4", "int8", "llama"):
        kind: Any = format
        copies.append(export_model(base, tmp_path / format, format=kind).folder)
    assert all(same_model(fingerprint(copy), own) for copy in copies)
    assert {fingerprint(copy) for copy in copies if copy.name not in ("nf4", "int8")} == {own}
    assert not same_model(fingerprint(other), own)


@pytest.mark.parametrize("changed", ["all", "values_only"])
def test_merged_model_is_another_base(tiny_bases: dict[str, Path], tmp_path: Path, changed: str) -> None:
    """LoRA leaves embeddings and norms alone: the matrices tell, even where only some rows of W_pack changed."""
    base = tiny_bases["rope"]
    write_adapter(base, tmp_path / "first")
    if changed == "values_only":
        _keep_update_of_values_only(tmp_path / "first")
    merged = merge_adapter(tmp_path / "first", tmp_path / "sft" / "merged", verify=False)
    second = tmp_path / "second"
    write_adapter(merged, second)
    write_training_note(second, base=str(merged), base_fingerprint=fingerprint(merged))
    assert "a model with other weights" in refusal(second, tmp_path / "out", base=str(base))
    write_training_note(second, base=str(base), base_fingerprint=fingerprint(base))
    assert "a model with other weights" in refusal(second, tmp_path / "out", base=str(merged))
    small = export_model(base, tmp_path / "small", format="nf4").folder
    merge_adapter(second, tmp_path / "out", base=str(small), verify=False)


def _keep_update_of_values_only(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[: tensor.shape[0] * 2 // 3] = 0
    save_file(tensors, path)


@pytest.mark.parametrize("noted", [True, False])
def test_folders_of_one_name_are_not_one_model(
    tiny_bases: dict[str, Path], other: Path, tmp_path: Path, noted: bool
) -> None:
    """Every run's result is called `merged`."""
    trained = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "sft" / "merged"))
    unlike = Path(shutil.copytree(other, tmp_path / "other" / "merged"))
    write_adapter(trained, tmp_path / "adapter")
    known = {"base_fingerprint": fingerprint(trained)} if noted else {}
    write_training_note(tmp_path / "adapter", base=str(trained), **known)
    assert "other weights" in refusal(tmp_path / "adapter", tmp_path / "out", base=str(unlike))
    small = export_model(other, tmp_path / "small" / "merged", format="nf4").folder
    assert "other weights" in refusal(tmp_path / "adapter", tmp_path / "out", base=str(small))


def test_recorded_fingerprint_decides(tiny_bases: dict[str, Path], other: Path, tmp_path: Path) -> None:
    base = tiny_bases["rope"]
    adapter = tmp_path / "adapter"
    write_adapter(base, adapter)
    copy = shutil.copytree(base, tmp_path / "elsewhere")
    write_training_note(adapter, base="gone/with-the-machine", base_fingerprint=fingerprint(base))
    merge_adapter(adapter, tmp_path / "merged", base=str(copy), verify=False)
    message = refusal(adapter, tmp_path / "out", base=str(other))
    assert (
        f"was trained on gone/with-the-machine, and {other} is another base: a model with other weights"
        in message
    )
    assert "--force-base" in message
    merge_adapter(adapter, tmp_path / "forced", base=str(other), force_base=True, verify=False)


def test_base_that_changed_under_its_name(tiny_bases: dict[str, Path], other: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "base"))
    write_adapter(base, tmp_path / "adapter")
    write_training_note(tmp_path / "adapter", base=str(base), base_fingerprint=fingerprint(base))
    shutil.copyfile(other / "model.safetensors", base / "model.safetensors")
    assert "it has that name, but other weights" in refusal(tmp_path / "adapter", tmp_path / "out")


def test_folders_are_compared_where_nothing_was_recorded(
    tiny_bases: dict[str, Path], other: Path, tmp_path: Path
) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    assert "a model with other weights" in refusal(tmp_path / "adapter", tmp_path / "out", base=str(other))
    copy = shutil.copytree(tiny_bases["rope"], tmp_path / "renamed")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(copy), verify=False)


@pytest.mark.parametrize(
    ("recorded", "name", "identity"),
    [
        ("baichuan-inc/Baichuan2-7B-Chat", "baichuan2-7b-chat", "baichuan-inc/Baichuan2-7B-Chat"),
        ("baichuan2-7b-chat", "baichuan2-7b-chat", "baichuan-inc/Baichuan2-7B-Chat"),
        ("baichuan-inc/Baichuan2-7B-Chat", "models/Baichuan2-7B-Chat", "/data/models/Baichuan2-7B-Chat"),
        ("/home/a/Baichuan2-7B-Chat", "/home/b/baichuan2-7b-chat", "/home/b/baichuan2-7b-chat"),
        ("baichuan-inc/Baichuan2-7B-Chat-4bits", "baichuan2-7b-chat", "baichuan-inc/Baichuan2-7B-Chat"),
        ("baichuan2-7b-chat-4bits", "baichuan2-7b-chat", "baichuan-inc/Baichuan2-7B-Chat"),
    ],
)
def test_names_of_one_model(tiny_bases: dict[str, Path], recorded: str, name: str, identity: str) -> None:
    base = Base(name, tiny_bases["rope"], identity)
    check_same_base(Path("adapter"), {"base_model_name_or_path": recorded}, {}, base)


@pytest.mark.parametrize(
    ("recorded", "revision", "name", "given"),
    [
        ("baichuan-inc/Baichuan2-7B-Base", None, "baichuan2-7b-chat", None),
        ("baichuan-inc/Baichuan2-13B-Chat", None, "baichuan2-7b-chat", None),
        (
            "baichuan-inc/Baichuan2-7B-Intermediate-Checkpoints",
            "train_00220B",
            "baichuan2-7b-base-00440b",
            "train_00440B",
        ),
        ("/gone/my-model", None, "/data/another-model", None),
        ("/gone/sft/merged", None, "/data/other/merged", None),
    ],
)
def test_names_that_say_nothing_of_the_kind(
    tiny_bases: dict[str, Path], recorded: str, revision: str | None, name: str, given: str | None
) -> None:
    base = Base(name, tiny_bases["rope"], name, given)
    config = {"base_model_name_or_path": recorded, "revision": revision}
    with pytest.raises(UserError, match="nothing says that"):
        check_same_base(Path("adapter"), config, {}, base)


def test_official_four_bit_copy_of_the_recorded_base(tiny_bases: dict[str, Path], other: Path) -> None:
    """Its embeddings are rounded to float16, so that fingerprints may differ where names agree."""
    base = Base("baichuan2-7b-chat", other, "baichuan-inc/Baichuan2-7B-Chat")
    note = {
        "base": "baichuan-inc/Baichuan2-7B-Chat-4bits",
        "base_fingerprint": fingerprint(tiny_bases["rope"]),
    }
    check_same_base(Path("adapter"), {}, note, base)
    with pytest.raises(UserError, match="other weights"):
        check_same_base(Path("adapter"), {}, note | {"base": "baichuan-inc/Baichuan2-7B-Chat"}, base)


def test_adapter_that_names_no_base_takes_the_given(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(tiny_bases["rope"]), verify=False)
