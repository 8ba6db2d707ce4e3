"""Data aimed at what red-teaming found: whom it is about, what it holds, and what it must never hold."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import UserError
from finetune.recipe import load_pipeline
from rlhf.safety.aim import Answered, aimed_files, choose_target
from rlhf.safety.aim_stage import read_answered
from rlhf.safety.attacks import benign_prompts, evaluation_prompts, generate_attacks, training_prompts
from rlhf.safety.judges import load_judge
from rlhf.safety.redteam import assess
from rlhf.safety.responses import frames
from rlhf.safety.taxonomy import load_safety_taxonomy

TAXONOMY = load_safety_taxonomy()
REFUSAL, CONSENT = "抱歉，这个我不能帮忙。", "好的，步骤如下：首先……（此处省略）"
ORDINARY = [
    Answered([{"role": "user", "content": f"怎样煮{n}个鸡蛋？"}], "水开以后煮十分钟。") for n in range(40)
]


def made_result(unsafe: str) -> dict[str, Any]:
    """The model is unsafe where the value is of these areas, and safe elsewhere."""
    prompts = evaluation_prompts()
    answers = [CONSENT if str(p.value)[0] in unsafe else REFUSAL for p in prompts]
    return assess(prompts, answers, judge=load_judge("rules"))


def made_files(**changed: Any) -> dict[str, list[dict[str, Any]]]:
    target = choose_target(made_result("AB"), TAXONOMY, at_most=0.5)
    settings: dict[str, Any] = {
        "asked": [],
        "benign": ORDINARY[:5],
        "ordinary": ORDINARY,
        "dpo_prompts": 60,
        "reward_prompts": 90,
        "ppo_prompts": 70,
        "ordinary_share": 0.25,
        "seed": 1,
    }
    return aimed_files(target, TAXONOMY, **{**settings, **changed})


def prompts_of(rows: list[dict[str, Any]]) -> set[str]:
    return {row["messages"][-1]["content"] for row in rows}


def test_it_aims_at_what_was_vulnerable() -> None:
    found = choose_target(made_result("AB"), TAXONOMY, at_most=0.5)
    assert {value[0] for value in found.values} == {"A", "B"}
    assert found.note == ""
    rows = made_files()["dpo.jsonl"]
    attacked = [row for row in rows if row.get("attack")]
    assert {row["category"][0] for row in attacked} == {"A", "B"}
    assert len({row["attack"] for row in attacked}) == 6


def test_where_nothing_is_vulnerable_it_aims_at_everything_and_says_so() -> None:
    found = choose_target(made_result(""), TAXONOMY, at_most=0.5)
    assert found.values == list(TAXONOMY.values)
    assert "safe in at most 50%" in found.note
    assert f"aiming at all {len(TAXONOMY.values)}" in found.note
    nothing = {"summary": {"values": {}}}
    assert "names no safety values" in choose_target(nothing, TAXONOMY, at_most=0.5).note


def test_values_of_the_users_choice_must_exist() -> None:
    result = made_result("A")
    assert choose_target(result, TAXONOMY, at_most=0.5, values=["D.01", "D.02", "D.01"]).values == [
        "D.01",
        "D.02",
    ]
    with pytest.raises(UserError, match=r"aim.values: no safety value 'D.99'"):
        choose_target(result, TAXONOMY, at_most=0.5, values=["D.99"])
    with pytest.raises(UserError, match=r"red-team result: no safety value 'X.01'"):
        choose_target({"summary": {"values": {"X.01": {"safe_rate": {"rate": 0.0}}}}}, TAXONOMY, at_most=0.5)


def test_nothing_that_the_model_was_judged_on_is_trained_on() -> None:
    judged = {p.prompt for p in evaluation_prompts()} | {p.prompt for p in benign_prompts("evaluation")}
    everything = made_files(
        dpo_prompts=10_000, reward_prompts=3000, ppo_prompts=10_000,
        benign=[Answered(list(p.messages), str(p.response)) for p in benign_prompts("train")],
    )  # fmt: skip
    assert not judged & set().union(*map(prompts_of, everything.values()))
    # A user may red-team with prompts of the training split: those are left out, too.
    asked = [p.prompt for p in [*training_prompts()[:50], *generate_attacks(1, "train", count=200)]]
    kept = made_files(asked=asked, dpo_prompts=10_000, reward_prompts=3000, ppo_prompts=10_000)
    assert not set(asked) & set().union(*map(prompts_of, kept.values()))
    # Or with some of what is to be answered.
    asked = [p.messages[-1]["content"] for p in ORDINARY[3:7]]
    kept = made_files(asked=asked)
    assert not set(asked) & set().union(*map(prompts_of, kept.values()))
    assert (len(kept["helpful.jsonl"]), len(kept["benign.jsonl"])) == (36, 3)


def test_shares_sizes_and_answers() -> None:
    files = made_files()
    assert {name: len(rows) for name, rows in files.items()} == {
        "dpo.jsonl": 80,
        "harmless.jsonl": 120,
        "helpful.jsonl": 40,
        "benign.jsonl": 5,
        "attacks.jsonl": 70,
    }
    refusals = set(frames()["middling"])
    for row in files["helpful.jsonl"]:
        good, bad = row["responses"]
        assert good["text"] == "水开以后煮十分钟。"
        assert (good["rank"], bad["rank"]) == (1, 2)
        assert bad["text"] in refusals
    assert not prompts_of(files["attacks.jsonl"]) & prompts_of(files["harmless.jsonl"])
    areas = Counter(row["value"][0] for row in files["attacks.jsonl"])
    assert len(areas) == len(TAXONOMY.areas), "PPO's attacks are on all values"


def test_harmlessness_knows_answers_off_the_topic() -> None:
    attacked = [row for row in made_files()["harmless.jsonl"] if row.get("attack")]
    for row in attacked:
        assert [r["rank"] for r in row["responses"]] == [1, 2, 3, 4, 3]
        assert row["responses"][-1]["text"] == "水开以后煮十分钟。"
    assert made_files(ordinary=[])["harmless.jsonl"], "and does without them where there is nothing ordinary"


def test_the_seed_decides() -> None:
    assert made_files() == made_files()
    assert made_files()["attacks.jsonl"] != made_files(seed=2)["attacks.jsonl"]


def test_good_answers_are_read_of_conversations_and_preferences() -> None:
    ranked = read_answered("examples/data/preference/validation.jsonl")
    talks = read_answered("examples/data/medical/validation.jsonl")
    assert len(ranked) == 68
    assert len(talks) == 111
    assert all(each.messages[-1]["role"] == "user" and each.answer for each in [*ranked, *talks])


@pytest.mark.parametrize("base", ["baichuan2-7b-chat", "baichuan2-nano"])
def test_every_step_of_the_recipe_goes_on_from_what_earlier_ones_leave(base: str) -> None:
    root = Path(__file__).resolve().parents[2]
    steps = load_pipeline(root / "recipes" / "safety_alignment.yaml", [f"model.base={base}"])
    assert [s.stage for s in steps] == ["sft", "redteam", "aim", "dpo", "reward", "reward", "ppo", "redteam"]
    left: set[Path] = set()
    for step in steps:
        named = {Path(found) for found in re.findall(r"runs/safety_alignment/[\w./]+", step.dump())}
        used = named - {Path(step.output_dir)}
        folders = {path if path in left else path.parent for path in used}
        assert folders <= left, f"{step.name} uses {folders - left}"
        left.add(Path(step.output_dir))
    ends = [step.model_dump() for step in steps if step.stage == "redteam"]
    assert ends[0]["redteam"] | {"compare": None} == ends[1]["redteam"] | {"compare": None}, "asked alike"
