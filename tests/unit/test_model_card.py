"""The card that goes with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_run import RECIPE, RESULT

from finetune.report.model_card import licence, write_model_card


@pytest.fixture
def card_parts(tmp_path: Path) -> tuple[dict[str, Any], str]:
    info = {
        "recipe": {**RECIPE, "data": {**RECIPE["data"], "train": ["/home/someone/secret/train.jsonl"]}},
        "result": RESULT,
        "scores": {"char_f1_before": 0.2, "char_f1_after": 0.61},
        "sample_count": 8,
        "environment": {"packages": {"torch": "2.11.0", "peft": "0.21.0"}},
        "base_model": "baichuan-inc/Baichuan2-7B-Chat",
        "medical": True,
    }
    text = write_model_card(tmp_path, info).read_text(encoding="utf-8")
    _, front_matter, body = text.split("---\n", 2)
    return yaml.safe_load(front_matter), body


def test_model_card(card_parts: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    front_matter, body = card_parts
    assert front_matter["base_model"] == "baichuan-inc/Baichuan2-7B-Chat"
    assert front_matter["library_name"] == "peft"
    assert front_matter["language"] == ["zh"]
    assert (front_matter["license"], front_matter["license_name"]) == ("other", "baichuan2-community")
    assert {"baichuan2", "lora", "qlora"} <= set(front_matter["tags"])
    for expected in (
        "import finetune",
        'base = "baichuan-inc/Baichuan2-7B-Chat"',
        "| Validation loss | 4.812 | 1.934 |",
        "| Character F1 | 0.200 | 0.610 |",
        "8 sample answers",
        "torch 2.11.0, peft 0.21.0",
        "| `adapter.rank` | 64 |",
        "Community License",
        "no medical advice",
    ):
        assert expected in body, expected
    assert "/home/someone" not in body
    assert "train.jsonl" in body
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_model_card_loads_as_a_card(card_parts: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert card.data.license_name == "baichuan2-community"


def test_model_card_from_the_recipe_alone(tmp_path: Path) -> None:
    recipe = {"name": "a | b", "model": {"base": "/models/mine"}, "adapter": {"method": "prefix"}}
    text = write_model_card(tmp_path, {"recipe": recipe}).read_text(encoding="utf-8")
    assert "base_model" not in text.split("---\n")[1]
    assert "Prefix-tuning adapter for **mine**" in text
    assert "path/to/mine" in text
    assert "/models" not in text
    assert "Results" not in text
    assert "medical" not in text


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("baichuan2-7b-chat", "baichuan2-community"),
        ("baichuan-inc/Baichuan2-13B-Base", "baichuan2-community"),
        ("runs/pretrain_domain/merged", "baichuan2-community"),
        ("baichuan-inc/Baichuan-13B-Chat", "baichuan-community"),
        ("baichuan2-nano-alibi", None),
    ],
)
def test_licence_follows_the_base(base: str, name: str | None) -> None:
    assert licence(base).get("license_name") == name
    assert licence(base)["license"] == ("other" if name else "apache-2.0")
