"""The peak memory of a run is its own, not that of what ran before it in the same process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_stage import call, fake_stage

from finetune.train.peak import peak_memory_bytes, reset_peak_memory

SIZE = 300 << 20


@pytest.fixture
def can_reset() -> None:
    """Some systems do not let a process do it: there the peak is the process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not reset a process's peak memory")


def use_memory() -> None:
    held = bytearray(SIZE)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])  # touches every page


@pytest.mark.usefixtures("can_reset", "no_gpu")
def test_each_step_of_a_pipeline_tells_its_own_peak(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {}

    def stage(recipe: Any, **_: Any) -> Path:
        before = peak_memory_bytes()
        if recipe.name == "large":
            use_memory()
        peaks[recipe.name] = peak_memory_bytes()
        assert (peaks[recipe.name] - before > SIZE // 2) is (recipe.name == "large")
        return Path(recipe.output_dir)

    fake_stage(monkeypatch, stage)
    text = Path(recipe).read_text()
    for name in ("large", "small"):
        Path(f"{name}.yaml").write_text(text)
    Path("both.yaml").write_text("pipeline: [large.yaml, small.yaml]\n")
    result = call("run", "both.yaml")
    assert result.exit_code == 0, result.output
    assert peaks["large"] - peaks["small"] > SIZE // 2


@pytest.mark.usefixtures("no_gpu")
def test_where_the_system_says_nothing_the_peak_is_the_process_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("finetune.train.peak._STATUS", tmp_path / "absent")
    monkeypatch.setattr("finetune.train.peak._CLEAR_REFS", tmp_path / "absent" / "too")
    reset_peak_memory()
    scale = 1 if sys.platform == "darwin" else 1024
    assert peak_memory_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
