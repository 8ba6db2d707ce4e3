"""Files into rows, and what is said about files and lines that are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.reading import read_rows
from finetune.data.records import BadRow, Row
from finetune.data.sources import open_source
from finetune.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def columns(path: Path) -> list[dict[str, Any]]:
    rows = list(read_rows(path))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.columns for row in rows if isinstance(row, Row)]


def bad(path: Path) -> dict[int, str]:
    return {row.location.number: row.reason for row in read_rows(path, "f") if isinstance(row, BadRow)}


# --- JSONL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '{"a": "甲"}\n{"a": "乙"}\n',
        '{"a": "甲"}\n{"a": "乙"}',  # no line break at the end
        '\ufeff{"a": "甲"}\n{"a": "乙"}\n',  # byte-order mark
        '{"a": "甲"}\r\n{"a": "乙"}\r\n',  # Windows
        '\n{"a": "甲"}\n\n   \n{"a": "乙"}\n\n',  # blank lines
    ],
)
def test_jsonl_is_read_however_it_was_saved(tmp_path: Path, content: str) -> None:
    assert columns(write(tmp_path / "x.jsonl", content)) == [{"a": "甲"}, {"a": "乙"}]


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path / "x.jsonl", '\n{"a": 1}\n\n{"a": 2}\n'), "x.jsonl"))
    assert [str(row.location) for row in rows] == ["x.jsonl:2", "x.jsonl:4"]


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"a": "一\u2028二\x85三"}\n')
    assert columns(path) == [{"a": "一\u2028二\x85三"}]


def test_broken_lines_are_named_and_the_others_read(tmp_path: Path) -> None:
    lines = [
        b'{"a": 1}',
        b'{"a": 1',
        b'{"a": "x\x00y"}',
        '{"a": "甲"}'.encode("gb18030"),
        b"[1, 2]",
        b"null",
        b"[" * 100_000,
        b'{"a": 2}',
    ]
    path = write(tmp_path / "x.jsonl", b"\n".join(lines))
    assert bad(path) == {
        2: "not JSON: Expecting ',' delimiter at column 8",
        3: "not JSON: Invalid control character at at column 9",
        4: "not UTF-8: byte 0xbc at byte 8 of the line",
        5: "expected a JSON object, found a list",
        6: "expected a JSON object, found null",
        7: "not JSON that can be read: nested too deeply",
    }
    assert [row.columns for row in read_rows(path) if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]


# --- JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        '[{"a": 1}, {"a": 2}]',
        '[\n  {"a": 1},\n  {"a": 2}\n]\n',
        '\ufeff[{"a": 1}, {"a": 2}]',
        '{"data": [{"a": 1}, {"a": 2}]}',
        '{"version": 1, "train": [{"a": 1}, {"a": 2}]}',
        '{"whatever": [{"a": 1}, {"a": 2}]}',
        '{"a": 1}\n{"a": 2}\n',  # JSONL by another name, as Belle and others publish it
    ],
)
def test_json_documents(tmp_path: Path, document: str) -> None:
    assert columns(write(tmp_path / "x.json", document)) == [{"a": 1}, {"a": 2}]


def test_json_list_in_a_jsonl_file(tmp_path: Path) -> None:
    assert columns(write(tmp_path / "x.jsonl", '[\n{"a": 1},\n{"a": 2}]')) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("text", ['{"a": 1}', '{\n "a": 1\n}'])
def test_a_lone_object_is_one_row(tmp_path: Path, text: str) -> None:
    assert columns(write(tmp_path / "x.json", text)) == [{"a": 1}]


def test_a_lone_conversation_is_one_row_not_its_turns(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
    assert columns(write(tmp_path / "x.json", json.dumps(row))) == [row]


def test_json_items_are_numbered(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", '[{"a": 1}, "b", {"a": 2}]')
    found = [str(row) for row in read_rows(path, "x.json") if isinstance(row, BadRow)]
    assert found == ["x.json: item 2: expected a JSON object, found a string"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"a": 1},\n{"a": }]', r"x.json:2: not JSON: Expecting value at column 7"),
        ("x.json", "42", r"expected a list of objects, found a number"),
        ("x.json", '{"a": [{"b": 1}], "c": [{"d": 1}]}', r"found an object with the keys 'a', 'c'"),
        ("x.json", b'[\n{"a": "\xb0\xa1"}]', r"x.json:2: not UTF-8: byte 0xb0 at byte 8 of the line"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), r"x.jsonl: the file is UTF-16, expected UTF-8"),
        ("x.json", '{"a": 1}'.encode("utf-16"), r"x.json: the file is UTF-16, expected UTF-8"),
        ("x.jsonl", "", r"x.jsonl: the file is empty"),
        ("x.docx", "x", r"x.docx: a data file's name ends in one of .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        list(read_rows(path, name))


def test_text_file_is_one_document(tmp_path: Path) -> None:
    assert columns(write(tmp_path / "x.txt", "\ufeff第一行\r\n第二行\n")) == [{"text": "第一行\r\n第二行\n"}]


# --- CSV ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "q,a\n甲,乙\n丙,丁\n",
        "\ufeffq,a\r\n甲,乙\r\n\r\n丙,丁\r\n",  # as Excel writes it
        "q\ta\n甲\t乙\n丙\t丁",
        "q;a\n甲;乙\n丙;丁\n",
        '"q","a"\n"甲","乙"\n"丙","丁"\n',
    ],
)
def test_csv_however_it_was_saved(tmp_path: Path, content: str) -> None:
    assert columns(write(tmp_path / "x.csv", content)) == [{"q": "甲", "a": "乙"}, {"q": "丙", "a": "丁"}]


def test_csv_fields_may_span_lines_and_rows_know_where_they_begin(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'q,a\n"一\n二","说""好"""\n三,四\n')
    rows = list(read_rows(path, "x.csv"))
    assert [row.columns for row in rows if isinstance(row, Row)] == [
        {"q": "一\n二", "a": '说"好"'},
        {"q": "三", "a": "四"},
    ]
    assert [str(row.location) for row in rows] == ["x.csv:2", "x.csv:4"]


