"""The report, from run folders as runs leave them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from fake_run import DATA_REPORT, RECIPE, SAMPLES, make_run

from finetune.errors import UserError
from finetune.report import (
    Sample,
    build_report,
)
from finetune.report.curves import MAX_POINTS, charts, nice_ticks, smooth, thin
from finetune.report.data_summary import data_section
from finetune.report.files import read_jsonl
from finetune.report.headline import cards
from finetune.report.page import commands, notices, sample_cards
from finetune.report.run_folder import RunFolder, read_run


class Page(HTMLParser):
    """The text that a reader sees, the tags, and whether each was closed."""

    VOID = frozenset({"meta", "br", "link", "img", "path"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "qlora_medical")


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    return build_report(finished).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


# The whole report


def test_report_says_what_the_run_did(page: Page) -> None:
    for expected in (
        "qlora_medical",
        "finished",
        "baichuan2-nano · QLoRA (nf4) · supervised fine-tuning",
        "4.812→1.934",
        "−59.8 %",
        "best at step 200",
        "14.0 %",
        "1.18 M of 8.41 M parameters",
        "3 min 35 s",
        "240 steps · 12 epochs",
        "1.48 GiB",
        "predicted 1.57 GiB",
        "高血压患者平时吃饭要注意什么？",
        "3 bad rows",
        "examples/data/medical/train.jsonl:204",
        "not JSON: Expecting ',' delimiter (column 88)",
        "paged_adamw_8bit",
        "packages.transformers",
    ):
        assert expected in page.text, expected
    assert page.open == []


def test_report_is_one_file_that_asks_nobody_for_anything(html: str, page: Page) -> None:
    assert "://" not in html
    assert "@import" not in html
    assert "url(" not in html
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "href" in attrs]
    policy = next(attrs["content"] or "" for _, attrs in page.tags if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_what_the_model_says_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x1b[31m\x00"
    rows = [{**SAMPLES[0], "after": evil, "before": evil, "reference": evil}]
    rows[0]["messages"] = [{"role": evil, "content": evil}, {"role": "user", "content": evil}]
    (run / "samples.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    recipe = {**RECIPE, "name": evil, evil: evil}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    (run / "data_report.json").write_text(
        json.dumps({evil: evil, "bad_rows": [{"file": evil, "reason": evil}]})
    )
    lines = [{"step": i, f"x{evil}": i} for i in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = build_report(run).read_text(encoding="utf-8")
    page = Page(html)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert [attrs.get("type") for attrs in scripts] == ["application/json", None]
    assert "img" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;" in page.text
    assert "\x1b" not in html
    assert "\x00" not in html


def test_the_pages_script_is_the_one_the_policy_allows(html: str) -> None:
    import base64
    import hashlib

    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)
    assert script
    allowed = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{allowed}'" in html


@pytest.mark.parametrize(
    "missing",
    [
        ("samples.jsonl",),
        ("metrics.jsonl",),
        ("result.json",),
        ("data_report.json", "environment.json"),
        ("samples.jsonl", "metrics.jsonl", "result.json", "data_report.json", "environment.json"),
    ],
)
def test_missing_parts_are_left_out(tmp_path: Path, missing: tuple[str, ...]) -> None:
    page = Page(build_report(make_run(tmp_path, without=missing)).read_text(encoding="utf-8"))
    headings = {
        "samples.jsonl": "Answers before and after",
        "metrics.jsonl": "Curves",
        "environment.json": "Environment",
        "data_report.json": "bad rows",
    }
    for name, heading in headings.items():
        assert (heading in page.text) == (name not in missing)
    assert "Settings" in page.text


def test_interrupted_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, without=("samples.jsonl",), status="interrupted", eval_loss_after=None)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write('{"step": 241, "loss": 1.2')
    page = Page(build_report(run).read_text(encoding="utf-8"))
    assert "The run was interrupted; the numbers are those up to step 240." in page.text
    assert "--resume" in page.text
    assert "cannot be read" not in page.text, "a torn last line is nothing to report"


def test_broken_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "result.json").write_text('{"status": "fin')
    (run / "samples.jsonl").write_text('{"messages": 3}\n')
    page = Page(build_report(run).read_text(encoding="utf-8"))
    assert "result.json:1: not readable as JSON" in page.text
    assert "samples.jsonl:1: expected" in page.text
    assert "Curves" in page.text


def test_no_run_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        build_report(tmp_path / "runs" / "nothing")
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        build_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not readable as YAML"):
        build_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("- a")
    with pytest.raises(UserError, match="expected a recipe"):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_report_is_replaced_whole(finished: Path) -> None:
    (finished / "report.html").write_text("an older report", encoding="utf-8")
    path = build_report(str(finished))
    assert path == finished / "report.html"
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert not [p for p in finished.iterdir() if p.name.startswith(".")]


def test_reporting_needs_no_torch(finished: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['finetune']  # on the command line `import finetune` leaves transformers alone\n"
        "import finetune.report.model_card\n"
        "from finetune.report import build_report\n"
        "heavy = {'torch', 'transformers', 'datasets', 'evaluate', 'jinja2', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"build_report({str(finished)!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(root), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


# Its parts


def test_predicted_and_measured_stand_side_by_side(tmp_path: Path) -> None:
    shown = {card.label: card for card in cards(read_run(make_run(tmp_path)))}
    assert shown["Training time"].note.endswith("0.81 s a step (predicted 0.75 s)")
    assert shown["Peak memory"].note == "predicted 1.57 GiB"


def test_headline_falls_back_to_what_was_logged(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, without=("result.json", "samples.jsonl")))
    shown = {card.label: card for card in cards(run)}
    assert set(shown) == {"Validation loss", "Throughput", "Peak memory"}
    evaluations = [value for _, value in run.series("eval_loss")]
    assert shown["Validation loss"].before == f"{evaluations[0]:.3f}"
    assert shown["Validation loss"].value == f"{evaluations[-1]:.3f}"
    assert shown["Validation loss"].note == "since step 40"


def test_a_run_that_made_it_worse_is_not_praised(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, eval_loss_before=1.0, eval_loss_after=1.5))
    loss = cards(run)[0]
    assert (loss.change, loss.better) == ("+50.0 %", False)


def test_metrics_of_a_resumed_run_are_in_order_once(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    lines = [{"step": s, "loss": float(s)} for s in (10, 20, 30)] + [{"step": 20, "eval_loss": 2.0}]
    again = [{"step": s, "loss": 100.0 + s} for s in (20, 30, 40)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines + again))
    run = read_run(run_dir)
    assert run.series("loss") == [(10, 10.0), (20, 120.0), (30, 130.0), (40, 140.0)]
    assert run.series("eval_loss") == [(20, 2.0)]


def test_loss_that_is_not_a_number_is_told_and_not_drawn(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(run_dir)
    assert run.series("loss") == [(1, 2.0), (3, 1.0)]
    assert "The loss was not a finite number at step 2." in notices(run)
    assert "nan" not in build_report(run_dir).read_text(encoding="utf-8").lower().split("<style>")[0]


def test_charts_fit_their_frame(finished: Path) -> None:
    drawn = charts(read_run(finished))
    assert [chart.title for chart in drawn] == [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput, tokens/s",
    ]
    for chart in drawn:
        for line in chart.lines:
            corners = [float(n) for n in re.findall(r"[\d.]+", line.path)]
            assert len(corners) == 2 * len(line.points)
            assert all(0 <= n <= 1000 for n in corners)
        assert all(0 <= tick.position <= 100 for tick in [*chart.x_ticks, *chart.y_ticks])
        assert len(chart.x_ticks) >= 2
    validation = drawn[0].lines[-1]
    assert validation.points[0] == (0, 4.812), "the base's own loss is where the curve starts"


def test_other_stages_numbers_get_charts_too() -> None:
    rows = [
        {"step": s, "epoch": s / 9, "rewards/accuracies": s / 9, "eval_rewards/accuracies": s / 8}
        for s in (1, 2)
    ]
    rows += [{"step": 3, "eval_runtime": 2.0}, {"step": 4, "eval_runtime": 2.0}]
    drawn = charts(RunFolder(Path("x"), {}, metrics=rows))
    assert [chart.title for chart in drawn] == ["rewards: accuracies"]
    assert [line.role for line in drawn[0].lines] == ["train", "validation"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.013, 0.87), (1.2e-7, 2e-4), (3, 3), (0, 0), (-5, 12), (1e6, 7e9)]
)
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - abs(high) * 1e-9
    assert 2 <= len(ticks) <= 8
    assert nice_ticks(0, 3, whole=True) == [0, 1, 2, 3]


def test_smoothing_keeps_ends_and_straight_lines() -> None:
    straight = [(i, 2.0 * i) for i in range(100)]
    assert smooth(straight) == straight
    noisy = [(i, float(i % 2)) for i in range(100)]
    assert all(abs(value - 0.5) < 0.1 for _, value in smooth(noisy)[10:-10])


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(i, 1.0) for i in range(50_000)]
    points[31_234] = (31_234, 99.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS + 2
    assert {points[0], points[-1], (31_234, 99.0)} <= set(kept)
    assert kept == sorted(kept)


def test_data_summary() -> None:
    section = data_section(DATA_REPORT)
    sets, files, categories = section.tables
    assert categories.rows == [["2.03 医疗健康 health", "315", "315"]]
    assert files.columns.count("sampled") == 1
    assert section.near_duplicates == [("train.jsonl:9", "nearly repeats train.jsonl:4")]
    assert sets.columns[:4] == ["", "rows", "documents", "tokens"]
    assert sets.rows[0] == [
        "train",
        "25",
        "315",
        "48,211",
        "31",
        "142",
        "318.4",
        "2,311",
        "0.6 %",
        "71.2 %",
        "94.2 %",
    ]
    assert sets.rows[1][-1] == "", "the validation set is not packed"
    assert files.rows[0][:6] == ["examples/data/medical/train.jsonl", "train", "sharegpt", "1", "318", "315"]
    assert files.numeric == [False] * 3 + [True] * 8
    assert section.warnings == DATA_REPORT["warnings"]
    assert ("sampling · near duplicates left out", "1") in section.facts
    assert section.bad_rows[0] == (
        "examples/data/medical/train.jsonl:17",
        "the conversation starts with the assistant",
    )


def test_data_summary_takes_what_it_knows() -> None:
    assert not data_section({})
    bad = [{"file": "a.parquet", "line": 7, "unit": "row", "reason": "empty"}] * 130
    section = data_section(
        {"bad_rows": bad, "train": None, "files": "?", "other": {"share": 0.5, "n": 12_345}}
    )
    assert section.facts == [("other · share", "50.0 %"), ("other · n", "12,345")]
    assert section.bad_rows[0] == ("a.parquet, row 7", "empty")
    assert (len(section.bad_rows), section.bad_rows_left_out) == (100, 30)
    assert section.tables == []


def test_the_fake_data_report_has_the_keys_of_the_real_one() -> None:
    from dataclasses import fields

    from finetune.data.report import DataReport, FileReport, SplitReport

    assert {f.name for f in fields(DataReport)} | {"warnings"} == set(DATA_REPORT)
    assert {f.name for f in fields(FileReport)} == set(DATA_REPORT["files"][0])
    assert {f.name for f in fields(SplitReport)} == set(DATA_REPORT["train"])


def test_commands_quote_and_fit_the_method(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "my run"))
    lines = [line for _, line in commands(run)]
    assert any("chat --model baichuan2-nano --adapter runs/qlora_medical/adapter" in line for line in lines)
    assert any("merge" in line for line in lines)
    assert any(f"run '{tmp_path}/my run/recipe.yaml'" in line for line in lines)
    for method, merges in (("ptuning", True), ("prefix", False)):
        run.recipe["adapter"]["method"] = method
        assert any("merge" in line for _, line in commands(run)) == merges


def test_agreeing_words_are_marked() -> None:
    (card,) = sample_cards(
        [Sample([{"role": "user", "content": "问"}], "多喝水，注意休息。", "", "请多喝水，好好休息。")]
    )
    assert card["before"] == []
    assert card["after"] == [("请", False), ("多喝水，", True), ("好好", False), ("休息。", True)]
    (unasked,) = sample_cards([Sample([], "水")])
    assert unasked["after"] is None


def test_what_unicode_calls_a_line_end_ends_no_line(tmp_path: Path) -> None:
    """Models write such characters; JSON leaves them as they are."""
    path = tmp_path / "rollouts.jsonl"
    rows = [{"response": "一\u2028二\u2029三\x85四"}, {"response": "五"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_jsonl(path) == rows


def test_samples_that_a_reward_scored(tmp_path: Path) -> None:
    """There is no reference, so nothing is said of marks and F1."""
    run = make_run(tmp_path / "run")
    row = {"messages": [{"role": "user", "content": "问"}], "reference": "", "before": "一", "after": "二"}
    row |= {"reward_before": -0.25, "reward_after": 3.0}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    text = Page(build_report(run).read_text(encoding="utf-8")).text
    assert "Before reward -0.25" in text
    assert "After reward 3.00" in text
    assert "Reward-0.2503.000+3.250" in re.sub(r"\s", "", text)
    assert "F1 counts" not in text
