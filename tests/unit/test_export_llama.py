"""Llama folders: loaded by stock transformers alone, the same logits, the same token ids."""

from __future__ import annotations

import importlib
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_software import ask_stock
from test_chat import ATTACK, conversation
from test_checkpoints import as_bin_shards
from test_merge import write_adapter
from tiny_model import write_tiny_base
from tiny_run import ROOT, finetune
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from finetune.adapters import merge_adapter
from finetune.baichuan.chat import build_prompt
from finetune.baichuan.load import load_tokenizer
from finetune.errors import UserError
from finetune.export import export_model

STOCK_PROCESS = """
import json, sys
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM
folder, question = sys.argv[1], json.loads(sys.stdin.read())
model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.tensor(question["ids"])).logits
torch.save(logits, question["logits"])
chat = [tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in question["chats"]]
safe = [
    tokenizer.apply_chat_template(m, add_generation_prompt=True, sanitize_control_tokens=True)["input_ids"]
    for m in question["chats"] + question["attacks"]
]
assert not any(name.split(".")[0] == "finetune" for name in sys.modules)
print(json.dumps({
    "missing": [sorted(info["missing_keys"]), sorted(info["unexpected_keys"])],
    "tokenizer": type(tokenizer).__name__,
    "token_ids": tokenizer(question["texts"])["input_ids"],
    "chat": chat,
    "safe": safe,
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    "temperature": model.generation_config.temperature,
}))
"""

CHATS = [conversation("头痛怎么办？"), conversation("头痛\n", " 休息 ", "  感冒", system="医生 ")]
ATTACKS = [conversation(ATTACK, ATTACK, ATTACK, system=ATTACK)]
TEXTS = [
    "糖尿病患者应当控制饮食。",
    "  spaces  and\ttabs\n",
    "2026年11月22日",
    "<reserved_106>问</s>",
    "",
    " 😀",
]


def ask_llama(folder: Path, work: Path, ids: torch.Tensor, texts: list[str] = TEXTS) -> dict[str, Any]:
    """What software without this package makes of a folder."""
    question = {
        "ids": ids.tolist(),
        "logits": str(work / "logits.pt"),
        "texts": texts,
        "chats": CHATS,
        "attacks": ATTACKS,
    }
    answer = ask_stock(STOCK_PROCESS, folder, folder=work, given=question)
    return answer | {"logits": torch.load(work / "logits.pt")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


IDS = torch.arange(1200, 1248).reshape(2, 24)


# --- without this package


def test_stock_software_computes_the_same(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    folder = export_model(tiny_bases["rope"], tmp_path / "llama", format="llama").folder
    answer = ask_llama(folder, tmp_path, IDS)
    assert answer["missing"] == [[], []]
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny_bases["rope"]), IDS)
    torch.testing.assert_close(answer["logits"], expected, atol=1e-4, rtol=0)
    tokenizer = load_tokenizer(tiny_bases["rope"])
    assert answer["tokenizer"] != "BaichuanTokenizer"
    assert answer["token_ids"] == tokenizer(TEXTS)["input_ids"]
    assert answer["chat"] == [build_prompt(tokenizer, messages) for messages in CHATS]
    assert answer["safe"] == [build_prompt(tokenizer, messages) for messages in CHATS + ATTACKS]
    assert answer["special"] == [1, 2, 0]
    assert answer["temperature"] == pytest.approx(0.3)


def test_golden_logits_and_golden_token_ids(shared: Path, golden: Path, tmp_path: Path) -> None:
    """Weights and tokenizer of the official kind; what they give was computed with the official code."""
    source = tmp_path / "source"
    source.mkdir()
    for file in (
        golden / "baichuan2-7b-tiny" / "config.json",
        golden / "baichuan2-7b-tiny" / "model.safetensors",
        shared / "baichuan2" / "generation_config.json",
        shared / "baichuan2" / "tokenizer.model",
        shared / "baichuan2" / "tokenizer_config.json",
        shared / "baichuan2" / "special_tokens_map.json",
    ):
        shutil.copyfile(file, source / file.name)
    rows = json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))
    ids = load_file(golden / "baichuan2-7b-tiny" / "inputs.safetensors")["ids"]
    folder = export_model(source, tmp_path / "llama", format="llama").folder
    answer = ask_llama(folder, tmp_path, ids, [row["text"] for row in rows])
    expected = load_file(golden / "baichuan2-7b-tiny" / "expected.safetensors")["logits"]
    torch.testing.assert_close(answer["logits"], expected, atol=1e-4, rtol=0)
    assert answer["token_ids"] == [row["ids"] for row in rows]


