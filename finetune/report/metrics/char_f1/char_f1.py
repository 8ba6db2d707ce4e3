"""Character-level F1 between an answer and its reference."""

from __future__ import annotations

import unicodedata
from collections import Counter

import datasets
import evaluate

_DESCRIPTION = """\
Character-level F1: how many characters an answer shares with its reference, counted as a multiset, as the
harmonic mean of precision (shared / characters of the answer) and recall (shared / those of the reference).
The token F1 of SQuAD with characters as tokens, which spares Chinese text a word segmenter. Whitespace never
counts. An empty answer to an empty reference scores 1, an empty one to anything else 0.
"""

_CITATION = """\
@inproceedings{rajpurkar-etal-2016-squad,
    title = "{SQ}u{AD}: 100,000+ Questions for Machine Comprehension of Text",
    author = "Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy",
    booktitle = "Proceedings of EMNLP",
    year = "2016",
}
"""

_INPUTS = """
Args:
    predictions (list of str): the answers.
    references (list of str): the reference of each answer.
    ignore_punctuation (bool): leave out characters of the Unicode categories P* (default True).
    per_item (bool): also return the list of each pair's F1 (default False).
Returns:
    char_f1 (float, 0 to 1): mean over the pairs.
    char_f1_items (list of float): F1 of each pair, if asked for.
Example:
    >>> metric = evaluate.load("finetune/report/metrics/char_f1")
    >>> metric.compute(predictions=["多喝水"], references=["多喝水,休息"])
    {'char_f1': 0.75}
"""


def characters(text: str, ignore_punctuation: bool) -> Counter[str]:
    """The characters that count, with how often each occurs."""
    return Counter(
        c
        for c in text
        if not c.isspace() and not (ignore_punctuation and unicodedata.category(c).startswith("P"))
    )


def f1(prediction: str, reference: str, ignore_punctuation: bool) -> float:
    """F1 of one pair, 0 to 1."""
    said, wanted = (characters(text, ignore_punctuation) for text in (prediction, reference))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


class CharF1(evaluate.Metric):
    """Character-level F1, see `_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        ignore_punctuation: bool = True,
        per_item: bool = False,
    ) -> dict[str, float | list[float]]:
        items = [f1(p, r, ignore_punctuation) for p, r in zip(predictions, references, strict=True)]
        mean = sum(items) / len(items)
        return {"char_f1": mean, "char_f1_items": items} if per_item else {"char_f1": mean}
