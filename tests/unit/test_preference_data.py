"""The shipped preference data: layout, coverage, gaps, and no prompt in two files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "data" / "preference"
RANKED = ("train", "validation")


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


def categories() -> set[str]:
    """Ids of the second tier of the prompt taxonomy."""
    files = sorted((ROOT / "rlhf" / "taxonomy" / "data" / "prompts").glob("*.yaml"))
    trees = [yaml.safe_load(file.read_text("utf-8")) for file in files]
    return {child["id"] for tree in trees for first in tree["primary"] for child in first["children"]}


def last_prompt(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


def pairs(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every (better, worse) pair of responses to one prompt."""
    for row in rows(name):
        yield from combinations(row["responses"], 2)


def gaps(name: str) -> Counter[int]:
    return Counter(better["score"] - worse["score"] for better, worse in pairs(name))


def bigrams(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)}


@pytest.mark.parametrize("name", [*RANKED, "prompts"])
def test_messages_alternate_and_end_with_the_user(name: str) -> None:
    for row in rows(name):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], row
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"]), row


@pytest.mark.parametrize("name", RANKED)
def test_responses_are_ranked_best_first_without_ties(name: str) -> None:
    for row in rows(name):
        assert set(row) == {"messages", "responses", "category"}
        assert 2 <= len(row["responses"]) <= 5, row
        scores = [response["score"] for response in row["responses"]]
        assert set(scores) <= set(range(1, 7)), row
        assert all(better > worse for better, worse in pairwise(scores)), row
        for response in row["responses"]:
            assert set(response) == {"text", "score", "source_model", "stage"}
            assert response["source_model"] == "written"
            assert response["stage"] in {"base", "sft", "ppo"}


def test_sizes() -> None:
    assert len(rows("train")) >= 240
    assert len(rows("validation")) >= 60
    assert len(rows("prompts")) >= 300
    ranked = [row for name in RANKED for row in rows(name)]
    assert sum(len(row["responses"]) for row in ranked) >= 3.2 * len(ranked)
    assert sum(row["category"] == "2.01" for row in ranked) >= 40


def test_every_second_tier_category_is_covered() -> None:
    known = categories()
    assert len(known) == 30
    for name, least in (("train", 7), ("validation", 2), ("prompts", 10)):
        count = Counter(row["category"] for row in rows(name))
        assert set(count) == known
        assert min(count.values()) >= least, name


def test_every_gap_occurs_often() -> None:
    train, validation = gaps("train"), gaps("validation")
    assert set(train) == set(validation) == {1, 2, 3, 4, 5}
    assert min(train.values()) >= 100
    assert min(validation.values()) >= 30  # fewer would make the accuracy by gap too coarse to show its rise


def test_no_prompt_in_two_places() -> None:
    seen = [last_prompt(row) for name in (*RANKED, "prompts") for row in rows(name)]
    assert [prompt for prompt, count in Counter(seen).items() if count > 1] == []


def test_validation_and_rollout_prompts_are_no_rewordings_of_training_prompts() -> None:
    train = [bigrams(last_prompt(row)) for row in rows("train")]
    for name in ("validation", "prompts"):
        for row in rows(name):
            own = bigrams(last_prompt(row))
            closest = max(len(own & other) / len(own | other) for other in train)
            assert closest < 0.5, last_prompt(row)


def test_no_response_is_used_twice() -> None:
    texts = [response["text"] for name in RANKED for row in rows(name) for response in row["responses"]]
    assert [text for text, count in Counter(texts).items() if count > 1] == []


@pytest.mark.parametrize("name", RANKED)
def test_length_does_not_give_the_better_response_away(name: str) -> None:
    longer_wins = [len(better["text"]) > len(worse["text"]) for better, worse in pairs(name)]
    assert 0.4 < sum(longer_wins) / len(longer_wins) < 0.6


def test_the_readme_states_the_counts_that_the_files_have() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    for name in RANKED:
        found = re.search(rf"^\| `{name}.jsonl` \| (.+) \|$", readme, re.MULTILINE)
        assert found, name
        count = gaps(name)
        responses = sum(len(row["responses"]) for row in rows(name))
        expected = [len(rows(name)), responses, *(count[gap] for gap in range(1, 6))]
        assert [int(cell) for cell in found[1].split("|")] == expected
    assert f"`prompts.jsonl`: {len(rows('prompts'))} prompts" in readme
