"""The taxonomy of prompts: what is shipped, overlays, and files that break it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.recipe.yaml_text import parse_yaml
from rlhf.taxonomy.reading import prompt_of, read_labelled, read_prompts
from rlhf.taxonomy.similarity import jaccard, shingles
from rlhf.taxonomy.tree import HELD_OUT_FILE, PROMPT_FILES, Taxonomy, ancestor, load_taxonomy, similar_names

CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


# --- what is shipped ----------------------------------------------------------------------------------------


def test_counts(taxonomy: Taxonomy) -> None:
    assert [len(tier) for tier in taxonomy.tiers[:2]] == [6, 30]
    assert len(taxonomy.tiers[2]) >= 210
    assert len(taxonomy.children("2.01")) >= 12


def test_every_category_is_complete(taxonomy: Taxonomy) -> None:
    names: Counter[str] = Counter()
    for each in taxonomy.categories.values():
        assert CHINESE.search(each.zh), each
        assert each.en.isascii(), each
        assert "\n" not in each.scope, each
        assert each.tier == 1 or ancestor(each.id, each.tier - 1) in taxonomy.categories
        names.update((each.zh, each.en))
    assert names.most_common(1)[0][1] == 1
    for leaf in taxonomy.tiers[2]:
        assert len(leaf.examples) >= 4, leaf.id
        assert len(leaf.terms) >= 8, leaf.id


def test_files_repeat_no_key() -> None:
    """Shipped files are read by a parser that would not notice."""
    for path in PROMPT_FILES:
        assert not parse_yaml(path.read_text(encoding="utf-8"), path.name).duplicates


def test_held_out_set_is_independent_of_the_examples(taxonomy: Taxonomy) -> None:
    pairs = read_labelled(HELD_OUT_FILE, taxonomy)
    assert len(pairs) >= 300
    assert len({prompt for prompt, _ in pairs}) == len(pairs)
    spread = Counter(ancestor(category, 2) for _, category in pairs)
    assert set(spread) == {each.id for each in taxonomy.tiers[1]}
    assert min(spread.values()) >= 10
    examples = [shingles(example) for leaf in taxonomy.tiers[2] for example in leaf.examples]
    for prompt, _ in pairs:
        own = shingles(prompt)
        assert max(jaccard(own, example) for example in examples) < 0.6, prompt


def test_similar_names_are_found(tmp_path: Path) -> None:
    text = overlay("2.90", "医疗与健康", "Medicine and healthy", "2.90.01", "我厂设备咨询")
    added = load_taxonomy(write(tmp_path, text))
    found = {(one.id, other.id) for one, other in similar_names(added)}
    assert ("2.01", "2.90") in found
    assert all({"2.90", "2.90.01"}.isdisjoint(pair) or pair == ("2.01", "2.90") for pair in found)


# --- overlays -----------------------------------------------------------------------------------------------

LEAF = """\
          - id: "{id}"
            zh: {zh}
            en: {zh} (en)
            scope: 本公司产品
            examples: [{zh}怎么申请退货, {zh}多久能到]
