"""Prompts answered before and after: scores, file, terminal table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from finetune.report import (
    Sample,
    mean_scores,
    print_samples_table,
    read_samples,
    score_samples,
    write_samples,
)
from finetune.report.page import metric_rows


@pytest.fixture
def samples() -> list[Sample]:
    ask = [{"role": "user", "content": "头痛怎么办？"}]
    return [
        Sample(ask, "多喝水，休息。", "头头头头", "多喝水。"),
        Sample(ask, "多喝水，休息。", "不知道", "多喝水，休息！"),
    ]


def test_samples_are_scored_where_answered(samples: list[Sample]) -> None:
    samples.append(Sample([{"role": "user", "content": "?"}], "水", before="水"))
    assert score_samples(samples) is samples
    assert samples[0].scores["char_f1_after"] == pytest.approx(0.75)
    assert samples[1].scores["rouge_l_after"] == 1.0
    assert samples[0].scores["distinct_2_before"] == pytest.approx(1 / 3)
    assert set(samples[2].scores) == {"char_f1_before", "rouge_l_before", "distinct_2_before"}
    means = mean_scores(samples)
    assert means["char_f1_before"] == pytest.approx(1 / 3)
    assert means["char_f1_after"] == pytest.approx(0.875)
    assert mean_scores([]) == {}
    assert metric_rows(samples)[0] == ["Character F1", "0.333", "0.875", "+0.542"]


def test_samples_survive_the_file(tmp_path: Path, samples: list[Sample]) -> None:
    score_samples(samples)
    samples.append(
        Sample([{"role": "system", "content": "简短"}, {"role": "user", "content": "水\n?"}], "好")
    )
    path = write_samples(tmp_path, samples)
    assert read_samples(tmp_path) == samples
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert list(first)[:4] == ["messages", "reference", "before", "after"]
    assert first["char_f1_after"] == pytest.approx(0.75)
    assert read_samples(tmp_path / "elsewhere") == []


def test_samples_table(samples: list[Sample]) -> None:
    from rich.console import Console

    samples[0].after = "[bold]多喝水[/bold]\x1b[31m" + "很长" * 80
    score_samples(samples)
    output = io.StringIO()
    print_samples_table(samples, Console(file=output, width=140, color_system=None))
    printed = output.getvalue()
    assert "[bold]" in printed
    assert "\x1b" not in printed
    assert "…" in printed
    assert "mean of 2" in printed
    assert f"{mean_scores(samples)['char_f1_after']:.2f}" in printed
    assert printed.count("很长") > 15, "Chinese text folds, not cut at the first line's end"
    assert "turn" not in printed
    samples[0].messages = [
        *samples[0].messages,
        {"role": "assistant", "content": "休息。"},
        *samples[0].messages,
    ]
    print_samples_table(samples, Console(file=output, width=140, color_system=None))
    assert output.getvalue().removeprefix(printed).count("(turn 2) 头痛怎么办？") == 1
    printed = output.getvalue()
    print_samples_table([], Console(file=output, width=140))
    assert output.getvalue() == printed
