"""Rows that are kept and pointed at."""

from __future__ import annotations

import pytest

from finetune.data.oddities import oddities
from finetune.data.records import Location, Record


def conversation(question: str, answer: str) -> Record:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Record(messages, location=Location("a.jsonl", 7))


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("走路疼吗？", "，与走路姿势没有关系。", "begins with '，'"),
        ("血压多高？", "血压&lt;140 为宜。", "left-over markup '&lt;'"),
        ("血压多高？", "<p>低于140。</p>", "left-over markup '<p>'"),
        ("血压多高？", "低于\ufffd140。", "damaged character U+FFFD"),
        ("血压多高？", "多喝热水。多喝热水。多喝热水。多喝热水。多喝热水。", "repeats '多喝热水。'"),
        ("女性阑尾炎的发病原因", "女性阑尾炎的发病原因主要是细菌感染。", "begins with the whole question"),
        ("感冒了怎么办", "感冒了怎么办", "an answer is its question"),
    ],
)
def test_odd_rows_are_pointed_at(question: str, answer: str, expected: str) -> None:
    (row,) = oddities([conversation(question, answer)])
    assert expected in row.reason
    assert str(row).startswith("a.jsonl:7: ")


@pytest.mark.parametrize(
    "answer",
    [
        "低于140。",
        ".NET 是一个平台。",
        "……让我想想。",
        "```html\n<p>段落</p>\n```",
        "-----------------------------------\n标题",
        "因为 a<b 且 c>d，所以成立。",
        "感冒了怎么办？先休息。",
    ],
)
def test_usual_rows_are_not(answer: str) -> None:
    assert oddities([conversation("感冒", answer)]) == []


def test_raw_text_is_looked_at_too() -> None:
    (row,) = oddities([Record(text="高血压\x05的饮食。", location=Location("b.jsonl", 1))])
    assert "U+0005" in row.reason
