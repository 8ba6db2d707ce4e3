"""What official configs leave unsaid is inferred once and written; what is said wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_model import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.baichuan import BaichuanConfig, BaichuanForCausalLM
from finetune.baichuan.head import UnitRowHead


def official(shared: Path, size: str) -> dict[str, Any]:
    return json.loads((shared / "baichuan2" / size / "config.json").read_text(encoding="utf-8"))


def first_generation(size: str) -> dict[str, Any]:
    """As released in 2023: Baichuan-7B spells its class differently, Baichuan-13B is ALiBi."""
    common = {"model_type": "baichuan", "vocab_size": 64_000, "auto_map": {"AutoConfig": "x.Y"}}
    if size == "7b":
        return {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 4096, **common}
    return {"architectures": ["BaichuanForCausalLM"], "model_max_length": 4096, **common}


@pytest.mark.parametrize(("size", "encoding", "heads"), [("7b", "rope", 32), ("13b", "alibi", 40)])
def test_official_configs(shared: Path, tmp_path: Path, size: str, encoding: str, heads: int) -> None:
    config = AutoConfig.from_pretrained(shared / "baichuan2" / size, trust_remote_code=False)
    assert type(config) is BaichuanConfig
    assert (config.position_embedding, config.norm_head) == (encoding, True)
    assert (config.num_attention_heads, config.head_dim, config.vocab_size) == (heads, 128, 125_696)
    assert (config.model_max_length, config.max_position_embeddings) == (4096, 4096)
    assert config.dtype == torch.bfloat16
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (written["position_embedding"], written["norm_head"]) == (encoding, True)
    assert "auto_map" not in written
    again = BaichuanConfig.from_dict(written)
    again.name_or_path = config.name_or_path
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(("size", "encoding"), [("7b", "rope"), ("13b", "alibi")])
def test_first_generation_configs(tmp_path: Path, size: str, encoding: str) -> None:
    config = BaichuanConfig.from_dict(first_generation(size))
    assert (config.position_embedding, config.norm_head) == (encoding, False)
    config.save_pretrained(tmp_path)
    again = BaichuanConfig.from_pretrained(tmp_path)
    assert (again.position_embedding, again.norm_head) == (encoding, False)


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("norm_head", [True, False])
@pytest.mark.parametrize("vocab_size", [64_000, 125_696])
def test_explicit_values_win_and_survive_a_round_trip(
    tmp_path: Path, encoding: str, norm_head: bool, vocab_size: int
) -> None:
    raw = {
        "model_type": "baichuan",
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "position_embedding": encoding,
        "norm_head": norm_head,
        "z_loss_weight": 2e-4,
    }
    config = BaichuanConfig.from_dict(raw)
    config.save_pretrained(tmp_path)
    for each in (
        config,
        BaichuanConfig.from_pretrained(tmp_path),
        BaichuanConfig.from_dict(config.to_dict()),
    ):
        assert (each.position_embedding, each.norm_head, each.z_loss_weight) == (encoding, norm_head, 2e-4)


def test_from_dict_leaves_its_argument_alone() -> None:
    raw = first_generation("13b")
    before = dict(raw)
    BaichuanConfig.from_dict(raw)
    assert raw == before


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 66}, {"tie_word_embeddings": True}, {"position_embedding": "learned"}]
)
def test_impossible_shapes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StrictDataclassError, match=r"hidden_size|tie|position_embedding"):
        tiny_config(**changes)


def test_whole_numbers_stand_for_fractions() -> None:
    """``"z_loss_weight": 0`` is how the released configs write it."""
    config = BaichuanConfig.from_dict({"model_type": "baichuan", "z_loss_weight": 0, "rope_theta": 10000})
    assert config.z_loss_weight == 0


def test_first_generation_models_load_with_a_plain_head(tmp_path: Path) -> None:
    """Both spellings of the class; the head is not normalised, so its scale shows in the logits."""
    for size in ("7b", "13b"):
        folder = tmp_path / size
        shapes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        raw = {**first_generation(size), **shapes, "num_attention_heads": 2}
        model = BaichuanForCausalLM(BaichuanConfig.from_dict(raw)).eval()
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(raw))  # as released
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        assert type(loaded) is BaichuanForCausalLM
        assert not isinstance(loaded.lm_head, UnitRowHead)
        assert hasattr(loaded.model, "rotary_emb" if size == "7b" else "alibi")
        ids = torch.tensor([[5, 9, 2000]])
        with torch.no_grad():
            logits = loaded(ids).logits
            assert torch.equal(logits, model(ids).logits)
            loaded.lm_head.weight.mul_(2)
            torch.testing.assert_close(loaded(ids).logits, 2 * logits)


def test_dictionary_of_a_resolved_base_names_what_the_config_leaves_out(shared: Path) -> None:
    """What the memory prediction reads."""
    from finetune.baichuan.load import Base

    base = Base("x", shared / "baichuan2" / "13b", "x")
    assert base.config["position_embedding"] == "alibi"
    assert not base.quantized
