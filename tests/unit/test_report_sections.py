"""Sections that stages add to the report: drawn from plain data, whatever it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fake_run import make_run

from finetune.recipe.schema import Step
from finetune.report import build_report
from finetune.report.curves import Line, charts, plain_chart
from finetune.report.headline import Card, cards
from finetune.report.pipeline_page import build_pipeline_page
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


MAP = {
    "title": "After",
    "columns": [["A", "law <i>"], ["all", "all areas"]],
    "rows": [
        ["roles", [{"share": 0.25, "text": "25", "detail": "1 of 4", "unjudged": 1}]],
        ["all", [{"share": None, "text": "", "detail": "nothing asked", "unjudged": 0}]],
    ],
}
LIST = {
    "title": "unsafe answers",
    "count": 3,
    "left_out": 2,
    "whole": "all.json",
    "items": [{"context": [], "prompt": "怎么办？<b>", "answer": "<script>y</script>", "about": "D.01"}],
}


def test_heat_maps_and_what_is_folded_away_on_both_pages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "chain" / "run")
    write_sections(
        run, [{**SECTION, "maps": [MAP], "aside": "In percent.", "lists": [LIST], "pipeline": True}]
    )
    step = Step.model_construct(name="run", stage="redteam", output_dir=str(run))
    for page in (build_report(run), build_pipeline_page(tmp_path / "chain", "chain", [step])):
        html = page.read_text(encoding="utf-8")
        assert 'style="--share:25%"' in html
        assert 'title="1 of 4"' in html
        assert "<b>A</b>law &lt;i&gt;" in html
        assert "In percent." in html
        assert "3 unsafe answers" in html
        assert "1 of them, from every area; all stand in all.json." in html
        assert "&lt;script&gt;y&lt;/script&gt;" in html
    write_sections(run, [SECTION])  # what does not say so stands on its own page only
    page = build_pipeline_page(tmp_path / "chain", "chain", [step])
    assert "Scores" not in page.read_text(encoding="utf-8")


def test_a_stage_names_its_cards_and_pages(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "chain" / "run",
        cards=[{"label": "Safe", "value": "80 %", "before": "5 %", "better": True}],
        pages=[{"name": "before and after", "file": "compare.html"}, {"name": "lost", "file": "lost.html"}],
    )
    (run / "compare.html").write_text("…", encoding="utf-8")
    assert cards(read_run(run))[0] == Card("Safe", "80 %", before="5 %", better=True)
    step = Step.model_construct(name="run", stage="redteam", output_dir=str(run))
    html = build_pipeline_page(tmp_path / "chain", "chain", [step]).read_text(encoding="utf-8")
    assert '<a href="run/compare.html">before and after</a>' in html
    assert "lost" not in html


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


def test_a_stage_has_words_for_its_numbers(tmp_path: Path) -> None:
    """Drawn first and in its order, shares in percent, nothing below 0 that cannot be; the others as they are."""
    run = make_run(tmp_path / "run")
    rows = [{"step": n, "loss": 1.0, "clip": 0.0, "kl": 2.0 + n, "other_one": 0.0} for n in (1, 2)]
    rows.append({"step": 2, "eval_kl": 3.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    described = [
        {"key": "clip", "title": "Tokens clipped", "share": True},
        {"key": "kl", "title": "KL, nats a response", "from_zero": True},
        {"key": "never_logged", "title": "Nothing"},
        "no description",
    ]
    write_sections(run, [], curves=described)  # type: ignore[arg-type]
    drawn = {chart.title: chart for chart in charts(read_run(run))}
    assert list(drawn) == ["Loss", "Tokens clipped", "KL, nats a response", "other one"]
    assert next(tick.label for tick in drawn["Tokens clipped"].y_ticks) == "0 %"
    assert [line.label for line in drawn["KL, nats a response"].lines] == ["training", "validation"]
    for title in ("Tokens clipped", "KL, nats a response", "other one"):
        assert drawn[title].readout["bounds"][2] == 0, title  # type: ignore[index]
