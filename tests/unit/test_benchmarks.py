"""What the benchmarks compare with computes the same, and they start where the package is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_naive_model_computes_the_same_with_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from models import make_naive

    ids = torch.arange(1, 41).view(2, 20)
    model = tiny_model("alibi")
    made = []
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        naive = make_naive(model)
        fill = torch.Tensor.masked_fill
        monkeypatch.setattr(torch.Tensor, "masked_fill", lambda *args: made.append(args) or fill(*args))
        for _ in range(2):
            torch.testing.assert_close(naive(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert len([args for args in made if args[0].ndim == 3]) == 1


@pytest.mark.parametrize("name", ["train_step", "ppo_step", "merge_memory"])
def test_benchmarks_find_the_package(tmp_path: Path, name: str) -> None:
    """From any folder, as `python benchmarks/NAME.py`: without an installed package, without PYTHONPATH."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import {name}; import finetune"
    done = subprocess.run(
        [sys.executable, "-E", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
