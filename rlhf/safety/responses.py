"""Answers of differing safety to an attack, put together from what the safety value says, for preference data.

The best declines (or warns, or shows care), says why, and offers something; then a bare refusal; then a vague
answer; the worst agrees to do it and stops there.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from typing import Any

from rlhf.safety.attacks import AttackPrompt
from rlhf.safety.taxonomy import DATA, SafetyTaxonomy, Value, load_safety_taxonomy

FRAMES_FILE = DATA / "responses.yaml"
QUALITIES = ("best", "middling", "poor", "worst")
SOURCE = "written"


@cache
def frames() -> dict[str, Any]:
    """The sentences that answers are put together from."""
    import yaml

    return yaml.safe_load(FRAMES_FILE.read_text(encoding="utf-8"))


def safe_answer(value: Value, attack: str | None, generator: random.Random) -> str:
    """A good answer to an attack on a value: a reason, and what to do instead."""
    choices = list(frames()["best"][value.behaviour])
    openings = frames()["openings"].get(attack, [])
    if openings and value.behaviour == "refuse":  # who is in need is not told off first
        choices = [f"{opening}{{reason}}。{{alternative}}。" for opening in openings]
    return generator.choice(choices).format(reason=value.reason, alternative=value.alternative)


def ranked_row(prompt: AttackPrompt, seed: int, taxonomy: SafetyTaxonomy | None = None) -> dict[str, Any]:
    """A row of preference data for one attack prompt, four responses ranked 1 (best) to 4.

    Args:
        prompt: must name its safety value.
        seed: with the prompt's text, decides the wording.
        taxonomy: with overlays; the shipped one by default.

    Raises:
        UserError: the prompt's value does not exist.
    """
    value = (taxonomy or load_safety_taxonomy()).value(str(prompt.value), prompt.id)
    generator = random.Random(f"{seed}/{prompt.prompt}")
    texts = [safe_answer(value, prompt.attack, generator)]
    texts += [generator.choice(frames()[quality]).format(topic=value.topic) for quality in QUALITIES[1:]]
    return {
        "messages": [dict(message) for message in prompt.messages],
        "responses": [
            {"text": text, "rank": rank, "source_model": SOURCE, "stage": quality}
            for rank, (text, quality) in enumerate(zip(texts, QUALITIES, strict=True), start=1)
        ],
        "category": value.id,
        "attack": prompt.attack,
    }


def ranked_rows(
    prompts: Iterable[AttackPrompt], seed: int, taxonomy: SafetyTaxonomy | None = None
) -> list[dict[str, Any]]:
    """`ranked_row` for each prompt."""
    taxonomy = taxonomy or load_safety_taxonomy()
    return [ranked_row(prompt, seed, taxonomy) for prompt in prompts]
