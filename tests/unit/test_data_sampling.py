"""data.sampling: what is taken, what is told, what is refused, for conversations, preferences and PPO prompts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import train_tiny_sentencepiece

from finetune.baichuan.tokenization import BaichuanTokenizer
from finetune.data import prepare
from finetune.data.cache import TokenCache
from finetune.errors import UserError
from finetune.recipe import load_recipe
from finetune.recipe.schema import Data
from finetune.report.data_summary import data_section
from rlhf.ppo.prompts import load_prompts
from rlhf.preferences import prepare_preferences
from rlhf.recipe import PreferenceData

FIRST = "2.01.01"
SECOND = "3.02"
LETTERS = [chr(0x4E00 + number) for number in range(6000)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaichuanTokenizer:
    return BaichuanTokenizer(
        vocab_file=str(train_tiny_sentencepiece(tmp_path_factory.mktemp("tiny") / "tokenizer.model"))
    )


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "cache")


def question(number: int) -> str:
    """Shares no three characters with another number's."""
    return "".join(LETTERS[12 * number : 12 * number + 12])


def rows_of(*counts: tuple[str | None, int]) -> list[dict[str, Any]]:
    """Conversations with a category, and one near-duplicate of the first at the end."""
    rows: list[dict[str, Any]] = []
    for category, count in counts:
        for _ in range(count):
            rows.append({"question": question(len(rows)), "answer": f"答{len(rows)}", "category": category})
    return [*rows, {**rows[0], "question": rows[0]["question"] + "？"}]


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(train: str, kind: type[Data] = Data, **sampling: Any) -> Any:
    return kind(train=train, packing=False, max_length=64, sampling=sampling)


# --- conversations ------------------------------------------------------------------------------------------


def test_shares_are_even_and_the_report_says_what_was_done(
    tiny: BaichuanTokenizer, cache: TokenCache, tmp_path: Path
) -> None:
    path = save(tmp_path / "t.jsonl", rows_of((FIRST, 30), (SECOND, 6), (None, 4)))
    data = prepare(config(path, size=15, column="category"), tiny, stage="sft", seed=1, cache=cache)
    assert len(data.train) == 15
    told = data.report.as_dict()["sampling"]
    assert told["rows"] == 41
    assert told["taken"] == 15
    assert {share["id"]: (share["rows"], share["taken"]) for share in told["categories"]} == {
        "2.01": (30, 6),
        "3.02": (6, 5),
        "unknown": (4, 4),
    }
    assert told["near_duplicates"] == [{"row": f"{path}:41", "repeats": f"{path}:1"}]
    [file] = data.report.files
    assert (file.rows, file.kept, file.sampled, file.tokens.count) == (41, 41, 15, 15)
    section = data_section(data.report.as_dict())
    assert "Sample by category" in [table.title for table in section.tables]
    assert section.near_duplicates == [(f"{path}:41", f"nearly repeats {path}:1")]


def test_the_seed_decides_and_the_cache_of_tokens_keeps_samples_apart(
    tiny: BaichuanTokenizer, cache: TokenCache, tmp_path: Path
) -> None:
    path = save(tmp_path / "t.jsonl", rows_of((FIRST, 30), (SECOND, 6)))
    taken = [
        prepare(config(path, size=size, column="category"), tiny, stage="sft", seed=seed, cache=cache).train
        for seed, size in ((1, 10), (2, 10), (1, 10), (1, 12))
    ]
    first, other, again, larger = ([tuple(row["input_ids"]) for row in each] for each in taken)
    assert first == again
    assert set(first) != set(other)
    assert len(larger) == 12
    assert Counter(larger) != Counter(first)


def test_prompts_are_classified_where_no_column_is_named(
    tiny: BaichuanTokenizer, cache: TokenCache, tmp_path: Path
) -> None:
    medical = [
        "高血压吃什么药？",
        "感冒发烧怎么办？",
        "胃疼是什么病？",
        "糖尿病人能吃西瓜吗？",
        "牙龈出血怎么治？",
    ]
    code = ["用Python写一个冒泡排序。", "SQL怎么连接两张表？"]
    path = save(tmp_path / "t.jsonl", [{"question": text, "answer": "答"} for text in (*medical, *code)])
    data = prepare(config(path, size=4), tiny, stage="sft", seed=1, cache=cache)
    texts = [tiny.decode(row["input_ids"]) for row in data.train]
    assert len(texts) == 4
    assert sum(any(text in each for text in code) for each in texts) == 2


