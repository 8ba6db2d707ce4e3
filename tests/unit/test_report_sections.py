"""Sections that stages add to the report: drawn from plain data, whatever it says."""

from __future__ import annotations

import re
from pathlib import Path

from fake_run import make_run

from finetune.report import build_report
from finetune.report.curves import Line, plain_chart
from finetune.report.headline import cards
from finetune.report.run_folder import read_run
from finetune.report.sections import sections_of, write_sections

SECTION = {
    "title": "Scores",
    "text": "What <b>they</b> are.",
    "tables": [
        {"title": "By gap", "columns": ["gap", "accuracy"], "rows": [["1", "54.5%"], ["2", "<script>x</script>"]]}
    ],
    "charts": [
        {
            "title": "Accuracy by gap",
            "x": "gap",
            "lines": [
                {"label": "ours", "role": "train", "points": [[1, 0.5], [2.5, 0.75]]},
                {"label": "theirs", "role": "other", "points": [[1, 0.6], [2.5, 0.7]]},
            ],
        }
    ],
}  # fmt: skip


def test_a_section_is_drawn_and_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = build_report(run).read_text(encoding="utf-8")
    write_sections(run, [SECTION])
    page = build_report(run).read_text(encoding="utf-8")
    assert "<h2>Scores</h2>" in page
    assert "<h2>Scores</h2>" not in before
    assert "What &lt;b&gt;they&lt;/b&gt; are." in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert page.count("<figure") == before.count("<figure") + 1
    assert "Accuracy by gap by gap. ours: from 0.5 to 0.75 at gap 2.5." in page


def test_a_chart_over_something_else_than_steps() -> None:
    chart = plain_chart("Share", [Line("all", [(-1.5, 0.25), (0.0, 0.5), (1.5, 0.25)])], x_name="score")
    assert chart is not None
    assert chart.readout["x_name"] == "score"
    labels = [tick.label for tick in chart.x_ticks]
    assert len(labels) >= 3
    assert any(re.search(r"[.]5|1", label) for label in labels)
    assert plain_chart("Share", [Line("all", [(1.0, 1.0)])], x_name="score") is None


def test_accuracy_is_a_headline(tmp_path: Path) -> None:
    shown = {card.label: card for card in cards(read_run(make_run(tmp_path / "run", eval_accuracy=0.915)))}
    assert shown["Held-out accuracy"].value == "91.5 %"
    assert "Held-out accuracy" not in {card.label for card in cards(read_run(make_run(tmp_path / "plain")))}


def test_a_broken_file_costs_its_sections_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "sections.json").write_text("[", encoding="utf-8")
    assert sections_of(read_run(run).sections) == []
    assert "sections.json" in build_report(run).read_text(encoding="utf-8")
