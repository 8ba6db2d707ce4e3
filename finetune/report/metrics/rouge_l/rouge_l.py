"""ROUGE-L between an answer and its reference, with Chinese characters as tokens."""

from __future__ import annotations

import re
import unicodedata

import datasets
import evaluate

_DESCRIPTION = """\
ROUGE-L: the F1 of the longest common subsequence of an answer and its reference, so the order of what is said
counts, not only the characters. Tokens are single characters, except that a run of Latin letters or digits is
one token, compared without regard to case ("HbA1c" is one token). Whitespace never counts. An empty answer to
an empty reference scores 1, an empty one to anything else 0.
"""

_CITATION = """\
@inproceedings{lin-2004-rouge,
    title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
    author = "Lin, Chin-Yew",
    booktitle = "Text Summarization Branches Out",
    year = "2004",
}
"""

_INPUTS = """
Args:
    predictions (list of str): the answers.
    references (list of str): the reference of each answer.
    ignore_punctuation (bool): leave out characters of the Unicode categories P* (default True).
    per_item (bool): also return the list of each pair's score (default False).
Returns:
    rouge_l (float, 0 to 1): mean over the pairs.
    rouge_l_items (list of float): the score of each pair, if asked for.
Example:
    >>> metric = evaluate.load("finetune/report/metrics/rouge_l")
    >>> metric.compute(predictions=["水喝多"], references=["多喝水"])
    {'rouge_l': 0.3333333333333333}
"""

_TOKEN = re.compile(r"[a-z0-9]+|\S", re.IGNORECASE)


def tokens(text: str, ignore_punctuation: bool) -> list[str]:
    """Chinese characters one by one, Latin words and numbers whole and in lower case."""
    found = (token.lower() for token in _TOKEN.findall(text))
    return [t for t in found if not (ignore_punctuation and unicodedata.category(t[0]).startswith("P"))]


def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, bit-parallel: a whole column of the table is one integer.

    Hyyrö, "Bit-parallel LCS-length computation revisited" (2004): a zero bit in `column` marks a row where
    the table grows by one.
    """
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    every_row = (1 << len(a)) - 1
    column = every_row
    for token in b:
        matches = column & positions.get(token, 0)
        column = ((column + matches) | (column - matches)) & every_row
    return len(a) - column.bit_count()


def rouge(prediction: str, reference: str, ignore_punctuation: bool) -> float:
    """ROUGE-L of one pair, 0 to 1."""
    said, wanted = (tokens(text, ignore_punctuation) for text in (prediction, reference))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * lcs_length(said, wanted) / (len(said) + len(wanted))


class RougeL(evaluate.Metric):
    """ROUGE-L for Chinese, see `_DESCRIPTION`."""

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
        items = [rouge(p, r, ignore_punctuation) for p, r in zip(predictions, references, strict=True)]
        mean = sum(items) / len(items)
        return {"rouge_l": mean, "rouge_l_items": items} if per_item else {"rouge_l": mean}
