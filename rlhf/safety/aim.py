"""Data aimed at what red-teaming found: preferences for DPO and reward models, and prompts for PPO.

Attacks come with answers of four qualities, the safe ones best (`responses.ranked_row`). Ordinary prompts, and
harmless ones that look dangerous, come with a good answer set against a refusal: without them a model learns to
refuse everything. Prompts that the model was judged on are never among them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from finetune.data.records import Message
from rlhf.safety.attacks import AttackPrompt, generate_attacks, templates, training_prompts
from rlhf.safety.responses import QUALITIES, SOURCE, frames, ranked_rows
from rlhf.safety.results import vulnerable_values
from rlhf.safety.taxonomy import SafetyTaxonomy

Rows = list[dict[str, Any]]

DPO_FILE = "dpo.jsonl"
HARMLESS_FILE = "harmless.jsonl"
HELPFUL_FILE = "helpful.jsonl"
BENIGN_FILE = "benign.jsonl"
ATTACKS_FILE = "attacks.jsonl"

POOR = QUALITIES.index("poor") + 1


@dataclass(frozen=True)
class Target:
    """The safety values that data is aimed at.

    Attributes:
        values: their ids, the most vulnerable first.
        note: what the user should know about how they were chosen; empty where they were found vulnerable.
    """

    values: list[str]
    note: str = ""


def choose_target(
    result: dict[str, Any], taxonomy: SafetyTaxonomy, *, at_most: float, values: Sequence[str] | None = None
) -> Target:
    """What to aim at: the values asked for, else the vulnerable ones, else all of them.

    Args:
        result: of red-teaming.
        taxonomy: knows the values.
        at_most: safe rate of a vulnerable value.
        values: ids of the user's choice.

    Raises:
        UserError: an id that does not exist.
    """
    if values is not None:
        return Target([taxonomy.value(v, "aim.values").id for v in dict.fromkeys(values)])
    judged = result["summary"]["values"]
    found = [
        taxonomy.value(v, "red-team result").id for v in vulnerable_values(result["summary"], at_most=at_most)
    ]
    if found:
        return Target(found)
    why = (
        f"none of the {len(judged)} safety values that were asked about is safe in at most {at_most:.0%} of answers"
        if judged
        else "the red-team result names no safety values"
    )
    return Target(list(taxonomy.values), f"{why}: aiming at all {len(taxonomy.values)}")


def aimed_files(
    target: Target,
    taxonomy: SafetyTaxonomy,
    *,
    asked: Iterable[str],
    benign: Sequence[Answered],
    ordinary: Sequence[Answered],
    dpo_prompts: int,
    reward_prompts: int,
    ppo_prompts: int,
    ordinary_share: float,
    seed: int,
) -> dict[str, Rows]:
    """The rows of each file, by its name.

    Args:
        target: values that the data for DPO is about; the other files are about all values.
        taxonomy: with overlays.
        asked: what the user said last in each prompt that the model was judged on: left out.
        benign: harmless prompts that look dangerous.
        ordinary: other prompts without an attack, in the order in which they are taken.
        dpo_prompts, reward_prompts, ppo_prompts: at most so many attacks each; those of reward and PPO differ.
        ordinary_share: share of ordinary rows beside attacks, for DPO and harmlessness.
        seed: decides prompts and wordings.

    Returns:
        `dpo.jsonl` (ranked answers), `harmless.jsonl` (the same on all values, with answers off the topic),
        `helpful.jsonl` and `benign.jsonl` (good answers against refusals), `attacks.jsonl` (prompts).
    """
    left_out = set(asked)
    own = [p for p in training_prompts() if p.prompt not in left_out]
    generated = _unseen(generate_attacks(seed, "train", count=_most(taxonomy), taxonomy=taxonomy), left_out)
    aimed = set(target.values)
    for_dpo = _alternating(
        [p for p in own if p.value in aimed], [p for p in generated if p.value in aimed], dpo_prompts
    )
    for_reward = _alternating(own, generated, reward_prompts)
    taken = {p.prompt for p in for_reward}
    for_ppo = [p for p in generated if p.prompt not in taken][:ppo_prompts]
    ordinary = [p for p in ordinary if p.messages[-1]["content"] not in left_out]
    benign = [p for p in benign if p.messages[-1]["content"] not in left_out]
    answers = answered_rows(ordinary, seed)
    return {
        DPO_FILE: _mixed(ranked_rows(for_dpo, seed, taxonomy), answers, ordinary_share, seed),
        HARMLESS_FILE: _mixed(
            with_off_topic(ranked_rows(for_reward, seed, taxonomy), ordinary, seed),
            answers,
            ordinary_share,
            seed,
        ),
        HELPFUL_FILE: answers,
        BENIGN_FILE: answered_rows(benign, seed),
        ATTACKS_FILE: [prompt_row(p) for p in for_ppo],
    }


@dataclass(frozen=True)
class Answered:
    """A prompt that is to be answered, and a good answer."""

    messages: list[Message]
    answer: str
    category: str | None = None


def answered_rows(prompts: Iterable[Answered], seed: int) -> Rows:
    """Preference rows: a good answer ranked before a refusal."""
    return [
        {
            "messages": [dict(message) for message in prompt.messages],
            "responses": [
                {"text": prompt.answer, "rank": 1, "source_model": SOURCE, "stage": "answer"},
                {
                    "text": refusal(prompt.messages, seed),
                    "rank": 2,
                    "source_model": SOURCE,
                    "stage": "refusal",
                },
            ],
            "category": prompt.category,
        }
        for prompt in prompts
    ]


def with_off_topic(rows: Rows, answered: Sequence[Answered], seed: int) -> Rows:
    """Attacks with one more answer, no better than an evasive one: what is good as an answer to something else.

    A reward model that has seen none takes whatever does not comply for harmless.
    """
    if not answered:
        return rows
    generator = random.Random(seed)
    return [
        {
            **row,
            "responses": [
                *row["responses"],
                {
                    "text": generator.choice(answered).answer,
                    "rank": POOR,
                    "source_model": SOURCE,
                    "stage": "off_topic",
                },
            ],
        }
        for row in rows
    ]


def refusal(messages: Sequence[Message], seed: int) -> str:
    """A bare refusal, the same for the same prompt and seed."""
    return str(random.Random(f"{seed}/{messages[-1]['content']}").choice(frames()["middling"]))


def prompt_row(prompt: AttackPrompt) -> dict[str, Any]:
    """An attack as a row of a file of prompts."""
    return {
        "messages": [dict(message) for message in prompt.messages],
        "attack": prompt.attack,
        "value": prompt.value,
    }


def _most(taxonomy: SafetyTaxonomy) -> int:
    """Prompts that can be generated for training."""
    wordings = min(len(templates()[attack]["train"]) for attack in taxonomy.attack_ids)
    return wordings * len(taxonomy.attack_ids) * len(taxonomy.values)


def _unseen(prompts: Iterable[AttackPrompt], left_out: set[str]) -> list[AttackPrompt]:
    """Those that were not asked, each text once."""
    return list({p.prompt: p for p in prompts if p.prompt not in left_out}.values())


def _alternating(
    first: Sequence[AttackPrompt], second: Sequence[AttackPrompt], count: int
) -> list[AttackPrompt]:
    """So many of both, in turn as long as both last: written prompts differ more than generated ones."""
    mixed = [p for p in chain.from_iterable(zip_longest(first, second)) if p is not None]
    return mixed[:count]


def _mixed(attacks: Rows, answers: Rows, share: float, seed: int) -> Rows:
    """Attacks with so many other rows that these have the share, or with all of them where they are fewer."""
    rows = [*attacks, *answers[: round(len(attacks) * share / (1 - share))]]
    random.Random(seed).shuffle(rows)
    return rows
