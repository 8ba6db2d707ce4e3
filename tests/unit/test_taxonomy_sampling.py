"""Balanced samples, entropy, near-duplicates and the treemap, against brute force and closed forms."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from finetune.errors import UserError
from rlhf.taxonomy.coverage import distinct_bigrams
from rlhf.taxonomy.sampling import (
    balanced_sample,
    entropy,
    reachable_entropy,
    secondary_counts,
    secondary_of,
    shares,
)
from rlhf.taxonomy.similarity import first_alike, jaccard, shingles
from rlhf.taxonomy.treemap import Rect, squarify

# --- shares and entropy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "size", "power", "expected"),
    [
        ({"a": 10, "b": 10}, 6, 0, {"a": 3, "b": 3}),
        ({"a": 100, "b": 2, "c": 5}, 12, 0, {"a": 5, "b": 2, "c": 5}),
        ({"a": 3, "b": 1}, 100, 0, {"a": 3, "b": 1}),
        ({"a": 90, "b": 10}, 10, 1, {"a": 9, "b": 1}),
        ({"a": 64, "b": 16}, 30, 0.5, {"a": 20, "b": 10}),
        ({"a": 5, "b": 5, "c": 5}, 4, 0, {"a": 2, "b": 1, "c": 1}),
        ({}, 4, 0, {}),
    ],
)
def test_shares(available: dict[str, int], size: int, power: float, expected: dict[str, int]) -> None:
    assert shares(available, size, power) == expected


def test_no_choice_is_more_even() -> None:
    """Brute force over every way to take `size`."""
    for counts in itertools.product(range(1, 5), repeat=3):
        available = dict(zip("abc", counts))
        for size in range(1, sum(counts) + 1):
            best = max(
                entropy(choice)
                for choice in itertools.product(*(range(count + 1) for count in counts))
                if sum(choice) == size
            )
            assert reachable_entropy(available, size) == pytest.approx(best)


def test_entropy() -> None:
    assert entropy([5, 5, 5, 5]) == pytest.approx(2.0)
    assert entropy([1, 0, 3]) == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))
    assert entropy([7]) == entropy([]) == 0


def test_secondary_counts() -> None:
    assert secondary_counts(["2.01.03", "2.01", "3.02.01", "2", None]) == {"2.01": 2, "3.02": 1}
    assert secondary_of("2") == secondary_of(None) == "unknown"


# --- samples ------------------------------------------------------------------------------------------------


def rows_of(counts: dict[str | None, int]) -> tuple[list[dict[str, str]], list[str | None]]:
    """Rows whose prompts share nothing, in mixed order."""
    rng = random.Random(1)
    pairs = [(category, index) for category, count in counts.items() for index in range(count)]
    rng.shuffle(pairs)
    letters = [chr(0x4E00 + number) for number in range(20_000)]
    rows = [{"q": "".join(letters[12 * n : 12 * n + 12])} for n in range(len(pairs))]
    return rows, [category for category, _ in pairs]


COUNTS: dict[str | None, int] = {
    "2.01.01": 300,
    "2.01.02": 100,
    "3.01.01": 50,
    "4.03.02": 9,
    "6.01": 30,
    None: 20,
}


def sample(method: str = "quota", seed: int = 7, size: int = 100, **options: object) -> list[dict[str, str]]:
    rows, categories = rows_of(COUNTS)
    return balanced_sample(
        rows,
        size=size,
        seed=seed,
        prompt=lambda row: row["q"],
        categories=categories,
        method=method,  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    )


def counted(chosen: list[dict[str, str]]) -> Counter[str | None]:
    rows, categories = rows_of(COUNTS)
    of = {row["q"]: category for row, category in zip(rows, categories)}
    return Counter(of[row["q"]] for row in chosen)


def test_quota_is_even_over_both_tiers() -> None:
    found = counted(sample())
    assert found == {"2.01.01": 12, "2.01.02": 12, "3.01.01": 24, "4.03.02": 9, "6.01": 23, None: 20} or (
        found["4.03.02"] == 9 and found[None] == 20 and abs(found["2.01.01"] - found["2.01.02"]) <= 1
    )
    secondary = Counter(secondary_of(category) for category in found.elements())
    assert (
        max(secondary.values()) - min(n for name, n in secondary.items() if name not in ("4.03", "unknown"))
        <= 1
    )


def test_entropy_of_a_sample_is_what_can_be_reached() -> None:
    rows, categories = rows_of({key: n for key, n in COUNTS.items() if key})
    chosen = balanced_sample(rows, size=120, seed=1, prompt=lambda row: row["q"], categories=categories)
    of = {row["q"]: category for row, category in zip(rows, categories)}
    found = secondary_counts(of[row["q"]] for row in chosen)
    assert entropy(found.values()) == pytest.approx(reachable_entropy(secondary_counts(categories), 120))


def test_temperature_lies_between_even_and_as_it_is() -> None:
    medical = [counted(sample("temperature", temperature=t))["2.01.01"] for t in (0.0, 0.5, 1.0)]
    assert medical == sorted(medical)
    assert medical[0] == counted(sample())["2.01.01"]
    assert medical[2] == pytest.approx(100 * 300 / sum(COUNTS.values()), abs=1)


def test_samples_are_deterministic_and_rows_unchanged() -> None:
    rows, _ = rows_of(COUNTS)
    assert sample() == sample()
    assert sample(seed=8) != sample()
    order = [rows.index(row) for row in sample()]
    assert order == sorted(set(order))


def test_a_sample_never_repeats() -> None:
    rows = ["血压高怎么办？", "血压高怎么办", "血压高，怎么办！", "推荐一本书", "推荐一本书。"]
    chosen = balanced_sample(rows, size=5, seed=3, categories=["2.01", "2.01", "2.01", "5.04", "5.04"])
    assert chosen == ["血压高怎么办？", "推荐一本书"]


def test_a_sample_classifies_by_itself() -> None:
    rows = ["孩子发烧39度怎么办", "胃疼吃什么药好", "咳嗽两周不好是怎么回事", "用Python写一个爬虫"]
    assert "用Python写一个爬虫" in balanced_sample(rows, size=2, seed=0)


@pytest.mark.parametrize("options", [{"size": 0}, {"temperature": 1.5}, {"temperature": -0.1}])
def test_impossible_samples(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"sample (size|temperature): expected"):
        sample("temperature", **options)  # type: ignore[arg-type]


# --- near-duplicates ------------------------------------------------------------------------------------------


def test_shingles() -> None:
    assert shingles("A b，C d") == {"abc", "bcd"}
    assert shingles("好") == {"好"}
    assert shingles("？！") == {"？！"}
    assert jaccard(shingles("abcd"), shingles("bcde")) == pytest.approx(1 / 3)


def test_near_duplicates_are_those_of_brute_force() -> None:
    rng = random.Random(5)
    letters = [chr(0x4E00 + number) for number in range(300)]
    originals = ["".join(rng.choices(letters, k=rng.randint(8, 40))) for _ in range(120)]
    texts = []
    for text in originals:
        texts.append(text)
        for _ in range(rng.randint(0, 2)):
            place = rng.randrange(len(text))
            texts.append(text[:place] + rng.choice(letters) + text[place + rng.randint(0, 1) :])
    rng.shuffle(texts)
    expected: list[int] = []
    for index, text in enumerate(texts):
        kept = (other for other in range(index) if expected[other] == other)
        expected.append(next((o for o in kept if jaccard(shingles(text), shingles(texts[o])) >= 0.7), index))
    assert len(set(expected)) < len(texts) - 30  # there is something to find
    assert first_alike(texts) == expected


def test_distinct_bigrams() -> None:
    assert distinct_bigrams(["好好好"]) == 0.5
    assert distinct_bigrams(["ab", "a b"]) == 0.5
    assert distinct_bigrams(["好", ""]) is None


# --- treemap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[1], [6, 6, 4, 3, 2, 2, 1], [1] * 30, [1000, 1, 1], [5, 3, 0.001]])
def test_treemap_fills_the_area_in_proportion(values: list[float]) -> None:
    area = Rect(10, 20, 600, 400)
    rects = squarify(values, area)
    assert len(rects) == len(values)
    for value, rect in zip(values, rects):
        assert rect.width * rect.height == pytest.approx(600 * 400 * value / sum(values))
        assert rect.x >= 10 - 1e-6
        assert rect.y >= 20 - 1e-6
        assert rect.x + rect.width <= 610 + 1e-6
        assert rect.y + rect.height <= 420 + 1e-6
    for one, other in itertools.combinations(rects, 2):
        across = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
        down = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
        assert across <= 1e-6 or down <= 1e-6


def test_treemap_is_squarish() -> None:
    """The example of the paper: a row-by-row slice would give sides of 16 to 1."""
    rects = squarify([6, 6, 4, 3, 2, 2, 1], Rect(0, 0, 6, 4))
    assert max(max(r.width / r.height, r.height / r.width) for r in rects) < 3


def test_treemap_of_nothing() -> None:
    assert squarify([], Rect(0, 0, 6, 4)) == []
    assert squarify([1, 2], Rect(0, 0, 0, 4))[0].width == 0
