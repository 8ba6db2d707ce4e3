"""Which category a prompt belongs to: a linear model on character n-grams, one tier informing the others.

Each tier is learned by itself: ridge regression on TF-IDF of characters and pairs of them. The scores become
probabilities of the categories within the tier, and the probability of a path through the tree is the product
of its three. Summed over the paths below a category, that gives every tier a distribution that agrees with the
others: a prompt that could be any of five legal matters is still surely about law.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.progress import progress_bar
from rlhf.taxonomy.tree import Taxonomy, ancestor, tier_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

THRESHOLD = 0.4
RIDGE = 0.5
SHARPNESS = (6.0, 10.0, 20.0)
"""What a tier's scores are multiplied with before the softmax. More categories make for smaller scores."""

TERMS_A_DOCUMENT = 5
MOST_LABELLED = 20
"""Labelled prompts of one category that are learned from. The dual solution's cost grows with the cube of all."""

HEAD, TAIL = 200, 100
"""Characters read of a long prompt: what is asked stands at its beginning or end."""

BATCH = 1000

_PUNCTUATION = "《》“”：，？！、…()（）'\""
_BREAK = re.compile(r"[\s，。？！、：；“”‘’（）《》,.?!:;()\"'…]+")
_FORMULA = re.compile(r"[=+^×÷∫√]")
_HAN = re.compile(r"[\u3400-\u9fff]")
_LATIN_WORD = re.compile(r"[A-Za-z]{2,}")


def is_foreign(prompt: str) -> bool:
    """Whether a prompt is in words, and none of them Chinese: the shipped examples say nothing about those."""
    return not _HAN.search(prompt) and len(_LATIN_WORD.findall(prompt)) > 1


def ngrams(prompt: str) -> list[str]:
    """Characters and pairs of them (none across punctuation), how it begins and ends, and its punctuation.

    Numbers count as one digit: which number it is says nothing about the topic.
    """
    if len(prompt) > HEAD + TAIL:
        prompt = f"{prompt[:HEAD]} {prompt[-TAIL:]}"
    text = re.sub(r"\d+", "0", prompt.lower())
    plain = _BREAK.sub(" ", text).strip()
    grams = [
        piece[i : i + n] for piece in plain.split(" ") for n in (1, 2) for i in range(len(piece) - n + 1)
    ]
    grams += [f"^{plain[:2]}", f"{plain[-2:]}$"] if plain else []
    grams += [f"mark {mark}" for mark in text if mark in _PUNCTUATION]
    return grams + ["formula"] * bool(_FORMULA.search(text))


