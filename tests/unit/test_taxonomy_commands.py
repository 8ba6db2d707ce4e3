"""`finetune taxonomy …`: what is printed and written, and what bad input says."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.cli import app
from rlhf.taxonomy.classifier import Prediction
from rlhf.taxonomy.coverage import measure
from rlhf.taxonomy.page import render
from rlhf.taxonomy.tree import load_taxonomy

QUESTIONS = {
    "2.01": [
        "孩子发烧39度怎么办",
        "胃疼吃什么药好",
        "胃疼吃什么药好？",
        "高血压能治好吗",
        "感冒咳嗽有痰怎么办",
    ],
    "4.03": ["用Python写一个爬虫", "MySQL索引为什么用B+树"],
    "3.06": ["把这句话翻译成英文：今天很冷"],
}
OWN = """\
version: 1
primary:
  - id: "5"
    children:
      - id: "5.03"
        children:
          - id: "5.03.90"
            zh: 热泵机组
            en: Heat pumps
            scope: 本公司的热泵机组
            examples: [热泵机组不启动怎么办, 热泵机组漏氟, 热泵机组怎么除霜]
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Conversations of known categories, in a fresh current directory."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "好"}], "number": n}
        for n, q in enumerate(q for questions in QUESTIONS.values() for q in questions)
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "data.jsonl"


def call(*args: str) -> Any:
    return CliRunner().invoke(app, ["taxonomy", *args])


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_stats() -> None:
    result = call("stats")
    assert result.exit_code == 0, result.output
    assert "prompt taxonomy: 6 / 30 / 241 categories" in result.stdout
    assert "safety taxonomy: 6 types of attack, " in result.stdout
    assert "\n2.01  医疗健康" in result.stdout


def test_classify_writes_a_row_for_each_prompt(data: str) -> None:
    result = call("classify", data, "--output", "out/classes.jsonl")
    assert result.exit_code == 0, result.output
    rows = lines("out/classes.jsonl")
    assert [row["line"] for row in rows] == list(range(1, 9))
    expected = [category for category, questions in QUESTIONS.items() for _ in questions]
    assert [row["path"][1] for row in rows] == expected
    table = result.stdout.splitlines()
    assert any(line.startswith("2.01  医疗健康") and " 5 " in line for line in table)
    assert table[-1] == "categories: out/classes.jsonl"


def test_overlay_categories_are_found(data: str) -> None:
    Path("own.yaml").write_text(OWN)
    Path("ask.jsonl").write_text('{"prompt": "我家的热泵机组半夜停了"}\n')
    assert call("classify", "ask.jsonl", "--overlay", "own.yaml", "--output", "o.jsonl").exit_code == 0
    assert lines("o.jsonl")[0]["path"] == ["5", "5.03", "5.03.90"]


def test_evaluate_prints_tiers_and_categories() -> None:
    Path("labels.jsonl").write_text(
        '{"prompt": "孩子发烧怎么办", "category": "2.01.04"}\n{"prompt": "你好呀", "category": "6.01"}\n'
    )
    result = call("evaluate", "labels.jsonl")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].split()[:4] == ["primary", "2", "100.0", "%"]
    assert result.stdout.splitlines()[3].split()[:2] == ["tertiary", "1"]
    assert (
        sum(line.startswith(("1.", "2.", "3.", "4.", "5.", "6.")) for line in result.stdout.splitlines())
        == 30
    )


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_sample_writes_rows_unchanged(data: str) -> None:
    result = call("sample", data, "--size", "4", "--output", "s.jsonl", "--seed", "3")
    assert result.exit_code == 0, result.output
    before, chosen = lines(data), lines("s.jsonl")
    assert len(chosen) == 4
    assert all(row in before for row in chosen)
    assert "100.0 %" in result.stdout
    assert "1 near-duplicate left out" in result.stdout
    first = Path("s.jsonl").read_bytes()
    again = call("sample", data, "--size", "4", "--output", "s.jsonl", "--seed", "3", "--overwrite")
    assert again.exit_code == 0, again.output
    assert Path("s.jsonl").read_bytes() == first