def test_categories_that_were_asked_for_alone(
    tiny: BaichuanTokenizer, cache: TokenCache, tmp_path: Path
) -> None:
    path = save(tmp_path / "t.jsonl", rows_of((FIRST, 8), (SECOND, 6), (None, 4)))
    data = prepare(
        config(path, size=50, column="category", categories=["3", "unknown"]),
        tiny,
        stage="sft",
        seed=1,
        cache=cache,
    )
    assert data.report.sampling is not None
    assert {share.id: share.taken for share in data.report.sampling.categories} == {"3.02": 6, "unknown": 4}
    assert data.report.sampling.other_categories == 9
    assert any("data.sampling.size is 50, and only 10" in warning for warning in data.report.warnings)


def test_held_out_rows_come_from_the_sample(
    tiny: BaichuanTokenizer, cache: TokenCache, tmp_path: Path
) -> None:
    path = save(tmp_path / "t.jsonl", rows_of((FIRST, 30), (SECOND, 10)))
    settings = Data(
        train=path,
        packing=False,
        max_length=64,
        validation_share=0.25,
        sampling={"size": 20, "column": "category"},
    )
    data = prepare(settings, tiny, stage="sft", seed=1, cache=cache)
    assert (len(data.train), len(data.held_out)) == (15, 5)


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"column": "kategorie"}, "data.sampling.column: no training row has a column 'kategorie'"),
        (
            {"categories": ["9.99"], "column": "category"},
            "data.sampling.categories: there is no category '9.99'",
        ),
        ({"categories": ["6.01"], "column": "category"}, "data.sampling.categories: none of the 15 training"),
        ({"overlays": ["nowhere.yaml"], "column": "category"}, "data.sampling.overlays: .*nowhere.yaml"),
    ],
)
def test_what_does_not_exist_is_named_with_its_key(
    tiny: BaichuanTokenizer, cache: TokenCache, tmp_path: Path, sampling: dict[str, Any], said: str
) -> None:
    path = save(tmp_path / "t.jsonl", rows_of((FIRST, 8), (SECOND, 6)))
    with pytest.raises(UserError, match=said):
        prepare(config(path, size=5, **sampling), tiny, stage="sft", seed=1, cache=cache)


@pytest.mark.parametrize(
    ("category", "said"),
    [("A.99", r"data\.sampling\.column: .*t\.jsonl:1: there is no category 'A\.99'"), (2.01, "is a number")],
)
def test_a_category_of_no_taxonomy_is_named_with_its_row(
    tiny: BaichuanTokenizer, cache: TokenCache, tmp_path: Path, category: Any, said: str
) -> None:
    path = save(tmp_path / "t.jsonl", [{**rows_of((FIRST, 1))[0], "category": category}])
    with pytest.raises(UserError, match=said):
        prepare(config(path, size=5, column="category"), tiny, stage="sft", seed=1, cache=cache)


# --- recipes ------------------------------------------------------------------------------------------------