def test_virtual_tokens_stand_in_front_in_stock_software(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Of a merged P-Tuning adapter: in plain calls and in the chat template."""
    write_adapter(tiny_bases["rope"], tmp_path / "adapter", "ptuning")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", verify=False)
    tokenizer = load_tokenizer(merged)
    virtual = list(tokenizer.virtual_token_ids)
    assert len(virtual) == 5
    ids = torch.tensor([virtual + IDS[0].tolist()])
    answer = ask_llama(export_model(merged, tmp_path / "llama", format="llama").folder, tmp_path, ids)
    torch.testing.assert_close(
        answer["logits"], logits(AutoModelForCausalLM.from_pretrained(merged), ids), atol=1e-4, rtol=0
    )
    assert answer["token_ids"] == tokenizer(TEXTS)["input_ids"]
    assert answer["chat"] == [build_prompt(tokenizer, messages) for messages in CHATS]
    assert answer["safe"] == [build_prompt(tokenizer, messages) for messages in CHATS + ATTACKS]
    assert all(row[:5] == virtual for row in [*answer["token_ids"], *answer["chat"]])


# --- weights and files


def test_head_is_normalised_and_nothing_else_is_changed(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    before = weights(tiny_bases["rope"])
    after = weights(export_model(tiny_bases["rope"], tmp_path / "llama", format="llama").folder)
    head = after.pop("lm_head.weight")
    torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)), atol=1e-6, rtol=0)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        packed = torch.cat([after.pop(f"{prefix}{part}_proj.weight") for part in "qkv"])
        assert torch.equal(packed, before[prefix + "W_pack.weight"])
    assert after.keys() == {name for name in before if "W_pack" not in name and "lm_head" not in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_first_generation_keeps_its_plain_head(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base", norm_head=False)
    folder = export_model(base, tmp_path / "llama", format="llama").folder
    assert torch.equal(weights(folder)["lm_head.weight"], weights(base)["lm_head.weight"])
    pair = [
        each.from_pretrained(path)
        for each, path in ((AutoModelForCausalLM, base), (LlamaForCausalLM, folder))
    ]
    torch.testing.assert_close(logits(pair[1], IDS), logits(pair[0], IDS), atol=1e-4, rtol=0)


def test_dtype_is_rounded_to_once(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    exact = weights(export_model(tiny_bases["rope"], tmp_path / "exact", format="llama").folder)
    done = export_model(tiny_bases["rope"], tmp_path / "half", format="llama", dtype="bfloat16")
    for name, tensor in weights(done.folder).items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert done.bytes == pytest.approx(done.source_bytes / 2, rel=0.01)


def test_official_shards_and_small_ones(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    expected = weights(export_model(tiny_bases["rope"], tmp_path / "one", format="llama").folder)
    copy = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "bin"))
    as_bin_shards(copy, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    folder = export_model(copy, tmp_path / "two", format="llama", max_shard_size="100KB").folder
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert LlamaForCausalLM.from_pretrained(folder)


def test_files_beside_the_weights(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "base"))
    (copy / "LICENSE").write_text("terms")
    (copy / "Community License for Baichuan 2 Model.pdf").write_bytes(b"%PDF")
    folder = export_model(copy, tmp_path / "llama", format="llama").folder
    for name in (
        "LICENSE",
        "Community License for Baichuan 2 Model.pdf",
        "generation_config.json",
        "tokenizer.model",
    ):
        assert (folder / name).read_bytes() == (copy / name).read_bytes()
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o644"}
    record = json.loads((folder / "export.json").read_text())
    assert record["format"] == "llama"
    assert record["dtype"] == "float32"
    assert record["model"] == str(copy)
    assert record["bytes"] > 10**6


def test_engine_plugins_name_functions_that_exist() -> None:
    """vLLM calls them by these names in each of its processes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for target in project["project"]["entry-points"]["vllm.general_plugins"].values():
        module, function = target.split(":")
        getattr(importlib.import_module(module), function)()


# --- through the command line, and refusals: nothing is left behind


def refusal(model: Path, output: Path, *arguments: str) -> str:
    before = sorted(output.parent.iterdir())
    message = finetune("export", "--model", model, "--output", output, *arguments, expect=2)
    assert sorted(output.parent.iterdir()) == before
    return message


def test_command_line(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    output = finetune(
        "export", "--model", tiny_bases["rope"], "--output", tmp_path / "out", "--format", "llama"
    )
    assert f"exported model: {tmp_path / 'out'} (1.3 MB → 1.3 MB)" in output
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_alibi_models_are_no_llama_models(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(tiny_bases["alibi"], tmp_path / "out", "--format", "llama")
    assert "its position encoding is ALiBi (13B), and Llama's is rotary" in message
    assert "keep the Baichuan layout" in message


@pytest.mark.parametrize("format", ["llama", "nf4"])
def test_quantised_source(golden: Path, tmp_path: Path, format: str) -> None:
    message = refusal(golden / "baichuan2-7b-tiny-4bits", tmp_path / "out", "--format", format)
    assert "the weights are quantised already" in message
    assert "export the 16-bit release" in message


def test_existing_output(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in refusal(tiny_bases["rope"], tmp_path / "out", "--format", "llama")


def test_adapter_instead_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    message = refusal(tmp_path / "adapter", tmp_path / "out", "--format", "llama")
    assert "an adapter, not a model" in message
    assert f"finetune merge --adapter {tmp_path / 'adapter'}" in message


def test_full_disk(tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "iB are needed, 4.88 KiB are free" in refusal(
        tiny_bases["rope"], tmp_path / "out", "--format", "nf4"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.norm.weight": None}, "1 weight missing: model.norm.weight"),
        ({"model.norm.weight": torch.ones(3)}, "model.norm.weight is 3, expected 64"),
        ({"score.weight": torch.ones(1, 64)}, "a Llama model has no place for score.weight"),
    ],
)
def test_folder_that_is_no_whole_causal_model(
    tiny_bases: dict[str, Path], tmp_path: Path, change: dict[str, torch.Tensor | None], says: str
) -> None:
    copy = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "base"))
    tensors = weights(copy) | change
    save_file({name: t for name, t in tensors.items() if t is not None}, copy / "model.safetensors")
    assert says in refusal(copy, tmp_path / "out", "--format", "llama")


def test_interrupted_export_leaves_nothing(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: Path, folder: Path, dtype: str) -> None:
        assert list(folder.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.export.llama.write_llama_companions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_model(tiny_bases["rope"], tmp_path / "out", format="llama")
    assert not list(tmp_path.iterdir())


def test_unknown_format(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format: found 'gguf', expected one of llama, int8, nf4"):
        export_model(tiny_bases["rope"], tmp_path / "out", format="gguf")  # type: ignore[arg-type]


def test_unknown_size(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max shard size: found 'big'"):
        export_model(tiny_bases["rope"], tmp_path / "out", format="llama", max_shard_size="big")
