"""The main job as the README shows it, on the nano: it learns, answers better, merges, and talks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from finetune.report import mean_scores, read_samples

ROOT = Path(__file__).resolve().parents[2]
TALK = ("--prompt", "感冒了要注意什么？", "--greedy", "--max-new-tokens", "60")
SHORT = ("train.epochs=4", "report.samples=8")
"""Less than a third of the training, in which the model learns as surely, if not as much."""


def finetune(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, as from a shell."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def quickstart(folder: Path, *overrides: str) -> Path:
    """The run of `make quickstart`."""
    recipe = ("recipes/qlora_medical.yaml", "model.base=baichuan2-nano")
    done = finetune("run", *recipe, f"output_dir={folder}", *overrides)
    assert "report.html" in done.stdout
    return folder


def learned(run: Path) -> tuple[float, float, float]:
    """Validation loss after as a share of before; mean character F1 before and after."""
    result = json.loads((run / "result.json").read_text())
    means = mean_scores(read_samples(run))
    share = result["eval_loss_after"] / result["eval_loss_before"]
    return share, means["char_f1_before"], means["char_f1_after"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quickstart(tmp_path_factory.mktemp("quickstart") / "run", *SHORT)


def test_it_learns_and_answers_get_better(run: Path) -> None:
    share, before, after = learned(run)
    assert share <= 0.6
    assert after >= 2 * before


@pytest.mark.slow
def test_the_whole_quickstart_learns_what_the_readme_says(tmp_path: Path) -> None:
    share, before, after = learned(quickstart(tmp_path / "run"))
    assert share <= 0.12
    assert before <= 0.1
    assert after >= 0.5


def test_adapter_and_merged_folder_answer_alike(run: Path, tmp_path: Path) -> None:
    """Onto what training saw, as chat holds the base by itself; onto the original, as when told to."""
    folders = {onto: tmp_path / onto for onto in ("dequantized", "original")}
    for onto, folder in folders.items():
        tiny_run.finetune("merge", "--adapter", run / "adapter", "--output", folder, "--onto", onto)

    def answer(*model: str | Path) -> str:
        return tiny_run.finetune("chat", "--model", *model, *TALK, notes=False)

    base = answer("baichuan2-nano")
    with_adapter = ("baichuan2-nano", "--adapter", run / "adapter")
    adapted = answer(*with_adapter)
    assert answer(folders["dequantized"]) == adapted != base
    assert adapted.strip()
    plain = answer(*with_adapter, "--quantization", "none")
    assert answer(folders["original"]) == plain != base


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
