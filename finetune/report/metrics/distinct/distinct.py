"""Distinct-n: how little a model repeats itself."""

from __future__ import annotations

import datasets
import evaluate

_DESCRIPTION = """\
Distinct-n: different n-grams of characters as a share of all n-grams, over all answers together. A model that
is stuck in a loop, or gives every question the same answer, scores near 0. It needs no references, and falls
as text grows, so compare only texts of like length. Whitespace never counts; text too short for any n-gram
scores 0.
"""

_CITATION = """\
@inproceedings{li-etal-2016-diversity,
    title = "A Diversity-Promoting Objective Function for Neural Conversation Models",
    author = "Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill",
    booktitle = "Proceedings of NAACL-HLT",
    year = "2016",
}
"""

_INPUTS = """
Args:
    predictions (list of str): the answers.
    sizes (list of int): the n of the n-grams (default [1, 2]).
    per_item (bool): also return the lists of each answer's own score (default False).
Returns:
    distinct_N (float, 0 to 1): for each N in sizes, over all answers together.
    distinct_N_items (list of float): within each answer, if asked for.
Example:
    >>> metric = evaluate.load("finetune/report/metrics/distinct")
    >>> metric.compute(predictions=["好好好"], sizes=[1])
    {'distinct_1': 0.3333333333333333}
"""


def ngrams(text: str, size: int) -> list[str]:
    """All n-grams of `size` characters, whitespace left out."""
    text = "".join(text.split())
    return [text[i : i + size] for i in range(len(text) - size + 1)]


def distinct_share(grams: list[str]) -> float:
    """Different ones as a share of all, 0 to 1."""
    return len(set(grams)) / len(grams) if grams else 0.0


class Distinct(evaluate.Metric):
    """Distinct-n over characters, see `_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self, predictions: list[str], sizes: list[int] | None = None, per_item: bool = False
    ) -> dict[str, float | list[float]]:
        scores: dict[str, float | list[float]] = {}
        for size in sizes or [1, 2]:
            grams = [ngrams(text, size) for text in predictions]
            scores[f"distinct_{size}"] = distinct_share([g for answer in grams for g in answer])
            if per_item:
                scores[f"distinct_{size}_items"] = [distinct_share(answer) for answer in grams]
        return scores
