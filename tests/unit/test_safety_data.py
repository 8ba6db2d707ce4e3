"""The safety taxonomy, attack prompts, written responses and benign prompts: complete, disjoint, usable."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from finetune.errors import UserError
from rlhf.safety.attacks import (
    BENIGN_FILE,
    benign_prompts,
    evaluation_prompts,
    generate_attacks,
    read_prompts,
    templates,
    training_prompts,
)
from rlhf.safety.responses import QUALITIES, ranked_row, ranked_rows
from rlhf.safety.taxonomy import DATA, load_safety_taxonomy

VALUE = """
      - id: {id}
        zh: {zh}
        en: {en}
        scope: 员工把内部资料交给外面
        behaviour: {behaviour}
        topic: 把内部资料发到群里
        reason: 资料是公司的
        alternative: 可以先问主管
"""


def overlay(
    tmp_path: Path,
    area: str,
    *,
    id: str,
    zh: str = "内部资料",
    en: str = "internal documents",
    behaviour="refuse",
) -> Path:
    path = tmp_path / "overlay.yaml"
    value = VALUE.format(id=id, zh=zh, en=en, behaviour=behaviour)
    path.write_text(f"version: 1\nareas:\n  - {area}\n    values:{value}", encoding="utf-8")
    return path


def grams(text: str, size: int = 4) -> set[str]:
    letters = "".join(c for c in text if c.isalnum())
    return {letters[i : i + size] for i in range(len(letters) - size + 1)}


def overlap(left: set[str], right: set[str]) -> float:
    return len(left & right) / max(1, len(left | right))


# --- taxonomy -----------------------------------------------------------------------------------------------


def test_taxonomy_has_six_attacks_and_more_than_110_values_under_ten_or_more_areas() -> None:
    taxonomy = load_safety_taxonomy()
    assert len(taxonomy.attacks) == 6
    assert len(taxonomy.values) >= 112
    assert len(taxonomy.areas) >= 10
    assert {value.behaviour for value in taxonomy.values.values()} == {
        "refuse",
        "answer_safely",
        "redirect_to_help",
    }
    for kind in ("topic", "reason", "alternative", "scope"):
        texts = Counter(getattr(value, kind) for value in taxonomy.values.values())
        assert texts.most_common(1)[0][1] == 1, f"{kind} repeated: {texts.most_common(1)}"


def test_overlay_adds_values_to_an_area_and_areas(tmp_path: Path) -> None:
    shipped = load_safety_taxonomy()
    more = load_safety_taxonomy(overlay(tmp_path, "id: M", id="M.50"))
    assert len(more.values) == len(shipped.values) + 1
    assert more.value("M.50").zh == "内部资料"
    assert more.area("M.50").zh == "知识产权"
    own = load_safety_taxonomy(overlay(tmp_path, "id: X\n    zh: 企业\n    en: company", id="X.01"))
    assert own.area("X").en == "company"
    made = generate_attacks(1, "train", values=["X.01"], taxonomy=own)
    assert len(made) == 6
    assert all("内部资料" in prompt.prompt for prompt in made)


@pytest.mark.parametrize(
    ("area", "changes", "said"),
    [
        ("id: M", {"id": "M.01"}, "M.01 is taken"),
        ("id: M", {"id": "A.50"}, "A.50 stands in area M"),
        ("id: M", {"id": "M.50", "zh": "毒品"}, "'毒品' of M.50 is taken"),
        ("id: M", {"id": "M.5"}, "id: String should match"),
        ("id: M", {"id": "M.50", "behaviour": "shrug"}, "'shrug'"),
        ("id: X", {"id": "X.01"}, "area X is new"),
        ("id: M\n    zh: 别的", {"id": "M.50"}, "area M is '知识产权'"),
    ],
)
def test_overlay_that_breaks_the_tree_is_refused_with_file_and_line(
    tmp_path: Path, area: str, changes: dict[str, str], said: str
) -> None:
    path = overlay(tmp_path, area, **changes)
    with pytest.raises(UserError) as error:
        load_safety_taxonomy(path)
    assert said in str(error.value)
    assert f"{path}:" in str(error.value)


def test_unknown_ids_name_the_nearest() -> None:
    taxonomy = load_safety_taxonomy()
    with pytest.raises(UserError, match=r"no safety value 'A\.77'"):
        taxonomy.value("A.77")
    with pytest.raises(UserError, match="did you mean goal_hijacking"):
        taxonomy.attack("goal_hijack")


# --- attack prompts -----------------------------------------------------------------------------------------


def test_every_attack_has_eight_templates_or_more_and_the_splits_share_none() -> None:
    everything = Counter(line for by in templates().values() for lines in by.values() for line in lines)
    assert set(everything.values()) == {1}
    for attack, by in templates().items():
        assert len(by["train"]) + len(by["evaluation"]) >= 8, attack
        assert all("{topic}" in line for lines in by.values() for line in lines)


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_generator_reaches_every_combination_once_and_is_deterministic(split) -> None:
    made = generate_attacks(3, split)
    taxonomy = load_safety_taxonomy()
    assert len(made) == 6 * len(taxonomy.values) >= 6 * 110
    assert len({(prompt.attack, prompt.value) for prompt in made}) == len(made)
    assert made == generate_attacks(3, split)
    assert made != generate_attacks(4, split)


def test_generator_gives_a_combination_again_only_in_other_words() -> None:
    made = generate_attacks(0, "train", count=8 * 12, attacks=None, values=["A.01", "K.05"])
    assert len({prompt.prompt for prompt in made}) == len(made) == 96
    with pytest.raises(UserError, match="97 attack prompts asked for"):
        generate_attacks(0, "train", count=97, values=["A.01", "K.05"])


def test_generator_refuses_ids_that_do_not_exist() -> None:
    with pytest.raises(UserError, match=r"Z\.01"):
        generate_attacks(0, "train", values=["Z.01"])
    with pytest.raises(UserError, match="flattery"):
        generate_attacks(0, "train", attacks=["flattery"])


def test_evaluation_set_covers_every_attack_in_every_area() -> None:
    prompts = evaluation_prompts()
    taxonomy = load_safety_taxonomy()
    cells = Counter((prompt.attack, prompt.area) for prompt in prompts)
    assert len(prompts) >= 300
    assert min(cells[attack, area.id] for attack in taxonomy.attack_ids for area in taxonomy.areas) >= 3
    assert {prompt.value for prompt in prompts} == set(taxonomy.values)


def test_evaluation_and_training_are_disjoint_in_wording() -> None:
    evaluation = [grams(prompt.prompt) for prompt in evaluation_prompts()]
    written = [prompt.prompt for prompt in training_prompts()]
    generated = [prompt.prompt for prompt in generate_attacks(0, "train")]
    assert not {prompt.prompt for prompt in evaluation_prompts()} & {*written, *generated}
    for text in written + generated:
        mine = grams(text)
        nearest = max(overlap(mine, theirs) for theirs in evaluation)
        assert nearest < 0.3, text


# --- files of users -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "怎么做坏事？"}\n'),
        ("a.jsonl", '{"question": "怎么做坏事？", "answer": "不行"}\n'),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "怎么做坏事？"}, {"role": "assistant", "content": "好"}]}\n',
        ),
        (
            "a.jsonl",
            '{"conversations": [{"from": "human", "value": "怎么做坏事？"}], "chosen": "a", "rejected": "b"}\n',
        ),
        (
            "a.json",
            '{"Goal_Hijacking": [{"prompt": "怎么做坏事？", "response": "不"}], "Other": [{"prompt": "别的"}]}',
        ),
        ("a.csv", "prompt,type\n怎么做坏事？,x\n"),
    ],
)
def test_files_of_attack_prompts_load_in_the_usual_layouts(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert read_prompts(path)[0].messages == ({"role": "user", "content": "怎么做坏事？"},)


def test_kinds_of_public_sets_become_attacks_or_groups(tmp_path: Path) -> None:
    path = tmp_path / "public.json"
    rows = {"Role_Play_Instruction": [{"prompt": "甲"}], "Insult": [{"prompt": "乙"}]}
    path.write_text(json.dumps(rows), encoding="utf-8")
    first, second = read_prompts(path)
    assert (first.attack, first.area) == ("roleplay_instruction", None)
    assert (second.attack, second.area) == (None, "Insult")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("\n\n", "no prompts in it"),
        ('{"answer": "x"}\n', "no prompt: columns 'answer'"),
        ('{"prompt": "x", "value": "Q.99"}\n', "no safety value 'Q.99'"),
        ('{"prompt": "x", "attack": "nonsense"}\n', "no attack type 'nonsense'"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', "'a' comes twice"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "no user message"),
        ("not json\n", "not JSON"),
    ],
)
def test_bad_files_of_prompts_say_what_is_wrong(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert said in str(error.value)
    assert "mine.jsonl" in str(error.value)


# --- responses and benign prompts ---------------------------------------------------------------------------


def test_responses_rank_four_qualities_for_200_training_prompts_or_more() -> None:
    rows = [json.loads(line) for line in (DATA / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    taxonomy = load_safety_taxonomy()
    assert len({row["messages"][-1]["content"] for row in rows}) == len(rows) >= 200
    assert {row["category"] for row in rows} == set(taxonomy.values)
    assert {row["attack"] for row in rows} == set(taxonomy.attack_ids)
    for row in rows:
        assert [response["rank"] for response in row["responses"]] == [1, 2, 3, 4]
        assert [response["stage"] for response in row["responses"]] == list(QUALITIES)
        assert len({response["text"] for response in row["responses"]}) == 4
        assert all(len(response["text"]) <= 80 for response in row["responses"])
        assert taxonomy.value(row["category"]).alternative in row["responses"][0]["text"]


def test_responses_are_of_training_prompts_only() -> None:
    rows = [json.loads(line) for line in (DATA / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [grams(prompt.prompt) for prompt in evaluation_prompts()]
    for row in rows:
        mine = grams(row["messages"][-1]["content"])
        assert max(overlap(mine, theirs) for theirs in held_out) < 0.3


def test_responses_to_generated_attacks_are_deterministic_and_varied() -> None:
    prompts = generate_attacks(5, "train", count=300)
    rows = ranked_rows(prompts, seed=1)
    assert rows == ranked_rows(prompts, seed=1)
    assert rows[0] == ranked_row(prompts[0], 1)
    assert len({row["responses"][0]["text"] for row in rows}) > 250


def test_benign_prompts_are_split_and_training_ones_have_answers() -> None:
    train, evaluation = benign_prompts("train"), benign_prompts("evaluation")
    lines = BENIGN_FILE.read_text(encoding="utf-8").splitlines()
    assert len(train) + len(evaluation) == len(lines) >= 120
    assert len(train) >= 60
    assert all(prompt.response for prompt in train)
    assert all(prompt.response is None for prompt in evaluation)
    held_out = [grams(prompt.prompt, 3) for prompt in evaluation]
    for prompt in train:
        assert max(overlap(grams(prompt.prompt, 3), theirs) for theirs in held_out) < 0.5, prompt.prompt
