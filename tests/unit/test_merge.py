"""Merged folders: the same answers as base plus adapter, nothing else touched, complete or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_software import ask_stock
from test_adapters import IDS, LORA, adapted, base_model, logits, settings
from test_checkpoints import as_bin_shards
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.adapters import merge_adapter, save_adapter
from finetune.adapters.build import changes_base
from finetune.adapters.merge_record import FileHashes
from finetune.baichuan.shards import ShardWriter, parse_size
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


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def adapter(tiny_bases: dict[str, Path], tmp_path: Path) -> Path:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", LORA)
def test_merged_model_answers_as_base_and_adapter(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    trained = write_adapter(tiny_base, tmp_path / "adapter", kind)
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-5, rtol=0)
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
    AutoTokenizer.from_pretrained(tiny_bases["rope"]).save_pretrained(tmp_path / "half")
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
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert all(size <= 100_000 or len(load_file(file)) == 1 for size, file in zip(sizes, files))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in weights(folder).values())
    pair = [AutoModelForCausalLM.from_pretrained(each) for each in (whole, folder)]
    assert torch.equal(logits(pair[0], IDS), logits(pair[1], IDS))


@pytest.mark.parametrize("kind", ["default", "rslora", "dora"])
def test_bfloat16_is_the_exact_merge_rounded_once(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """As peft's own merge in float32, its matrices rounded; what rounding costs is in merge.json."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(half)
    pefts = write_adapter(half, tmp_path / "adapter", kind).merge_and_unload()
    with torch.no_grad():
        for name, parameter in pefts.named_parameters():
            if "layers" in name:
                parameter.copy_(parameter.bfloat16())
    expected = logits(pefts)
    ours, _ = base_model(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    assert (logits(ours) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_ranks_and_alphas_of_their_own(tiny_base: Path, tmp_path: Path) -> None:
    """peft's patterns are regular expressions on the names of modules."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["W_pack", "o_proj", "gate_proj"],
        rank_pattern={"o_proj": 2, r".*layers\.1\.self_attn\.W_pack": 6},
        alpha_pattern={"gate_proj": 3},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(tiny_base))
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=0)


def test_record_of_what_was_merged(tiny_bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    folder = merge_adapter(adapter, tmp_path / "out", dtype="bfloat16", max_shard_size="1MB")
    record = json.loads((folder / "merge.json").read_text())
    weight_file = tiny_bases["rope"] / "model.safetensors"

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert record["base"]["name"] == str(tiny_bases["rope"])
    assert record["base"]["files"] == {
        "model.safetensors": {"bytes": weight_file.stat().st_size, "sha256": digest(weight_file)}
    }
    (own,) = record["adapters"]
    assert own["files"]["adapter_model.safetensors"]["sha256"] == digest(
        adapter / "adapter_model.safetensors"
    )
    assert own["files"]["adapter_config.json"]["sha256"] == digest(adapter / "adapter_config.json")
    assert (own["method"], own["weight"], own["training"]) == ("LORA", 1.0, {})
    assert record["settings"] == {
        "format": "baichuan",
        "dtype": "bfloat16",
        "onto": "original",
        "max_shard_size": "1MB",
    }
    assert record["verification"]["comparisons"][0]["tokens"] > 100
    assert set(record["software"]) >= {"finetune", "torch", "transformers", "peft"}


def test_everybody_may_read_every_file(adapter: Path, tmp_path: Path) -> None:
    folder = merge_adapter(adapter, tmp_path / "out", max_shard_size="100KB")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


def test_companions(tiny_bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    """Licence notices, and the official code where the base brings it, for engines that ask for it."""
    base = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "base"))
    (base / "Baichuan2 Model License.pdf").write_bytes(b"%PDF")
    (base / "LICENSE").write_text("Apache")
    (base / "configuration_baichuan.py").write_text("# official")
    (base / "modeling_baichuan.py").write_text("# official")
    config = json.loads((base / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    }
    tokenizers = {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": auto_map | tokenizers}))
    folder = merge_adapter(adapter, tmp_path / "out", base=str(base))
    names = {path.name for path in folder.iterdir()}
    assert {
        "LICENSE",
        "Baichuan2 Model License.pdf",
        "chat_template.jinja",
        "generation_config.json",
    } <= names
    assert {"configuration_baichuan.py", "modeling_baichuan.py", "tokenizer.json", "tokenizer.model"} <= names
    assert json.loads((folder / "config.json").read_text())["auto_map"] == auto_map
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    (base / "modeling_baichuan.py").unlink()  # as downloaded by this toolkit: nothing to point to
    plain = merge_adapter(adapter, tmp_path / "plain", base=str(base))
    assert "auto_map" not in (plain / "config.json").read_text()


def test_tokenizer_needs_none_of_this_package(
    tiny_bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    folder = merge_adapter(adapter, tmp_path / "out")
    code = (
        "import sys; from transformers import AutoTokenizer; "
        f"t = AutoTokenizer.from_pretrained({str(folder)!r}); "
        "print(t.encode('血压 1 ok')); assert 'finetune' not in sys.modules"
    )
    expected = AutoTokenizer.from_pretrained(tiny_bases["rope"]).encode("血压 1 ok")
    assert ask_stock(code, folder=tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("1000", 1000), ("2KiB", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "five", "1e400", "nan", "5GBB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="max shard size: found"):
        parse_size(text)


def test_hash_ends_with_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C need not wait for the rest of a file of five gigabytes."""
    (tmp_path / "weights").write_bytes(bytes(1000))
    monkeypatch.setattr("finetune.adapters.merge_record.CHUNK", 1)
    begun, go_on = threading.Event(), threading.Event()
    taken = 0

    class Slow:
        def update(self, chunk: bytes) -> None:
            nonlocal taken
            taken += len(chunk)
            begun.set()
            assert go_on.wait(30)

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setattr(hashlib, "sha256", Slow)
    hashes = FileHashes()
    hashes.add(tmp_path / "weights")
    assert begun.wait(30)
    hashes.close()
    go_on.set()
    with pytest.raises(CancelledError):
        hashes.result()
    assert taken == 1


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


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapters_that_hold_a_part_of_the_base(
    tiny_bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """As checkpoints of such runs do; merged onto the whole base that part would count twice."""
    save_adapter(adapted(tiny_bases["rope"], kind, trained=True), tmp_path / "step-3")
    message = refusal(tmp_path / "step-3", tmp_path / "out")
    assert f"its initialisation ({kind}) moved a part of the base into it" in message


@pytest.mark.parametrize(
    "setting",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [5, 6]},
        {"trainable_token_indices": [7]},
        {"use_something_of_the_future": {"a": 1}},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_do_more_than_the_matrices_say(
    adapter: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    edit_config(adapter, **setting)
    message = refusal(adapter, tmp_path / "out")
    assert f"cannot merge an adapter with {next(iter(setting))}" in message


def test_methods_that_have_no_weights(tiny_bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "prefix", "prefix")
    message = refusal(tmp_path / "prefix", tmp_path / "out")
    assert "prefix tuning lives in the key/value cache of every layer" in message
    assert "P-Tuning (adapter.method=ptuning) can be merged" in message
    edit_config(adapter, peft_type="IA3")
    assert "adapters of method IA3 cannot be merged" in refusal(adapter, tmp_path / "out")


def test_adapter_of_split_matrices(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    renamed = {key.replace("W_pack", "q_proj"): tensor for key, tensor in load_file(file).items()}
    save_file(renamed, file)
    assert "turn the adapter with `finetune convert-adapter --to packed`" in refusal(
        adapter, tmp_path / "out"
    )


def test_alibi_is_no_llama(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tiny_bases["alibi"], tmp_path / "adapter")
    assert "its position encoding is ALiBi" in refusal(tmp_path / "adapter", tmp_path / "out", format="llama")


@pytest.mark.parametrize("option", ["format", "onto"])
def test_choices_that_are_none(adapter: Path, tmp_path: Path, option: str) -> None:
    assert f"--{option}: found 'x', expected one of" in refusal(adapter, tmp_path / "out", **{option: "x"})


def test_incomplete_base(tiny_bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "base"))
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.o_proj.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    message = refusal(adapter, tmp_path / "out", base=str(copy))
    assert "1 weight missing: model.layers.1.self_attn.o_proj.weight" in message


def test_base_of_another_shape(adapter: Path, tmp_path: Path) -> None:
    from tiny_model import write_tiny_base

    wide = write_tiny_base(tmp_path / "wide", hidden_size=96)
    assert "weight is 64x128, in" in refusal(adapter, tmp_path / "out", base=str(wide))
    shallow = write_tiny_base(tmp_path / "shallow", num_hidden_layers=1)
    assert "changes model.layers.1" in refusal(adapter, tmp_path / "out", base=str(shallow))


def test_full_disk(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "1.19 MiB are needed, 4.88 KiB are free" in refusal(adapter, tmp_path / "out")


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
    save_file({**tensors, name: tensors[name] * float("nan")}, file)
    assert f"{name} holds values that are not finite" in refusal(adapter, tmp_path / "out")
    save_file({key: tensor for key, tensor in tensors.items() if "layers.1.mlp" not in key}, file)
    assert "lacks 3 of the matrices that its target_modules name: model.layers.1.mlp" in refusal(
        adapter, tmp_path / "out"
    )
    save_file(tensors, file)
    edit_config(adapter, r=3)
    assert "A has rank 4, B 4, adapter_config.json says 3" in refusal(adapter, tmp_path / "out")
    file.write_bytes(b"x")
    assert "not a complete safetensors file" in refusal(adapter, tmp_path / "out")
    (adapter / "adapter_config.json").unlink()
    assert "not an adapter folder" in refusal(adapter, tmp_path / "out")


def test_adapter_that_names_no_base(adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, base_model_name_or_path=None)
    assert "names no base\n  → say which with --base" in refusal(adapter, tmp_path / "out")


def test_interrupted_merge_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "finish", interrupt)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(adapter, tmp_path / "out", max_shard_size="50KB")
    assert sorted(tmp_path.iterdir()) == before