@dataclass(frozen=True)
class Prediction:
    """Where a prompt belongs.

    Attributes:
        path: ids of the likeliest primary, secondary and tertiary category, each below the one before.
        confidence: probability of each of them.
        threshold: probability below which a tier counts as unknown.
    """

    path: tuple[str, str, str]
    confidence: tuple[float, float, float]
    threshold: float = THRESHOLD

    def at(self, tier: int) -> str | None:
        """The category of a tier (1, 2 or 3), or None where that is unknown."""
        return self.path[tier - 1] if self.confidence[tier - 1] >= self.threshold else None

    @property
    def category(self) -> str | None:
        """The finest category that is known; None if not even the primary one is."""
        return next((found for tier in (3, 2, 1) if (found := self.at(tier))), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: category, then id and confidence of each tier's best guess."""
        return {
            "category": self.category or "unknown",
            "path": list(self.path),
            "confidence": [round(value, 4) for value in self.confidence],
        }


class Tree:
    """The tiers of a taxonomy as arrays: ids, and the index of each category's parent in the tier above."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.ids = [[each.id for each in tier] for tier in taxonomy.tiers]
        self.index = [{identity: i for i, identity in enumerate(ids)} for ids in self.ids]
        self.parents = [
            np.array([self.index[tier - 1][ancestor(identity, tier)] for identity in self.ids[tier]])
            for tier in (1, 2)
        ]

    def predictions(self, leaves: NDArray[Any], threshold: float) -> list[Prediction]:
        """The best path of each prompt, from the probabilities of the third tier, (n, leaves).

        The best category of a tier is sought below the best one of the tier above.
        """
        middle = _summed(leaves, self.parents[1], len(self.ids[1]))
        top = _summed(middle, self.parents[0], len(self.ids[0]))
        first = top.argmax(1)
        second = np.where(self.parents[0] == first[:, None], middle, -1.0).argmax(1)
        third = np.where(self.parents[1] == second[:, None], leaves, -1.0).argmax(1)
        rows = np.arange(len(leaves))
        return [
            Prediction(
                (self.ids[0][a], self.ids[1][b], self.ids[2][c]), (float(p), float(q), float(r)), threshold
            )
            for a, b, c, p, q, r in zip(
                first, second, third, top[rows, first], middle[rows, second], leaves[rows, third]
            )
        ]


class PromptClassifier:
    """Learned from the taxonomy's examples and terms, in seconds; so it is learned anew when it is needed.

    Args:
        taxonomy: what is told apart.
        labelled: more (prompt, category id) pairs; the id may be of any tier. At most 20 of a category count.
            Prompts without Chinese are unknown unless some of these are such.
    """

    def __init__(self, taxonomy: Taxonomy, labelled: Sequence[tuple[str, str]] = ()) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.kernel_ridge import KernelRidge

        self.tree = Tree(taxonomy)
        self._knows_foreign = any(is_foreign(prompt) for prompt, _ in labelled)
        pairs = [*_documents(taxonomy), *_capped(labelled)]
        self._vectorizer = TfidfVectorizer(analyzer=ngrams, sublinear_tf=True)
        features = self._vectorizer.fit_transform([text for text, _ in pairs])
        # Far more features than documents: the dual form of ridge regression is the small one.
        self._model = KernelRidge(alpha=RIDGE, kernel="linear")
        self._model.fit(features, self._targets([identity for _, identity in pairs]))

    def predict(self, prompts: Sequence[str], *, threshold: float = THRESHOLD) -> list[Prediction]:
        """The category of each prompt.

        Args:
            threshold: probability below which a tier is unknown, 0 to 1.
        """
        found: list[Prediction] = []
        with progress_bar("classifying", len(prompts)) as advance:
            for start in range(0, len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                scores = self._model.predict(self._vectorizer.transform(batch))
                leaves = self._leaves(scores)
                if not self._knows_foreign:
                    leaves[[is_foreign(prompt) for prompt in batch]] = 0.0
                found += self.tree.predictions(leaves, threshold)
                advance(len(batch))
        return found

    def _targets(self, ids: Sequence[str]) -> NDArray[Any]:
        """For every tier, 1 for the category and 0 for the others, centred; all 0 for a tier that is not known."""
        blocks = []
        for tier, index in enumerate(self.tree.index, start=1):
            known = [row for row, identity in enumerate(ids) if tier_of(identity) >= tier]
            block = np.zeros((len(ids), len(index)))
            block[known, [index[ancestor(ids[row], tier)] for row in known]] = 1.0
            block[known] -= block[known].mean(0)
            blocks.append(block)
        return np.hstack(blocks)

    def _leaves(self, scores: NDArray[Any]) -> NDArray[Any]:
        """Probability of each path, (n, leaves), from the scores of all tiers side by side."""
        ends = np.cumsum([len(ids) for ids in self.tree.ids])
        tiers = [
            _log_softmax(part * sharpness)
            for part, sharpness in zip(np.split(scores, ends[:-1], axis=1), SHARPNESS)
        ]
        second, third = self.tree.parents
        return np.exp(_log_softmax(tiers[2] + tiers[1][:, third] + tiers[0][:, second[third]]))


def _documents(taxonomy: Taxonomy) -> list[tuple[str, str]]:
    """What is learned from: examples, terms a few at a time, name with scope."""
    pairs = []
    for leaf in taxonomy.tiers[2]:
        pairs += [(example, leaf.id) for example in leaf.examples]
        starts = range(0, len(leaf.terms), TERMS_A_DOCUMENT)
        pairs += [(" ".join(leaf.terms[start : start + TERMS_A_DOCUMENT]), leaf.id) for start in starts]
        pairs.append((f"{leaf.zh} {leaf.scope}", leaf.id))
    return pairs


def _capped(labelled: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """At most so many of each category, spread evenly over the data."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for pair in labelled:
        groups[pair[1]].append(pair)
    kept = []
    for group in groups.values():
        step = max(1.0, len(group) / MOST_LABELLED)
        kept += [group[int(i * step)] for i in range(min(len(group), MOST_LABELLED))]
    return kept


def _summed(values: NDArray[Any], parents: NDArray[Any], count: int) -> NDArray[Any]:
    """Columns added up by parent: (n, children) → (n, count)."""
    sums = np.zeros((count, len(values)))
    np.add.at(sums, parents, values.T)
    return sums.T


def _log_softmax(scores: NDArray[Any]) -> NDArray[Any]:
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