def recipe_file(folder: Path, stage: str, data: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    recipe = {"stage": stage, "model": {"base": "baichuan2-nano"}, "data": data}
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("stage", "data", "said"),
    [
        ("pretrain", {"sampling": {"size": 5}}, "data.sampling: .*raw text"),
        ("sft", {"sampling": {"size": 0}}, r"data\.sampling\.size"),
        ("sft", {"sampling": {"size": 5, "temperature": 0.5}}, r"data\.sampling\.temperature: .*quota"),
        ("sft", {"sampling": {"size": 5, "method": "evenly"}}, r"data\.sampling\.method"),
        ("sft", {"train": [{"path": "x.jsonl", "weight": 2}], "sampling": {"size": 5}}, "undo the balance"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, stage: str, data: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(recipe_file(tmp_path, stage, {"train": "x.jsonl", **data}))


def test_the_section_can_be_made_and_changed_on_the_command_line(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "sft", {"train": "x.jsonl"})
    made = load_recipe(path, ["data.sampling.size=5", "data.sampling.method=temperature"]).data.sampling
    assert made is not None
    assert (made.size, made.method) == (5, "temperature")
    assert load_recipe(path, ["data.sampling.size=5", "data.sampling=null"]).data.sampling is None
    with pytest.raises(
        UserError, match=r"data\.sampling\.sise: unknown key; did you mean data\.sampling\.size"
    ):
        load_recipe(path, ["data.sampling.sise=5"])
    with pytest.raises(UserError, match=r"data\.sampling\.size: required, and not given: training rows"):
        load_recipe(path, ["data.sampling.method=quota"])


def test_the_effective_recipe_can_be_read_again(tmp_path: Path) -> None:
    sampling = {"size": 5, "method": "quota", "categories": ["2"]}
    recipe = load_recipe(recipe_file(tmp_path, "sft", {"train": "x.jsonl", "sampling": sampling}))
    (tmp_path / "again.yaml").write_text(recipe.dump(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml").data == recipe.data


# --- preferences and prompts --------------------------------------------------------------------------------


def preference_rows() -> list[dict[str, Any]]:
    return [
        {"prompt": row["question"], "chosen": "好", "rejected": "坏", "category": row["category"]}
        for row in rows_of((FIRST, 20), (SECOND, 5))
    ]


def test_preferences_are_sampled_by_their_prompts(
    tiny: BaichuanTokenizer, cache: TokenCache, tmp_path: Path
) -> None:
    path = save(tmp_path / "t.jsonl", preference_rows())
    settings = config(path, PreferenceData, size=8, column="category")
    data = prepare_preferences(settings, tiny, stage="reward", seed=1, cache=cache)
    assert Counter(each.category for each in data.train.preferences) == {FIRST: 4, SECOND: 4}
    told = data.report.as_dict()
    assert (told["sampling"]["taken"], told["files"][0]["sampled"]) == (8, 8)
    assert told["sampling"]["near_duplicates"] == [{"row": f"{path}:26", "repeats": f"{path}:1"}]
    again = prepare_preferences(settings, tiny, stage="reward", seed=1, cache=cache)
    assert again.train.preferences == data.train.preferences


def test_prompts_of_ppo_are_sampled_and_held_out_ones_are_not(
    tiny: BaichuanTokenizer, tmp_path: Path
) -> None:
    train = save(tmp_path / "t.jsonl", preference_rows())
    held_out = save(tmp_path / "v.jsonl", [{"prompt": "一二三"}, {"prompt": "四五六"}, {"prompt": "七八九"}])
    path = tmp_path / "ppo.yaml"
    data = {
        "train": train,
        "validation": held_out,
        "max_length": 64,
        "sampling": {"size": 8, "column": "category"},
    }
    recipe = {
        "stage": "ppo",
        "model": {"base": "baichuan2-nano"},
        "data": data,
        "ppo": {"reward": "a:b", "max_new_tokens": 8},
    }
    path.write_text(json.dumps(recipe), encoding="utf-8")
    found = load_prompts(load_recipe(path), tiny)  # type: ignore[arg-type]
    assert Counter(prompt.category for prompt in found.train) == {FIRST: 4, SECOND: 4}
    assert len(found.held_out) == 3
    assert found.report()["sampling"]["taken"] == 8


def test_a_changed_overlay_has_a_step_done_again() -> None:
    from finetune.recipe.schema import Recipe

    sampling = {"size": 5, "overlays": ["more.yaml"]}
    recipe = Recipe(
        **{"name": "x", "stage": "sft", "model": {"base": "b"}},  # type: ignore[arg-type]
        data={"train": "t.jsonl", "sampling": sampling},  # type: ignore[arg-type]
    )
    assert recipe.input_files() == ["t.jsonl", "more.yaml"]
