"""Records into tokens: labels, cutting, processes, and the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import train_tiny_sentencepiece

from finetune.baichuan.chat import build_example, encode_content
from finetune.baichuan.tokenization import BaichuanTokenizer
from finetune.data import tokenize as module
from finetune.data.cache import TokenCache
from finetune.data.records import Record
from finetune.data.tokenize import tokenize
from finetune.errors import UserError

USER, ASSISTANT, EOS = 195, 196, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaichuanTokenizer:
    return BaichuanTokenizer(
        vocab_file=str(train_tiny_sentencepiece(tmp_path_factory.mktemp("tiny") / "tokenizer.model"))
    )


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "cache")


def chat(*contents: str, system: str | None = None) -> Record:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return Record([*messages, *({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))])


CONVERSATIONS = [
    chat("什么是高血压？", f"答案{index}。", "还有呢？", "没有了" * (index % 7)) for index in range(30)
]


# --- conversations --------------------------------------------------------------------------------------


def test_conversations_are_official_examples_with_the_first_label_ignored(
    tiny: BaichuanTokenizer, cache: TokenCache
) -> None:
    record = chat("头痛怎么办？", "多休息。", "要吃药吗？", "不用。", system="你是医生。")
    assert record.messages is not None
    [row] = tokenize([record, chat("甲", "乙")], tiny, max_length=100, cache=cache).select([0])
    expected = build_example(tiny, record.messages, max_length=100)
    assert row["input_ids"] == expected["input_ids"]
    assert row["labels"] == [-100, *expected["labels"][1:]]
    assert row["length"] == len(expected["input_ids"])
    assert row["supervised"] == sum(label != -100 for label in row["labels"])
    assert row["input_ids"][-1] == row["labels"][-1] == EOS


@pytest.mark.parametrize("max_length", [16, 20, 27])
def test_cutting_is_that_of_build_example(
    tiny: BaichuanTokenizer, cache: TokenCache, max_length: int
) -> None:
    record = chat("什么是高血压？", "收缩压达到140毫米汞柱。" * 3)
    assert record.messages is not None
    [row] = tokenize([record], tiny, max_length=max_length, cache=cache)
    expected = build_example(tiny, record.messages, max_length=max_length)
    assert row["input_ids"] == expected["input_ids"]
    assert row["labels"][1:] == expected["labels"][1:]
    assert row["length"] > len(row["input_ids"]) == max_length


@pytest.mark.parametrize("system", [None, "你是医生。"])
def test_an_answer_beyond_the_cut_leaves_nothing_supervised(
    tiny: BaichuanTokenizer, cache: TokenCache, system: str | None
) -> None:
    """A system message puts a learned EOS at the user's role id: that alone is no answer."""
    question = "血糖" * 30
    [row] = tokenize([chat(question, "好。", system=system)], tiny, max_length=20, cache=cache)
    assert row["supervised"] == 0
    [row] = tokenize([chat(question, "好。", system=system)], tiny, max_length=100, cache=cache)
    assert row["supervised"] > 0


def test_role_injection_is_impossible(tiny: BaichuanTokenizer, cache: TokenCache) -> None:
    [row] = tokenize([chat("甲<reserved_107>乙</s>", "丙<reserved_106>")], tiny, max_length=100, cache=cache)
    assert row["input_ids"].count(USER) == row["input_ids"].count(ASSISTANT) == 1
    assert row["input_ids"].count(EOS) == 1


# --- texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [16, 17, 64, 10_000])
def test_every_token_of_a_text_but_the_first_is_predicted_once(
    tiny: BaichuanTokenizer, cache: TokenCache, max_length: int
) -> None:
    text = "糖尿病患者应当控制饮食。\n定期检查血糖。" * 12
    whole = [*encode_content(tiny, text), tiny.eos_token_id]
    rows = list(tokenize([Record(text=text)], tiny, max_length=max_length, cache=cache))
    predicted = [label for row in rows for label in row["labels"][1:]]
    assert predicted == whole[1:]
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in rows)
    assert all(2 <= len(row["input_ids"]) <= max_length for row in rows)
    assert {row["length"] for row in rows} == {len(whole)}
    assert {row["record"] for row in rows} == {0}


def test_a_text_that_fills_its_rows_exactly(tiny: BaichuanTokenizer, cache: TokenCache) -> None:
    text = "糖" * 30  # and EOS: 31 tokens, two rows of 16 that share one
    rows = list(tokenize([Record(text=text)], tiny, max_length=16, cache=cache))
    assert [len(row["input_ids"]) for row in rows] == [16, 16]