"""


def overlay(secondary: str, zh: str | None, en: str | None, leaf: str, leaf_zh: str) -> str:
    lines = [
        "version: 1",
        "primary:",
        f'  - id: "{secondary[0]}"',
        "    children:",
        f'      - id: "{secondary}"',
    ]
    if zh:
        lines += [f"        zh: {zh}", f"        en: {en}", "        scope: 本公司业务"]
    return "\n".join([*lines, "        children:\n"]) + LEAF.format(id=leaf, zh=leaf_zh)


def write(folder: Path, text: str, name: str = "own.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_overlay_adds_a_leaf_where_it_belongs(tmp_path: Path, taxonomy: Taxonomy) -> None:
    added = load_taxonomy(write(tmp_path, overlay("2.06", None, None, "2.06.90", "售后热线")))
    assert added["2.06.90"].examples == ("售后热线怎么申请退货", "售后热线多久能到")
    assert [each.id for each in added.children("2.06")][-1] == "2.06.90"
    ids = list(added.categories)
    assert ids.index("2.06.90") == ids.index("3") - 1
    assert {*added.categories} - {*taxonomy.categories} == {"2.06.90"}


def test_overlays_stack(tmp_path: Path) -> None:
    first = write(tmp_path, overlay("5.90", "我司会员", "Our members", "5.90.01", "会员积分"), "first.yaml")
    second = write(tmp_path, overlay("5.90", None, None, "5.90.02", "会员等级"), "second.yaml")
    added = load_taxonomy(first, second)
    assert [each.zh for each in added.children("5.90")] == ["会员积分", "会员等级"]
    with pytest.raises(UserError, match=r"second\.yaml:\d+: the new category 5\.90 lacks zh, en, scope"):
        load_taxonomy(second)


GOOD = overlay("2.06", None, None, "2.06.90", "售后热线")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (GOOD.replace("2.06.90", "2.05.90"), 7, "category 2.05.90 is a child of 2.06"),
        (GOOD.replace("2.06.90", "2.06.01"), 7, "the id 2.06.01 is taken"),
        (GOOD.replace('"2.06.90"', "2.06"), 7, "Input should be a valid string"),
        (GOOD.replace("2.06.90", "2.6.9"), 7, "primary.0.children.0.children.0.id"),
        (GOOD.replace("zh: 售后热线", "zh: 法律"), 8, "the name '法律' is taken by 2.02"),
        (GOOD.replace("            scope: 本公司产品\n", ""), 7, "lacks scope"),
        (GOOD.replace(", 售后热线多久能到", ""), 11, "expected two examples or more, found 1"),
        (GOOD.replace("售后热线多久能到", "光速为什么不能被超越"), 11, "stands in 1.01.01 already"),
        (GOOD.replace('"2.06"', '"2.07"'), 5, "the new category 2.07 lacks zh, en, scope"),
        (GOOD.replace('id: "2"', 'id: "2.06"'), 3, "stands at the wrong tier"),
        (GOOD.replace("version: 1", "version: 2"), 1, "version"),
        (GOOD.replace("scope:", "skope:"), 10, "skope"),
        (GOOD.replace("scope:", "zh:"), 10, "the key 'zh' stands at line 8 already"),
        (GOOD.replace("primary:", "primary: ["), 3, "not valid YAML"),
        ("version: 1\n", 1, "primary"),
        ("", 1, "the file"),
        (GOOD.replace('id: "2"', 'id: "2"\n    zh: 别的名字'), 3, "cannot be changed"),
    ],
)
def test_broken_overlays_are_named(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_taxonomy(write(tmp_path, text))
    assert re.search(rf"own\.yaml:{line}: ", str(caught.value)), caught.value
    assert message in str(caught.value)


def test_missing_overlay_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read: No such file"):
        load_taxonomy(tmp_path / "gone.yaml")


def test_unknown_id_suggests_the_nearest(taxonomy: Taxonomy) -> None:
    with pytest.raises(UserError, match=r"here:3: there is no category '2\.01\.99'\n.*did you mean 2\.01\."):
        taxonomy.check_id("2.01.99", "here:3")


# --- prompts out of data files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [
        {
            "conversations": [
                {"from": "system", "value": "你是医生"},
                {"from": "human", "value": "咳嗽怎么办"},
            ]
        },
        {"messages": [{"role": "user", "content": "咳嗽怎么办"}, {"role": "assistant", "content": "多喝水"}]},
        {"conversations": '[{"from": "human", "value": "咳嗽怎么办"}]', "chosen": "好", "rejected": "坏"},
        {"prompt": [{"role": "user", "content": "咳嗽怎么办"}], "chosen": [], "rejected": []},
        {"prompt": " 咳嗽怎么办 "},
        {"instruction": "咳嗽怎么办", "input": "", "output": "多喝水"},
        {"问题": "咳嗽怎么办", "回答": "多喝水"},
        {"text": "咳嗽怎么办"},
    ],
)
def test_prompt_of_any_layout(columns: dict[str, object]) -> None:
    assert prompt_of(columns) == "咳嗽怎么办"


@pytest.mark.parametrize(
    "columns", [{}, {"prompt": ""}, {"answer": "多喝水"}, {"messages": [{"role": "bot"}]}]
)
def test_rows_without_a_prompt(columns: dict[str, object]) -> None:
    assert prompt_of(columns) is None


def test_instruction_takes_its_input_along() -> None:
    assert prompt_of({"instruction": "翻译", "input": "你好", "output": "Hello"}) == "翻译\n你好"


def test_rows_without_a_prompt_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "在吗"}\n{"answer": "在"}\nnot json\n', "rows.jsonl")
    found = read_prompts(path)
    assert found.prompts == ["在吗"]
    assert [row.location.number for row in found.without] == [2, 3]
    assert "2 of 3 rows without a prompt" in str(found.note())
    with pytest.raises(UserError, match=r"rows\.jsonl: no row has a prompt\n.*:1: columns 'answer'"):
        read_prompts(write(tmp_path, '{"answer": "在"}\n', "rows.jsonl"))


@pytest.mark.parametrize("category", ["2.99", None, 2.01])
def test_labels_are_checked(tmp_path: Path, taxonomy: Taxonomy, category: object) -> None:
    rows = [{"prompt": "在吗", "category": "6.01"}, {"prompt": "咳嗽", "category": category}]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "labels.jsonl")
    with pytest.raises(UserError, match=r"labels\.jsonl:2: there is no category"):
        read_labelled(path, taxonomy)