@pytest.mark.parametrize("command", [["sample", "data.jsonl", "--size", "2"], ["classify", "data.jsonl"]])
@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("old.jsonl", "old.jsonl: is there already\n  → choose another --output, or pass --overwrite"),
        ("data.jsonl", "data.jsonl: this command itself reads or writes this file"),
        ("folder", "folder: is a folder, expected a file"),
    ],
)
def test_what_is_there_is_not_replaced_silently(
    data: str, command: list[str], output: str, part: str
) -> None:
    Path("old.jsonl").write_text("precious\n")
    Path("folder").mkdir()
    before = Path(data).read_text()
    result = call(*command, "--output", output)
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    assert Path("old.jsonl").read_text() == "precious\n"
    assert Path(data).read_text() == before
    assert call(*command, "--output", "old.jsonl", "--overwrite").exit_code == 0
    assert "precious" not in Path("old.jsonl").read_text()


def test_a_sample_larger_than_the_file_says_so(data: str) -> None:
    result = call("sample", data, "--size", "50", "--output", "s.jsonl", "--method", "temperature")
    assert len(lines("s.jsonl")) == 7
    assert "fewer than the 50 asked for" in result.stdout


def test_coverage_writes_table_page_and_numbers(data: str) -> None:
    result = call("coverage", data, "--json", "c.json")
    assert result.exit_code == 0, result.output
    assert "8 prompts, of them 1 near-duplicate of another" in result.stdout
    assert result.stdout.splitlines()[-2:] == ["numbers: c.json", "page: data.jsonl.coverage.html"]
    numbers = json.loads(Path("c.json").read_text())
    secondary = {each["id"]: each for each in numbers["tiers"][1]["categories"]}
    assert {key: each["rows"] for key, each in secondary.items() if each["rows"]} == {
        "2.01": 5,
        "4.03": 2,
        "3.06": 1,
    }
    assert secondary["2.01"]["near_duplicates"] == 1
    assert numbers["tiers"][1]["entropy"] == pytest.approx(1.2988, abs=1e-4)
    assert len(numbers["tiers"][1]["empty"]) == 27


@pytest.mark.parametrize("source", ["data.jsonl", ".", "*.jsonl"])
@pytest.mark.parametrize("option", ["--output", "--json"])
def test_no_option_replaces_what_is_read(data: str, source: str, option: str) -> None:
    before = Path(data).read_text()
    for command in (["coverage"], ["sample", "--size", "2", "--output", "s.jsonl"], ["classify"]):
        if command != ["coverage"] and option == "--json":
            continue
        result = call(command[0], source, *command[1:], option, data, "--overwrite")
        assert result.exit_code == 2, result.output
        assert f"data.jsonl: this command itself reads or writes this file, so it cannot be {option}" in (
            result.stderr
        )
        assert result.stdout == ""
        assert Path(data).read_text() == before
    assert [path.name for path in Path().iterdir()] == [data]


def test_coverage_replaces_its_own_page_and_nothing_else_unasked(data: str) -> None:
    page = Path("data.jsonl.coverage.html")
    for _ in range(2):  # the second time there is a page
        assert call("coverage", data).exit_code == 0
    foreign = {"notes.html": "<!doctype html><title>mine</title>", "old.json": "{}", page.name: "mine"}
    for name, text in foreign.items():
        Path(name).write_text(text)
    for options in (["--output", "notes.html"], ["--json", "old.json", "--output", "new.html"], []):
        result = call("coverage", data, *options)
        assert result.exit_code == 2, result.output
        assert "is there already" in result.stderr
        assert "pass --overwrite" in result.stderr
        assert result.stdout == ""
    assert {name: Path(name).read_text() for name in foreign} == foreign
    assert not Path("new.html").exists()
    assert call("coverage", data, "--json", "old.json", "--overwrite").exit_code == 0
    assert json.loads(Path("old.json").read_text())["rows"] == 8
    same = call("coverage", data, "--output", "x", "--json", "./x")
    assert same.exit_code == 2
    assert "it cannot be --json, too" in same.stderr


