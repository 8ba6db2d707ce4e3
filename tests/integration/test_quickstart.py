"""The main job as the README shows it, on the nano: it learns, answers better, merges, and talks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def finetune(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    done = finetune("run", "recipes/qlora_medical.yaml", "model.base=baichuan2-nano", f"output_dir={folder}")
    assert "report.html" in done.stdout
    return folder


def test_it_learns(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["eval_loss_after"] <= 0.6 * result["eval_loss_before"]


def test_answers_get_better(run: Path) -> None:
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) >= 8
    before = sum(sample["char_f1_before"] for sample in samples)
    after = sum(sample["char_f1_after"] for sample in samples)
    assert after >= 2 * before


def test_adapter_and_merged_folder_answer_alike(run: Path, tmp_path: Path) -> None:
    """Onto what training saw, as chat holds the base by itself; onto the original, as when told to."""
    folders = {onto: tmp_path / onto for onto in ("dequantized", "original")}
    for onto, folder in folders.items():
        finetune("merge", "--adapter", str(run / "adapter"), "--output", str(folder), "--onto", onto)
    talk = ["--prompt", "感冒了要注意什么？", "--greedy", "--max-new-tokens", "60"]
    base = finetune("chat", "--model", "baichuan2-nano", *talk).stdout
    with_adapter = ["--model", "baichuan2-nano", "--adapter", str(run / "adapter")]
    adapted = finetune("chat", *with_adapter, *talk).stdout
    assert finetune("chat", "--model", str(folders["dequantized"]), *talk).stdout == adapted != base
    assert adapted.strip()
    plain = finetune("chat", *with_adapter, "--quantization", "none", *talk).stdout
    assert finetune("chat", "--model", str(folders["original"]), *talk).stdout == plain != base


def test_the_nano_has_the_official_layout_of_special_ids() -> None:
    from finetune.baichuan.load import load_tokenizer
    from finetune.baichuan.nano import ensure_nano

    tokenizer = load_tokenizer(ensure_nano("baichuan2-nano"))
    pieces = tokenizer.convert_ids_to_tokens([0, 1, 2, 5, 195, 196, 1088, 1089, 1344])
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:] == ["\n", "<reserved_106>", "<reserved_107>", "<reserved_999>", "<0x00>", "<0xFF>"]


def test_the_nano_is_the_same_whenever_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    from finetune.baichuan import nano

    monkeypatch.setattr(nano, "STEPS", 3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        nano.build_nano(tmp_path / name, name, "alibi")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all((first[key] == second[key]).all() for key in first)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (
        tmp_path / "b" / "tokenizer.json"
    ).read_bytes()
