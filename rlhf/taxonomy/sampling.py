"""Balanced samples: as even over the categories as the data allows, without near-duplicates."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune.data.sampling import UNKNOWN
from finetune.errors import UserError

if TYPE_CHECKING:
    from rlhf.taxonomy.tree import Taxonomy

T = TypeVar("T")
K = TypeVar("K")

Method = Literal["quota", "temperature"]
TEMPERATURE = 0.3


def balanced_sample(
    rows: Sequence[T],
    *,
    size: int,
    seed: int,
    prompt: Callable[[T], str] = str,
    method: Method = "quota",
    temperature: float = TEMPERATURE,
    categories: Sequence[str | None] | None = None,
) -> list[T]:
    """A sample of rows, balanced over the categories of their prompts.

    The rows that nearly repeat an earlier one are left out first. Then the size is shared out among the
    secondary categories, and each one's share among its tertiary categories; what a category cannot fill goes
    to the others. Prompts of unknown category share one place among the secondary ones.

    Args:
        rows: any objects, such as records, rows of a table, or the prompts themselves.
        size: rows wanted; fewer come back where fewer differ.
        seed: decides which rows of a category are taken.
        prompt: what a row asks.
        method: "quota" gives each category the same share; "temperature" gives it one in proportion to its
            number of rows to the power of `temperature`: 0 is the same for all, 1 leaves the mix as it is.
        categories: id of each row's category, of any tier, None where unknown. By default the classifier
            that the shipped taxonomy makes decides.

    Returns:
        The sampled rows, unchanged, in the order in which they stood.

    Raises:
        UserError: `size` is not positive, or `temperature` is outside 0 to 1.
    """
    prompts = [prompt(row) for row in rows]
    if categories is None:
        categories = classified(prompts)
    chosen, _ = balanced_indices(
        prompts, categories, size=size, seed=seed, method=method, temperature=temperature
    )
    return [rows[index] for index in chosen]


def balanced_indices(
    prompts: Sequence[str],
    categories: Sequence[str | None],
    *,
    size: int,
    seed: int,
    method: Method = "quota",
    temperature: float = TEMPERATURE,
) -> tuple[list[int], list[int]]:
    """What `balanced_sample` takes, by index, and for each prompt the index of the first that it nearly repeats.

    Raises:
        UserError: as `balanced_sample`.
    """
    from rlhf.taxonomy.similarity import first_alike

    if size < 1:
        raise UserError(f"sample size: expected 1 or more, found {size}")
    if not 0 <= temperature <= 1:
        raise UserError(f"sample temperature: expected a number from 0 to 1, found {temperature}")
    power = 0.0 if method == "quota" else temperature
    firsts = first_alike(prompts)
    kept = [index for index, first in enumerate(firsts) if index == first]
    rng = random.Random(seed)
    rng.shuffle(kept)
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index in kept:
        category = categories[index]
        groups[secondary_of(category)][category or UNKNOWN].append(index)
    chosen: list[int] = []
    totals = {name: sum(map(len, parts.values())) for name, parts in groups.items()}
    for name, share in shares(totals, size, power).items():
        parts = groups[name]
        for part, count in shares({key: len(each) for key, each in parts.items()}, share, power).items():
            chosen += parts[part][:count]
    return sorted(chosen), firsts


def classified(prompts: Sequence[str], taxonomy: Taxonomy | None = None) -> list[str | None]:
    """The category of each prompt by the classifier that a taxonomy makes, the shipped one by default."""
    from rlhf.taxonomy.classifier import PromptClassifier
    from rlhf.taxonomy.tree import load_taxonomy

    return [found.category for found in PromptClassifier(taxonomy or load_taxonomy()).predict(prompts)]


def secondary_of(category: str | None) -> str:
    """Id of the secondary category that an id lies in; "unknown" where only a primary one is known, or none."""
    parts = (category or "").split(".")
    return ".".join(parts[:2]) if len(parts) > 1 else UNKNOWN


def shares(available: Mapping[K, int], size: int, power: float = 0.0) -> dict[K, int]:
    """How many to take of each: in proportion to available ** power, never more than there are.

    What one cannot fill is shared among the others, so that min(size, all there are) are taken.

    Args:
        available: how many there are of each.
        power: 0 shares evenly, 1 in proportion.
    """
    open_ones = sorted(available, key=lambda name: (-available[name], str(name)))
    left = min(size, sum(available.values()))
    taken: dict[K, int] = {}
    while True:
        unit = left / (sum(available[name] ** power for name in open_ones) or 1.0)
        quotas = {name: unit * available[name] ** power for name in open_ones}
        full = [name for name in open_ones if quotas[name] >= available[name]]
        if not full:
            break
        taken |= {name: available[name] for name in full}
        left -= sum(available[name] for name in full)
        open_ones = [name for name in open_ones if name not in taken]
    taken |= {name: math.floor(quota) for name, quota in quotas.items()}
    # Largest remainders first; among equal ones the order above decides.
    by_remainder = sorted(open_ones, key=lambda name: math.floor(quotas[name]) - quotas[name])
    for name in by_remainder[: left - sum(taken[name] for name in open_ones)]:
        taken[name] += 1
    return taken


def entropy(counts: Iterable[int]) -> float:
    """Shannon entropy of a distribution given as counts, in bits."""
    present = [count for count in counts if count]
    total = sum(present)
    return -sum(count / total * math.log2(count / total) for count in present)


def reachable_entropy(available: Mapping[Any, int], size: int) -> float:
    """The highest entropy, in bits, that any choice of `size` out of what is available can have."""
    return entropy(shares(available, size).values())


def secondary_counts(categories: Iterable[str | None]) -> Counter[str]:
    """Rows of each secondary category, those of unknown category left out."""
    counts = Counter(secondary_of(category) for category in categories)
    del counts[UNKNOWN]
    return counts