def test_csv_fields_longer_than_the_modules_own_limit(tmp_path: Path) -> None:
    assert len(columns(write(tmp_path / "x.csv", f"q,a\n{'长' * 200_000},b\n"))[0]["q"]) == 200_000


def test_csv_bad_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'q,a\n1,2\n1,2,3\n1\n1,2\n1,"never closed\n1,2\n')
    assert bad(path) == {
        3: "3 fields, the header has 2",
        4: "1 fields, the header has 2",
        6: "not CSV: a quoted field begins here and is never closed",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,,a\n1,2,3\n", r"column 2 of the header has no name"),
        ("q,a,q\n1,2,3\n", r"the header names 'q' twice"),
        ("q,a\n甲,乙\n".encode("gb18030"), r"x.csv:2: not UTF-8: byte 0xbc at byte 1 of the line"),
    ],
)
def test_csv_files_that_cannot_be_read(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_rows(write(tmp_path / "x.csv", content), "x.csv"))


def test_the_way_out_of_gb18030_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="iconv -f GB18030 -t UTF-8"):
        list(read_rows(write(tmp_path / "x.csv", "问,答\n".encode("gb18030"))))


# --- Parquet --------------------------------------------------------------------------------------------


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": [{"role": "user", "content": str(index)}], "n": None} for index in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    read = list(read_rows(tmp_path / "x.parquet", "x.parquet"))
    assert [row.columns for row in read if isinstance(row, Row)] == rows
    assert str(read[2].location) == "x.parquet: row 3"


def test_damaged_parquet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.parquet: not a readable Parquet file"):
        list(read_rows(write(tmp_path / "x.parquet", b"PAR1 and then nothing"), "x.parquet"))


# --- sources --------------------------------------------------------------------------------------------


def names(path: str) -> list[str]:
    return [name for name, _ in open_source(path)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("data/b.jsonl", "data/a.csv", "data/deep/c.json", "data/README.md", "data/.hidden.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, '{"a": 1}')
    return tmp_path


def test_folders_and_patterns(folder: Path) -> None:
    assert names("data") == ["data/a.csv", "data/b.jsonl", "data/deep/c.json"]
    assert names("data/*.jsonl") == ["data/b.jsonl"]
    assert names("data/**/*.json*") == ["data/b.jsonl", "data/deep/c.json"]
    assert names(str(folder / "data/b.jsonl")) == [str(folder / "data/b.jsonl")]


def test_a_file_is_read_where_the_recipe_resolves_it(folder: Path) -> None:
    [(name, read)] = open_source("b.jsonl", lambda path: str(folder / "data" / path))
    assert name == "b.jsonl"
    assert [str(row.location) for row in read()] == ["b.jsonl:1"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "data/bb.jsonl",
            r"data/bb.jsonl: no such file, folder or hub data set[\s\S]*did you mean data/b.jsonl",
        ),
        ("data/train", r"data/train: no such file"),  # below a folder that exists, so no hub id
        ("nowhere/x.jsonl", r"nowhere/x.jsonl: no such file"),
        ("x*.jsonl", r"x\*.jsonl: no file fits the pattern"),
    ],
)
def test_what_is_not_there(folder: Path, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data file in this folder"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "arguments", "split"),
    [
        ("hub:owner/name", ("owner/name",), "train"),
        ("owner/name", ("owner/name",), "train"),
        ("hub:owner/name:validation", ("owner/name",), "validation"),
        ("hub:owner/name/zh:train[:100]", ("owner/name", "zh"), "train[:100]"),
        ("hub:squad", ("squad",), "train"),
    ],
)
def test_hub_data_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, arguments: tuple[str, ...], split: str
) -> None:
    import datasets

    seen: list[Any] = []

    def load(*args: str, split: str) -> list[dict[str, str]]:
        seen.append((args, split))
        return [{"text": "甲"}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    [(_, read)] = open_source(path)
    [row] = read()
    assert isinstance(row, Row)
    assert row.columns == {"text": "甲"}
    assert str(row.location) == f"{path if path.startswith('hub:') else 'hub:' + path}: row 1"
    assert seen == [(arguments, split)]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def load(*args: str, split: str) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    [(_, read)] = open_source("owner/name")
    with pytest.raises(
        UserError, match=r"Couldn't reach 'owner/name' on the Hub\n.*hf download .* owner/name"
    ):
        list(read())