def test_an_output_below_a_file_is_refused_before_any_work(data: str) -> None:
    result = call("coverage", data, "--output", "data.jsonl/page.html")
    assert result.exit_code == 2
    assert "data.jsonl is a file, not a folder" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("source", "page"),
    [(".", "here.coverage.html"), ("*.jsonl", "_.jsonl.coverage.html"), ("../here", "here.coverage.html")],
)
def test_the_page_of_whatever_source_has_a_plain_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, page: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("ask.jsonl").write_text('{"prompt": "在吗"}\n')
    result = call("coverage", source)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"page: {page}"
    assert Path(page).is_file()


class Page(HTMLParser):
    """Collects what would load something or run, and the rectangles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rects: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "rect":
            self.rects.append(found)
        if tag in ("script", "img", "link", "iframe") or {"src", "onclick", "onload"} & found.keys():
            self.loads.append(tag)


def test_page_is_self_contained_and_escapes() -> None:
    taxonomy = load_taxonomy()
    leaf = taxonomy.tiers[2]
    predictions = [Prediction((each.id[:1], each.id[:4], each.id), (0.9, 0.9, 0.9)) for each in leaf]
    unknown = Prediction(("1", "1.01", "1.01.01"), (0.1, 0.1, 0.1))
    prompts = [each.examples[0] for each in leaf] + ["？"]
    found = measure("<script>alert(1)</script>", prompts, [*predictions, unknown], taxonomy)
    html = render(found)
    page = Page(html)
    assert page.loads == []
    assert "&lt;script&gt;" in html
    tops = [rect for rect in page.rects if rect["class"] == "t1"]
    assert len(tops) == 7  # six and what is unknown
    assert sum(float(r["width"] or 0) * float(r["height"] or 0) for r in tops) == pytest.approx(
        1056 * 620, rel=0.03
    )
    assert found.tiers[2].empty == []
    assert found.tiers[2].unknown == 1
    assert found.tiers[2].evenness == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["classify", "nowhere/at-all.jsonl"], "no such file, folder or hub data set"),
        (["classify", "nowhere/at-all.jsonl"], "  → correct FILE\n"),
        (["evaluate", "nowhere/at-all.jsonl"], "  → correct FILE\n"),
        (["classify", "ask.jsonl", "--labelled", "nowhere/at-all.jsonl"], "  → correct --labelled\n"),
        (["classify", "hub:nobody/nothing"], "then give DIR (or one of the files in it) as FILE."),
        (["classify", "broken.jsonl"], "  → none can be read: mend these rows"),
        (["classify", "empty.jsonl"], "empty.jsonl: the file is empty"),
        (["coverage", "other.jsonl"], "other.jsonl: no row has a prompt"),
        (["classify", "ask.jsonl", "--overlay", "gone.yaml"], "gone.yaml: cannot be read"),
        (["classify", "ask.jsonl", "--labelled", "bad.jsonl"], "bad.jsonl:1: there is no category '9.99'"),
        (["classify", "ask.jsonl", "--adapter", "x"], "--adapter: expected --model"),
        (["classify", "ask.jsonl", "--model", "m", "--labelled", "bad.jsonl"], "exclude each other"),
        (["evaluate", "bad.jsonl"], "bad.jsonl:1: there is no category '9.99'"),
        (["sample", "ask.jsonl", "--size", "0", "--output", "s.jsonl"], "--size"),
        (["sample", "ask.jsonl", "--size", "1", "--output", "ask.jsonl/s.jsonl"], "cannot be written"),
        (
            ["sample", "ask.jsonl", "--size", "1", "--output", "s.jsonl", "--temperature", "0.3"],
            "--temperature: would have no effect with --method quota",
        ),
    ],
)
def test_bad_input_is_named(args: list[str], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {}["no hub"])
    Path("empty.jsonl").write_text("")
    Path("other.jsonl").write_text('{"a": 1}\n')
    Path("broken.jsonl").write_text('{"prompt": "在吗"\n')
    Path("ask.jsonl").write_text('{"prompt": "在吗"}\n')
    Path("bad.jsonl").write_text('{"prompt": "在吗", "category": "9.99"}\n')
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    assert "data.train" not in result.stderr
    assert "Traceback" not in result.stderr
