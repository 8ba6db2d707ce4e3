"""From a recipe's data section to data sets and the report, all in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import train_tiny_sentencepiece

from finetune.baichuan.tokenization import BaichuanTokenizer
from finetune.data import PreparedData, collator_for, prepare
from finetune.data.cache import TokenCache
from finetune.errors import UserError
from finetune.recipe.schema import Data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaichuanTokenizer:
    return BaichuanTokenizer(
        vocab_file=str(train_tiny_sentencepiece(tmp_path_factory.mktemp("tiny") / "tokenizer.model"))
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return TokenCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(tiny: BaichuanTokenizer, cache: TokenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def go(*, stage: str = "sft", seed: int = 1, **settings: Any) -> PreparedData:
        return prepare(Data(**settings), tiny, stage=stage, seed=seed, cache=cache)

    return go


def qa(number: int, answer: str = "答") -> dict[str, str]:
    return {"question": f"问题{number}？", "answer": f"{answer}{number}。"}


def save(name: str, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def questions(data: PreparedData, tiny: BaichuanTokenizer) -> list[int]:
    """Numbers of the questions in the training set, in its order."""
    import re

    texts = [tiny.decode(row["input_ids"]) for row in data.train]
    return [int(number) for text in texts for number in re.findall(r"问题(\d+)", text)]


# --- the ordinary case ----------------------------------------------------------------------------------


def test_train_and_validation(run: Any, tiny: BaichuanTokenizer) -> None:
    data = run(
        train=save("train.jsonl", [qa(index) for index in range(40)]),
        validation=save("validation.jsonl", [qa(index) for index in range(100, 105)]),
        packing=False,
        system="你是医生。",
    )
    assert data.train.column_names == data.validation.column_names == ["input_ids", "labels"]
    assert len(data.train) == 40
    assert questions(data, tiny) != list(range(40))
    assert sorted(questions(data, tiny)) == list(range(40))
    assert [record.messages[1]["content"] for record in data.held_out] == [
        f"问题{i}？" for i in range(100, 105)
    ]
    assert data.held_out[0].messages[0] == {"role": "system", "content": "你是医生。"}
    train, validation = data.report.files
    assert (train.file, train.format, train.columns) == (
        "train.jsonl",
        "prompt_response",
        ("question", "answer"),
    )
    assert (train.rows, train.kept, train.bad, validation.rows) == (40, 40, 0, 5)
    assert data.report.train.tokens.count == 40
    assert data.report.train.tokens.total == sum(len(row["input_ids"]) for row in data.train)
    assert data.report.train.tokens.supervised == sum(
        label != -100 for row in data.train for label in row["labels"]
    )
    assert data.report.warnings == []
    json.dumps(data.report.as_dict())


def test_packing(run: Any, tiny: BaichuanTokenizer) -> None:
    data = run(train=save("train.jsonl", [qa(index) for index in range(40)]), max_length=64)
    assert data.validation is None
    assert data.held_out == []
    assert sorted(questions(data, tiny)) == list(range(40))
    assert data.report.train.rows == len(data.train) == data.report.train.packing.packs < 20
    assert data.report.train.packing.documents == 40
    assert data.report.train.packing.efficiency > 0.8
    batch = collator_for(tiny)([*data.train])
    assert (batch["position_ids"] == 0).sum() >= 40
    assert ((batch["position_ids"] != 0) | (batch["labels"] == -100)).all()


@pytest.mark.parametrize("packing", [True, False])
def test_the_seed_decides_everything(run: Any, packing: bool) -> None:
    settings = {
        "train": [{"path": save("a.jsonl", [qa(index) for index in range(30)]), "weight": 1.5}],
        "validation_share": 0.2,
        "packing": packing,
        "max_length": 64,
    }
    one, same, other = run(**settings), run(**settings), run(**settings, seed=2)
    assert one.train.to_dict() == same.train.to_dict() != other.train.to_dict()
    # what is held out does not depend on the seed, so that runs can be compared
    assert one.held_out == other.held_out


def test_mixing(run: Any, tiny: BaichuanTokenizer) -> None:
    table = ["instruction,output", *(f"问题{index},答" for index in range(100, 120))]
    one, two = {"role": "user", "content": "问题200"}, {"role": "assistant", "content": "答"}
    data = run(
        train=[
            {"path": save("a.jsonl", [qa(index) for index in range(10)]), "weight": 2},
            {"path": save("b.csv", table), "weight": 0.5},
            save("c.json", [{"data": [{"messages": [one, two]}]}]),
        ],
        packing=False,
    )
    seen = questions(data, tiny)
    assert sorted(number for number in seen if number < 100) == sorted([*range(10)] * 2)
    assert len({number for number in seen if 100 <= number < 200}) == 10
    assert seen.count(200) == 1
    assert data.report.train.tokens.count == 31
    assert [file.format for file in data.report.files] == ["prompt_response", "alpaca", "messages"]
    assert [file.weight for file in data.report.files] == [2, 0.5, 1]


def test_a_folder_is_one_source_of_several_files(run: Any) -> None:
    Path("folder").mkdir()
    save("folder/a.jsonl", [qa(1), qa(2)])
    save("folder/b.jsonl", [{"instruction": "问", "output": "答"}, {"instruction": "问", "output": ""}])
    data = run(train="folder", on_bad_rows="skip")
    assert [(file.file, file.format, file.kept) for file in data.report.files] == [
        ("folder/a.jsonl", "prompt_response", 2),
        ("folder/b.jsonl", "alpaca", 1),
    ]
    assert [str(row) for row in data.report.bad_rows] == ["folder/b.jsonl:2: column 'output' is empty"]


def test_max_rows(run: Any) -> None:
    rows = [qa(index) for index in range(10)]
    Path("folder").mkdir()
    save("folder/a.jsonl", rows[:3])
    save("folder/b.jsonl", rows[3:])
    data = run(train=["folder", save("c.jsonl", rows)], max_rows=4)
    assert [file.rows for file in data.report.files] == [3, 1, 4]


# --- holding out ----------------------------------------------------------------------------------------


def test_validation_share_never_parts_equal_conversations(run: Any, tiny: BaichuanTokenizer) -> None:
    rows = [qa(index) for index in range(20)] * 3
    data = run(train=save("a.jsonl", rows), validation_share=0.25, packing=False)
    held = {record.messages[0]["content"] for record in data.held_out}
    assert len(held) == 5
    assert len(data.held_out) == 15
    assert len(data.train) == 45
    assert held.isdisjoint(f"问题{number}？" for number in questions(data, tiny))
    [file] = data.report.files
    assert (file.held_out, file.duplicates) == (15, 40)
    assert (data.report.leaked, data.report.shared_prompts) == (0, 0)
    assert data.report.validation.tokens.count == 15


def test_leaks_are_reported(run: Any) -> None:
    data = run(
        train=save("a.jsonl", [qa(index) for index in range(10)]),
        validation=save("b.jsonl", [qa(3), qa(4, "另一个答案"), qa(50)]),
    )
    assert (data.report.leaked, data.report.shared_prompts) == (1, 2)
    assert "1 of 3 validation rows is also trained on" in data.report.warnings[0]


def test_a_single_document_cannot_be_split(run: Any) -> None:
    with pytest.raises(UserError, match=r"data.validation_share: nothing can be held out"):
        run(train=save("a.jsonl", [qa(1), qa(1)]), validation_share=0.5)


# --- bad rows -------------------------------------------------------------------------------------------

BAD = ['{"question": "问"', {"question": "问", "answer": ""}, {"question": None, "answer": "答"}]


def test_stop_lists_the_bad_rows_of_all_files(run: Any) -> None:
    with pytest.raises(UserError) as error:
        run(train=save("a.jsonl", [qa(1), *BAD]), validation=save("b.jsonl", [qa(2), BAD[1]]))
    assert str(error.value) == (
        "4 of 6 data rows cannot be used:\n"
        "  a.jsonl:2: not JSON: Expecting ',' delimiter at column 17\n"
        "  a.jsonl:3: column 'answer' is empty\n"
        "  a.jsonl:4: column 'question' is missing or null\n"
        "  b.jsonl:2: column 'answer' is empty\n"
        "  → mend these rows, or leave them out with data.on_bad_rows=skip"
    )


def test_stop_lists_ten_and_counts_the_rest(run: Any) -> None:
    with pytest.raises(UserError) as error:
        run(train=save("a.jsonl", [qa(1), *BAD * 1000]))
    assert str(error.value).count("a.jsonl:") == 10
    assert "3,000 of 3,001 data rows" in str(error.value)
    assert "and 2,990 more" in str(error.value)


def test_skip_leaves_them_out_and_records_them(run: Any, tiny: BaichuanTokenizer) -> None:
    data = run(train=save("a.jsonl", [qa(1), *BAD, qa(2)]), on_bad_rows="skip")
    assert sorted(questions(data, tiny)) == [1, 2]
    [file] = data.report.files
    assert (file.rows, file.kept, file.bad) == (5, 2, 3)
    assert data.report.as_dict()["bad_rows"][0] == {
        "file": "a.jsonl",
        "line": 2,
        "unit": "line",
        "reason": "not JSON: Expecting ',' delimiter at column 17",
    }
    assert data.report.warnings == ["3 of 5 data rows cannot be used and are left out"]


def test_answers_beyond_max_length_are_bad_rows(run: Any, tiny: BaichuanTokenizer) -> None:
    path = save("a.jsonl", [qa(1), {"question": "血糖" * 50, "answer": "好"}])
    with pytest.raises(
        UserError, match=r"a.jsonl:2: nothing to learn: the first 32 \(data.max_length\) of its \d+ tokens"
    ):
        run(train=path, max_length=32)
    data = run(train=path, max_length=32, on_bad_rows="skip")
    assert questions(data, tiny) == [1]
    assert [str(row.location) for row in data.report.bad_rows] == ["a.jsonl:2"]
    assert data.report.files[0].kept == 1


def test_truncation_is_counted_and_warned_of(run: Any) -> None:
    data = run(train=save("a.jsonl", [qa(1), {"question": "问", "answer": "血糖" * 50}]), max_length=32)
    tokens = data.report.train.tokens
    assert (tokens.truncated, tokens.truncated_share) == (1, 0.5)
    assert tokens.max > 32
    assert tokens.total <= 64
    odd, cut = data.report.warnings  # an answer of one word fifty times
    assert "1 odd data row is kept" in odd
    assert [(row.location.number, "repeats" in row.reason) for row in data.report.odd_rows] == [(2, True)]
    assert "50.0% of the training conversations are cut to data.max_length 32" in cut


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (BAD, r"data.train: none of 3 rows in a.jsonl can be used:\n  a.jsonl:1: not JSON"),
        (["", ""], r"data.train: no rows in a.jsonl"),
        (["{"], r"data.train: none of 1 row in"),
    ],
)
def test_nothing_left(run: Any, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(train=save("a.jsonl", rows), on_bad_rows="skip")


def test_nothing_left_in_one_of_several(run: Any) -> None:
    good, empty = save("a.jsonl", [qa(1)]), save("b.jsonl", BAD)
    data = run(train=[good, empty], on_bad_rows="skip")
    assert [(file.kept, file.bad) for file in data.report.files] == [(1, 0), (0, 3)]
    with pytest.raises(UserError, match=r"data.validation: none of 3 rows in b.jsonl"):
        run(train=good, validation=empty, on_bad_rows="skip")


def test_files_in_another_encoding_are_told_how_to_be_converted(run: Any) -> None:
    Path("a.jsonl").write_bytes(
        "\n".join(json.dumps(qa(i), ensure_ascii=False) for i in range(5)).encode("gb18030")
    )
    with pytest.raises(UserError, match=r"a.jsonl:1: not UTF-8: byte 0x[\s\S]*iconv -f GB18030"):
        run(train="a.jsonl")


# --- pre-training ---------------------------------------------------------------------------------------


def test_raw_text(run: Any) -> None:
    Path("b.txt").write_text("从前有座山，山里有座庙。\n" * 20, encoding="utf-8")
    path = save("a.jsonl", [{"text": "糖尿病患者应当控制饮食。" * 10}, {"text": "短。"}])
    data = run(train=[path, "b.txt"], stage="pretrain", max_length=32, packing=False)
    assert data.report.train.tokens.count == 3
    assert data.report.train.tokens.truncated == 0
    assert data.report.train.rows == len(data.train) > 3
    assert all(row["labels"][1:] == row["input_ids"][1:] for row in data.train)
    assert sum(row["input_ids"][-1] == 2 for row in data.train) == 3
    packed = run(train=[path, "b.txt"], stage="pretrain", max_length=32)
    assert packed.report.train.packing.documents == len(data.train)
    assert packed.report.train.packing.tokens == data.report.train.tokens.total


def test_raw_text_held_out(run: Any) -> None:
    path = save("a.jsonl", [{"text": f"第{index}篇。" * 20} for index in range(10)])
    data = run(train=path, stage="pretrain", max_length=32, validation_share=0.2)
    assert len(data.held_out) == 2
    assert all(record.text for record in data.held_out)
    assert data.report.shared_prompts == 0
    assert data.report.files[0].held_out == 2


# --- real data ------------------------------------------------------------------------------------------


def test_real_medical_conversations(shared: Path, cache: TokenCache) -> None:
    official = BaichuanTokenizer(vocab_file=str(shared / "baichuan2" / "tokenizer.model"))
    path = str(shared / "data" / "medical_sft_1k.jsonl")
    data = prepare(
        Data(train=path, validation_share=0.05, max_length=512), official, stage="sft", seed=1, cache=cache
    )
    [file] = data.report.files
    assert (file.format, file.rows, file.kept, file.held_out) == ("sharegpt", 1000, 1000, 50)
    assert (file.tokens.min, file.tokens.max, file.tokens.truncated) == (10, 2129, 24)
    assert data.report.train.packing.efficiency > 0.99


def test_real_preferences_are_not_for_sft(shared: Path, tiny: BaichuanTokenizer, cache: TokenCache) -> None:
    path = str(shared / "data" / "dpo_zh_500.jsonl")
    with pytest.raises(UserError, match="preference data"):
        prepare(Data(train=path), tiny, stage="sft", seed=1, cache=cache)
