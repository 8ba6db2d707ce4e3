"""How a data set's prompts are spread over the taxonomy, and how much they differ within each category."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.taxonomy.classifier import Prediction
from rlhf.taxonomy.sampling import entropy
from rlhf.taxonomy.similarity import first_alike
from rlhf.taxonomy.tree import TIERS, Category, Taxonomy

THIN = 0.25
"""A category is thin below this part of an even share of the tier."""

DISTINCT_SAMPLE = 100
"""Prompts that distinct bigrams are counted in: the share falls with every text, so all categories get alike."""


@dataclass(frozen=True)
class CategoryCoverage:
    """One category's part.

    Attributes:
        rows: prompts in it.
        share: of all prompts that the tier knows a category of.
        near_duplicates: prompts that nearly repeat another one of the data set.
        distinct_2: different pairs of characters as a share of all, in at most 100 prompts; None without any.
    """

    id: str
    zh: str
    en: str
    rows: int
    share: float
    near_duplicates: int
    distinct_2: float | None


@dataclass(frozen=True)
class TierCoverage:
    """One tier's part.

    Attributes:
        unknown: prompts whose category in this tier is unknown.
        entropy: in bits, over the known ones.
        max_entropy: that of an even spread over all categories of the tier.
    """

    tier: str
    categories: list[CategoryCoverage]
    unknown: int
    entropy: float
    max_entropy: float

    @property
    def evenness(self) -> float:
        """Entropy as a share of the highest possible, 0 to 1."""
        return self.entropy / self.max_entropy if self.max_entropy else 0.0

    @property
    def empty(self) -> list[CategoryCoverage]:
        """Categories without a prompt."""
        return [each for each in self.categories if not each.rows]

    @property
    def thin(self) -> list[CategoryCoverage]:
        """Categories with prompts, but less than a quarter of an even share."""
        return [each for each in self.categories if 0 < each.share < THIN / len(self.categories)]


@dataclass(frozen=True)
class Coverage:
    """What was found in one data set."""

    name: str
    rows: int
    near_duplicates: int
    tiers: list[TierCoverage]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        for written, tier in zip(found["tiers"], self.tiers):
            written |= {
                "evenness": tier.evenness,
                "empty": [each.id for each in tier.empty],
                "thin": [each.id for each in tier.thin],
            }
        return found


def measure(
    name: str, prompts: Sequence[str], predictions: Sequence[Prediction], taxonomy: Taxonomy
) -> Coverage:
    """Counts, entropy and diversity of prompts in every tier.

    Args:
        name: what the data set is called.
        predictions: the category of each prompt.
    """
    repeats = [first != index for index, first in enumerate(first_alike(prompts))]
    tiers = []
    for number, (title, categories) in enumerate(zip(TIERS, taxonomy.tiers), start=1):
        members: dict[str | None, list[int]] = defaultdict(list)
        for index, prediction in enumerate(predictions):
            members[prediction.at(number)].append(index)
        known = len(prompts) - len(members[None])
        tiers.append(
            TierCoverage(
                title,
                [_cover(each, members[each.id], known, prompts, repeats) for each in categories],
                len(members[None]),
                entropy(len(rows) for category, rows in members.items() if category),
                math.log2(len(categories)),
            )
        )
    return Coverage(name, len(prompts), sum(repeats), tiers)


def _cover(
    category: Category, rows: Sequence[int], known: int, prompts: Sequence[str], repeats: Sequence[bool]
) -> CategoryCoverage:
    return CategoryCoverage(
        category.id,
        category.zh,
        category.en,
        len(rows),
        len(rows) / known if known else 0.0,
        sum(repeats[index] for index in rows),
        distinct_bigrams([prompts[index] for index in rows[:DISTINCT_SAMPLE]]),
    )


def distinct_bigrams(texts: Sequence[str]) -> float | None:
    """Different pairs of neighbouring characters as a share of all; None where there is no pair."""
    plain = ["".join(text.split()) for text in texts]
    pairs = [text[i : i + 2] for text in plain for i in range(len(text) - 1)]
    return len(set(pairs)) / len(pairs) if pairs else None