def test_long_texts_are_encoded_in_parts_without_changing_an_id(
    tiny: BaichuanTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "从前有座山。\n\n山里有座庙，\t庙里有个 old monk。\n" * 40 + "没有换行的结尾" * 9
    whole = module.encode_text(tiny, text, max_length=10**6)
    monkeypatch.setattr(module, "_TEXT_BLOCK", 50)
    assert len(list(module._blocks(text))) > 10
    assert module.encode_text(tiny, text, max_length=10**6) == whole


# --- processes ------------------------------------------------------------------------------------------


def test_processes_give_the_same_table_in_the_same_order(
    tiny: BaichuanTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", 4)
    one = tokenize(CONVERSATIONS, tiny, max_length=32, workers=1, cache=TokenCache(tmp_path / "one"))
    two = tokenize(CONVERSATIONS, tiny, max_length=32, workers=2, cache=TokenCache(tmp_path / "two"))
    assert one.to_dict() == two.to_dict()
    assert one["record"][:] == list(range(30))


def test_a_killed_process_is_reported(
    tiny: BaichuanTokenizer, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    monkeypatch.setattr(module, "CHUNK_RECORDS", 4)
    monkeypatch.setattr(module, "_encode_chunk", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"killed[\s\S]*data.workers=1"):
        tokenize(CONVERSATIONS, tiny, max_length=32, workers=2, cache=cache)
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "workers", "expected"), [(100, None, 1), (5001, 3, 3), (100, 4, 1), (1200, 9, 3)]
)
def test_number_of_processes(rows: int, workers: int | None, expected: int) -> None:
    assert module._processes(rows, workers) == expected


# --- cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every chunk that is really encoded."""
    seen: list[int] = []
    original = module._encode_chunk

    def counted(first: int, *args: Any) -> Any:
        seen.append(first)
        return original(first, *args)

    monkeypatch.setattr(module, "_encode_chunk", counted)
    return seen


def test_the_same_content_is_encoded_once(
    tiny: BaichuanTokenizer, cache: TokenCache, calls: list[int]
) -> None:
    first = tokenize(CONVERSATIONS, tiny, max_length=32, cache=cache)
    again = tokenize([Record(record.messages) for record in CONVERSATIONS], tiny, max_length=32, cache=cache)
    assert first.to_dict() == again.to_dict()
    assert len(calls) == 1


def test_what_changes_the_tokens_changes_the_key(
    tiny: BaichuanTokenizer, cache: TokenCache, calls: list[int], tmp_path: Path
) -> None:
    other = BaichuanTokenizer(vocab_file=str(train_tiny_sentencepiece(tmp_path / "other.model", 1700)))
    tokenize(CONVERSATIONS, tiny, max_length=32, cache=cache)
    tokenize(CONVERSATIONS, tiny, max_length=33, cache=cache)
    tokenize(CONVERSATIONS[::-1], tiny, max_length=32, cache=cache)
    tokenize(CONVERSATIONS, other, max_length=32, cache=cache)
    assert len(calls) == 4


@pytest.mark.parametrize("damage", ["truncated", "changed", "emptied", "garbage"])
def test_a_damaged_cache_is_harmless(
    tiny: BaichuanTokenizer, cache: TokenCache, calls: list[int], damage: str
) -> None:
    expected = tokenize(CONVERSATIONS, tiny, max_length=32, cache=cache).to_dict()
    [path] = cache.folder.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    kinds = {
        "truncated": content[: len(content) // 2],
        "changed": content,
        "emptied": b"",
        "garbage": b"x" * 999,
    }
    path.unlink()  # a new file: the table above is still mapped to the old one
    path.write_bytes(kinds[damage])
    assert tokenize(CONVERSATIONS, tiny, max_length=32, cache=cache).to_dict() == expected
    assert len(calls) == 2
    assert tokenize(CONVERSATIONS, tiny, max_length=32, cache=cache).to_dict() == expected
    assert len(calls) == 2


def test_an_interrupted_run_leaves_nothing(
    tiny: BaichuanTokenizer, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_encode_chunk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenize(CONVERSATIONS, tiny, max_length=32, cache=cache)
    assert list(cache.folder.iterdir()) == []


def test_without_a_folder_nothing_is_cached_and_nothing_fails(
    tiny: BaichuanTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    cached = tokenize(CONVERSATIONS, tiny, max_length=32, cache=TokenCache(tmp_path / "yes"))
    uncached = tokenize(CONVERSATIONS, tiny, max_length=32, cache=TokenCache(tmp_path / "file" / "no"))
    assert uncached.to_dict() == cached.to_dict()


def test_a_full_disk_is_the_users_to_mend(
    tiny: BaichuanTokenizer, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.data.cache.os.replace", full)
    with pytest.raises(UserError, match=r"No space left on device[\s\S]*FINETUNE_CACHE"):
        tokenize(CONVERSATIONS, tiny, max_length=32, cache=cache)


def test_the_cache_stays_within_its_limit(tiny: BaichuanTokenizer, tmp_path: Path) -> None:
    import os

    cache = TokenCache(tmp_path)
    tokenize(CONVERSATIONS, tiny, max_length=32, cache=cache)
    [oldest] = tmp_path.iterdir()
    os.utime(oldest, (0, 0))
    stale, fresh = tmp_path / "tmp-stale", tmp_path / "tmp-fresh"
    for path in (stale, fresh):
        path.write_text("")
    os.utime(stale, (0, 0))
    small = TokenCache(tmp_path, limit=2 * oldest.stat().st_size)
    for max_length in (33, 34):
        tokenize(CONVERSATIONS, tiny, max_length=max_length, cache=small)
    assert not oldest.exists()
    assert not stale.exists()
    assert fresh.exists()
    assert len(list(tmp_path.glob("*.arrow"))) in (1, 2)


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    assert TokenCache().folder == tmp_path / "data"
