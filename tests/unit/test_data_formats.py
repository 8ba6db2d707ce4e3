"""Layouts: recognised by their columns, normalised to messages, checked turn by turn."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.formats import COLUMNS, Layout, detect
from finetune.data.records import Location, Row, RowError
from finetune.errors import UserError

CHAT = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
OPENAI = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]


def rows(*columns: dict[str, Any]) -> list[Row]:
    return [Row(each, Location("f", number)) for number, each in enumerate(columns, start=1)]


def found(*columns: dict[str, Any], stage: str = "sft", expected: str = "auto") -> Layout:
    return detect(rows(*columns), stage=stage, name="f", expected=expected)


def messages(columns: dict[str, Any], system: str | None = None) -> list[dict[str, str]]:
    [row] = rows(columns)
    record = found(columns).to_record(row, system=system)
    assert record.messages is not None
    return record.messages


def reason(columns: dict[str, Any], layout: Layout | None = None) -> str:
    [row] = rows(columns)
    with pytest.raises(RowError) as error:
        (layout or found(columns)).to_record(row)
    return str(error.value)


# --- detection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "name", "content"),
    [
        ({"id": 1, "conversations": CHAT}, "sharegpt", ("conversations",)),
        ({"conversation": CHAT}, "sharegpt", ("conversation",)),
        ({"messages": OPENAI}, "messages", ("messages",)),
        ({"instruction": "问", "input": "", "output": "答"}, "alpaca", ("instruction", "output")),
        ({"instruction": "问", "output": "答", "text": "问答"}, "alpaca", ("instruction", "output")),
        ({"prompt": "问", "response": "答"}, "prompt_response", ("prompt", "response")),
        ({"prompt": "问", "completion": "答"}, "prompt_response", ("prompt", "completion")),
        ({"question": "问", "answer": "答", "id": 3}, "prompt_response", ("question", "answer")),
        ({"input": "问", "output": "答"}, "prompt_response", ("input", "output")),
        ({"问题": "问", "答案": "答"}, "prompt_response", ("问题", "答案")),
    ],
)
def test_layouts_are_recognised(columns: dict[str, Any], name: str, content: tuple[str, ...]) -> None:
    assert found(columns) == Layout(name, content)


def test_text_is_recognised_for_pretraining_even_beside_conversations() -> None:
    assert found({"text": "文"}, stage="pretrain") == Layout("text", ("text",))
    assert found({"content": "文", "title": "题"}, stage="pretrain") == Layout("text", ("content",))
    assert found({"instruction": "问", "output": "答", "text": "文"}, stage="pretrain").name == "text"


def test_the_majority_of_rows_decides_and_null_is_absent() -> None:
    chat, other = {"conversations": CHAT, "text": None}, {"conversations": None, "text": "文"}
    assert found(chat, chat, other).name == "sharegpt"
    half = {"question": "问", "answer": None}
    assert (
        found(half).columns
        == found(half, {"question": "问", "answer": "答"}).columns
        == ("question", "answer")
    )


def test_rows_of_different_layouts_in_one_file() -> None:
    with pytest.raises(UserError, match="more than one layout fits: sharegpt"):
        found({"conversations": CHAT}, {"question": "问", "answer": "答"})


@pytest.mark.parametrize(
    ("columns", "stage", "message"),
    [
        ({"foo": 1, "bar": 2}, "sft", r"f: the layout is not recognised: columns 'foo', 'bar'"),
        ({}, "sft", r"columns none"),
        (
            {"messages": OPENAI, "conversations": CHAT},
            "sft",
            r"more than one layout fits: sharegpt \(conversations\), messages \(messages\)",
        ),
        ({"prompt": "问", "response": "答", "completion": "答"}, "sft", r"more than one layout fits"),
        ({"text": "文"}, "sft", r"raw text \(column 'text'\), and stage sft[\s\S]*stage: pretrain"),
        ({"conversations": CHAT}, "pretrain", r"conversations \(sharegpt[\s\S]*stage: sft"),
        (
            {"conversations": CHAT[:1], "chosen": "好", "rejected": "坏"},
            "sft",
            r"preference data[\s\S]*reward and dpo",
        ),
    ],
)
def test_what_cannot_be_recognised(columns: dict[str, Any], stage: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        found(columns, stage=stage)


def test_an_unknown_layout_is_told_all_known_ones() -> None:
    with pytest.raises(UserError) as error:
        found({"foo": 1})
    assert all(name in str(error.value) for name in COLUMNS)


def test_a_named_format_decides_and_must_fit() -> None:
    both = {"messages": OPENAI, "conversations": CHAT}
    assert found(both, expected="messages") == Layout("messages", ("messages",))
    with pytest.raises(UserError, match=r"no row has the columns of format alpaca \(instruction \+ output\)"):
        found(both, expected="alpaca")


# --- normalising ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [
        {"conversations": CHAT},
        {"conversations": [{"from": "user", "value": "问"}, {"from": "assistant", "value": "答"}]},
        {"conversations": [{"from": "Human", "value": "问"}, {"from": "GPT", "value": "答"}]},
        {"conversations": OPENAI},
        {"conversations": '[{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]'},  # in CSV
        {"messages": OPENAI},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]}, OPENAI[1]]},
        {"instruction": "问", "output": "答"},
        {"instruction": "问", "input": "", "output": "答"},
        {"instruction": "问", "input": None, "output": "答", "system": "", "history": []},
        {"question": "问", "answer": "答"},
    ],
)
def test_every_layout_becomes_the_same_messages(columns: dict[str, Any]) -> None:
    assert messages(columns) == OPENAI


def test_alpaca_input_and_history() -> None:
    columns = {"instruction": "翻译", "input": "你好", "output": "hello", "history": [["问", "答"]]}
    assert messages(columns) == [
        *OPENAI,
        {"role": "user", "content": "翻译\n你好"},
        {"role": "assistant", "content": "hello"},
    ]


def test_system_messages() -> None:
    own = {"role": "system", "content": "自己的"}
    default = {"role": "system", "content": "默认的"}
    column = {"role": "system", "content": "一列"}
    assert messages({"messages": OPENAI}, "默认的") == [default, *OPENAI]
    assert messages({"messages": [own, *OPENAI]}, "默认的") == [own, *OPENAI]
    assert messages({"messages": OPENAI, "system": "一列"}, "默认的") == [column, *OPENAI]
    assert messages({"messages": [own, *OPENAI], "system": "一列"}) == [own, *OPENAI]
    assert messages({"question": "问", "answer": "答"}, "默认的") == [default, *OPENAI]
    assert messages({"messages": OPENAI}) == OPENAI


def test_content_is_kept_to_the_letter() -> None:
    text = "  前后空白\n<reserved_107>\t🙂𠮷 "
    assert messages({"question": text, "answer": text})[0]["content"] == text


# --- bad rows -------------------------------------------------------------------------------------------


def turns(*roles: str) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": "话"} for role in roles]}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (turns("gpt", "human", "gpt"), "turn 1: starts with role 'assistant', expected 'user'"),
        (turns("human", "human", "gpt"), "turn 2: role 'user' follows 'user'"),
        (turns("human", "gpt", "gpt"), "turn 3: role 'assistant' follows 'assistant'"),
        (
            turns("human", "gpt", "human"),
            "turn 3: ends with role 'user', expected an answer of the assistant",
        ),
        (turns("system", "gpt"), "turn 2: role 'assistant' follows 'system', expected 'user'"),
        (turns("human", "gpt", "system", "human", "gpt"), "turn 3: role 'system' follows 'assistant'"),
        (turns("system", "system", "human", "gpt"), "turn 2: role 'system' follows 'system'"),
        (turns("system"), "turn 1: ends with role 'system'"),
        (
            turns("human", "observation"),
            "turn 2: role 'observation' is unknown, expected one of system, user, human",
        ),
        (turns(), "the conversation has no turns"),
        ({"conversations": ["问", "答"]}, "turn 1: expected an object with role and content, found '问'"),
        ({"conversations": [{"value": "问"}]}, "turn 1: no role: expected 'from' or 'role', found 'value'"),
        (
            {"conversations": [{"from": "human"}]},
            "turn 1: no content: expected 'value' or 'content', found 'from'",
        ),
        ({"conversations": [{"from": 3, "value": "问"}]}, "turn 1: role 3 is unknown"),
        (
            {"conversations": [CHAT[0], {"from": "gpt", "value": None}]},
            "turn 2 (assistant): the content is null",
        ),
        (
            {"conversations": [CHAT[0], {"from": "gpt", "value": ""}]},
            "turn 2 (assistant): the content is empty",
        ),
        (
            {"conversations": [CHAT[0], {"from": "gpt", "value": " \n\u3000"}]},
            "turn 2 (assistant): the content is empty",
        ),
        (
            {"conversations": [CHAT[0], {"from": "gpt", "value": 5}]},
            "turn 2 (assistant): the content is a number, expected a string",
        ),
        (
            {"conversations": [{"from": "human", "value": "a\ud83db"}, CHAT[1]]},
            "turn 1 (user): lone surrogate U+D83D at character 2",
        ),
        (
            {"conversations": [{"from": "human", "value": "ab\0"}, CHAT[1]]},
            "turn 1 (user): NUL at character 3",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, OPENAI[1]]},
            "turn 1: content in parts of type image_url, only text can be learned",
        ),
        ({"messages": "hello"}, "column 'messages' is a string and not JSON"),
        ({"messages": '{"role": "user"}'}, "column 'messages' is an object, expected a list"),
        ({"messages": OPENAI, "system": 5}, "column 'system' is a number, expected a string"),
        ({"instruction": "问", "output": "  "}, "column 'output' is empty"),
        ({"instruction": "问", "output": ["答"]}, "column 'output' is a list, expected a string"),
        ({"instruction": "问", "input": 5, "output": "答"}, "column 'input' is a number, expected a string"),
        ({"instruction": "问", "output": "答", "history": [["问"]]}, "column 'history': round 1 is ['问']"),
        (
            {"instruction": "问", "output": "答", "history": [["问", None]]},
            "turn 2 (assistant): the content is null",
        ),
        ({"question": "", "answer": "答"}, "column 'question' is empty"),
        ({"question": "问", "answer": True}, "column 'answer' is true or false, expected a string"),
    ],
)
def test_bad_rows_say_what_is_wrong_and_where(columns: dict[str, Any], expected: str) -> None:
    assert reason(columns).startswith(expected)


def test_rows_without_the_files_columns() -> None:
    assert reason({"question": "问"}, Layout("prompt_response", ("question", "answer"))) == (
        "column 'answer' is missing or null"
    )
    assert reason({}, Layout("sharegpt", ("conversations",))) == "column 'conversations' is missing or null"
    assert reason({"text": None}, Layout("text", ("text",))) == "column 'text' is missing or null"
