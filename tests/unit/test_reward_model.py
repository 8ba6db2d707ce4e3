"""The reward model: where a score is read, packing, and the adapter folder that brings it back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_model
from tiny_run import finetune

from finetune.adapters.build import attach_adapter, save_adapter
from finetune.baichuan import BaichuanForSequenceClassification
from finetune.baichuan.load import Base, load_tokenizer
from finetune.data.collate import Collator
from finetune.errors import UserError
from finetune.recipe.schema import Adapter
from rlhf.reward.adapter import RewardInfo, check_fits, load_reward, read_info, save_head, vocabulary_digest
from rlhf.reward.model import GroupCollator, RewardModel, first_fit

ITEMS = [
    {"input_ids": [[195, 300, 196, 400, 2], [195, 300, 196, 401, 402, 403, 2]], "levels": [2.0, 1.0], "graded": True},
    {"input_ids": [[195, 301, 302, 196, 2], [195, 301, 302, 196, 9, 2], [195, 301, 302, 196, 7, 8, 9]],
     "levels": [3.0, 2.0, 2.0], "graded": True},
]  # fmt: skip
INFO = RewardInfo("tiny", "digest", 0.5, 2.0, 10, 0.8, 64)


def reward_model(encoding: str = "rope", **changes: Any) -> RewardModel:
    """A model whose adapter and head change something."""
    base = tiny_model(encoding, **changes)
    body = attach_adapter(base, Adapter(rank=4, dropout=0.0), Base("tiny", Path(), "tiny"))
    model = RewardModel(body).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def scores_of(model: RewardModel, pack_to: int | None) -> torch.Tensor:
    batch = GroupCollator(Collator(0), pack_to)(ITEMS)
    keys = ("input_ids", "ends", "attention_mask", "position_ids")
    return model(**{key: batch[key] for key in keys if key in batch})


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_packed_padded_and_alone_are_the_same(encoding: str) -> None:
    model = reward_model(encoding)
    alone = []
    for item in ITEMS:
        for ids in item["input_ids"]:
            ends = (torch.tensor([0]), torch.tensor([len(ids) - 1]))
            with torch.no_grad():
                alone.append(model(torch.tensor([ids]), ends).item())
    assert len({round(score, 3) for score in alone}) == 5
    for pack_to in (None, 7, 12, 64):
        torch.testing.assert_close(scores_of(model, pack_to).tolist(), alone, rtol=1e-4, atol=1e-5)


def test_equals_the_classification_model() -> None:
    """The official way to read a score: `BaichuanForSequenceClassification` on the merged weights."""
    model = reward_model()
    merged = model.body.merge_and_unload()
    classifier = BaichuanForSequenceClassification(
        merged.config.__class__(**{**merged.config.to_dict(), "num_labels": 1})
    )
    classifier.model.load_state_dict(merged.model.state_dict())
    classifier.score.weight.data = model.head.weight.data[None]
    batch = GroupCollator(Collator(0), None)(ITEMS)
    with torch.no_grad():
        expected = classifier.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, 0]
    torch.testing.assert_close(scores_of(reward_model(), 16), expected, rtol=1e-4, atol=1e-5)


def test_a_new_head_scores_everything_zero() -> None:
    model = RewardModel(attach_adapter(tiny_model(), Adapter(rank=4), Base("tiny", Path(), "tiny")))
    assert scores_of(model, None).tolist() == [0.0] * 5


def test_groups_stay_whole_and_prompts_are_counted() -> None:
    batch = GroupCollator(Collator(0), 12)(ITEMS)
    assert batch["group_sizes"] == [2, 3]
    assert batch["levels"].tolist() == [2.0, 1.0, 3.0, 2.0, 2.0]
    assert batch["labels"].tolist() == [0, 0]
    rows, columns = batch["ends"]
    last = [ids[-1] for item in ITEMS for ids in item["input_ids"]]
    assert batch["input_ids"][rows, columns].tolist() == last
    assert len(batch["input_ids"]) == 3  # 30 tokens in rows of 12


def test_first_fit_fills_bins() -> None:
    lengths = [5, 9, 3, 7, 2, 12]
    bins = first_fit(lengths, 10)
    assert sorted(item for members in bins for item in members) == list(range(6))
    assert all(sum(lengths[item] for item in members) <= 10 or members == [5] for members in bins)
    assert len(bins) == 4


# --- the adapter folder -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = reward_model()
    save_adapter(model.body, tmp_path / "adapter")
    save_head(tmp_path / "adapter", model.head, INFO)
    return tmp_path / "adapter"


def test_a_saved_reward_model_scores_the_same(folder: Path) -> None:
    loaded = load_reward(folder, tiny_model())
    assert loaded.info == INFO
    again = RewardModel(loaded.model, loaded.head).eval()
    torch.testing.assert_close(scores_of(again, 16), scores_of(reward_model(), 16))
    assert not any(parameter.requires_grad for parameter in loaded.head.parameters())


def test_it_joins_other_adapters_on_a_base(folder: Path) -> None:
    body = attach_adapter(tiny_model(), Adapter(rank=2), Base("tiny", Path(), "tiny"))
    loaded = load_reward(folder, body, name="helpful")
    assert set(body.peft_config) == {"default", "helpful"}
    assert body.active_adapter == "default"
    body.set_adapter("helpful")
    again = RewardModel(loaded.model, loaded.head).eval()
    torch.testing.assert_close(scores_of(again, None), scores_of(reward_model(), None))


def test_another_base_or_tokenizer_is_refused(tiny_bases: dict[str, Path], folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_bases["rope"])
    info = replace(INFO, base="baichuan-inc/Baichuan2-7B-Chat", vocabulary=vocabulary_digest(tokenizer))
    local = Base("/models/Baichuan2-7B-Chat", Path(), "/models/Baichuan2-7B-Chat")
    check_fits(folder, info, base=local, tokenizer=tokenizer)
    with pytest.raises(
        UserError, match=r"trained on baichuan-inc/Baichuan2-7B-Chat, and nothing says that other is the same"
    ):
        check_fits(folder, info, base=Base("other", Path(), "other"))
    with pytest.raises(UserError, match="another tokenizer than the one here"):
        check_fits(folder, INFO, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"head has shape \(64,\).*32 values"):
        load_reward(folder, tiny_model(hidden_size=32))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("reward.json", None, "an adapter without reward.json, so not a reward model"),
        ("reward.json", "{", "reward.json: not readable"),
        ("reward.json", json.dumps({"base": "x"}), "reward.json: not readable"),
        ("reward.json", json.dumps(vars(replace(INFO, std=0.0))), "cannot normalise scores"),
        ("score.safetensors", None, "no score.safetensors"),
        ("score.safetensors", "no tensor", "score.safetensors"),
        ("adapter_config.json", None, "no adapter_config.json"),
    ],
)
def test_damaged_folders(folder: Path, name: str, content: str | None, message: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_reward(folder, tiny_model())


def test_merged_it_is_a_sequence_classifier(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from finetune.adapters import merge_adapter
    from finetune.baichuan.load import load_model, resolve_base
    from finetune.recipe.schema import Model

    base = resolve_base(str(tiny_bases["rope"]))
    body = attach_adapter(load_model(Model(base=base.name), base), Adapter(rank=4, dropout=0.0), base)
    model = RewardModel(body).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    save_adapter(body, tmp_path / "adapter")
    save_head(tmp_path / "adapter", model.head, INFO)
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    classifier, loading = AutoModelForSequenceClassification.from_pretrained(
        merged, dtype="float32", output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = GroupCollator(Collator(0), None)(ITEMS)
    with torch.no_grad():
        found = classifier.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(found.logits[:, 0], scores_of(model, None), rtol=1e-3, atol=1e-3)
    assert json.loads((merged / "reward.json").read_text(encoding="utf-8"))["mean"] == INFO.mean
    with pytest.raises(UserError, match="Llama's layout has no scalar head"):
        merge_adapter(tmp_path / "adapter", tmp_path / "llama", format="llama")


def test_a_reward_model_is_told_from_a_language_model(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Merged it is one still, which is said, and nobody takes it, or its adapter, for something that talks."""
    from test_ppo_parts import write_reward

    adapter, merged = write_reward(tmp_path / "adapter", tiny_bases["rope"]), tmp_path / "merged"
    output = finetune("merge", "--adapter", adapter, "--output", merged, "--no-verify")
    assert "this adapter is a reward model: merged, it is a classifier with one score" in output
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"stage: merge\nmerge: {{adapter: {adapter}}}\noutput_dir: {tmp_path / 'other'}\n")
    assert "this adapter is a reward model" in finetune("check", recipe)
    for command in (
        ["chat", "--prompt", "你好"],
        ["export", "--output", tmp_path / "out", "--format", "llama"],
    ):
        output = finetune(*command, "--model", merged, expect=2)
        assert "a reward model, which scores conversations and writes no text" in output
    talk = ("chat", "--prompt", "你好", "--model", tiny_bases["rope"])
    assert "the adapter of a reward model" in finetune(*talk, "--adapter", adapter, expect=2)


@pytest.mark.parametrize("left", ["reward.json", "training.json"])
def test_a_reward_model_without_its_head_is_not_merged(
    tiny_bases: dict[str, Path], tmp_path: Path, left: str
) -> None:
    from test_ppo_parts import write_reward

    from finetune.adapters.training_note import write_training_note

    adapter = write_reward(tmp_path / "adapter", tiny_bases["rope"])
    (adapter / "score.safetensors").unlink()
    if left == "training.json":
        (adapter / "reward.json").unlink()
        write_training_note(adapter, stage="reward")
    output = finetune("merge", "--adapter", adapter, "--output", tmp_path / "headless", expect=2)
    assert "a reward model without its head: no score.safetensors" in output
    assert not (tmp_path / "headless").exists()


def test_info_comes_back(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert read_info(tmp_path / "copy") == INFO
