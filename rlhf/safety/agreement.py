"""How far a judge agrees with people: a confusion matrix over the hand-labelled answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rlhf.safety.judges import LABELS, Exchange, Judge
from rlhf.safety.rules import judge_refusal
from rlhf.safety.taxonomy import DATA

JUDGED_FILE = DATA / "judged.jsonl"
REFUSAL_LABELS = ("refuses", "answers", "unjudged")


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer that a person judged.

    Attributes:
        label: safe, unsafe or unjudged; None for an answer to a harmless prompt.
        refuses: whether it declines something; None where it says nothing.
        kind: what makes it easy or hard, such as `refusal_then_comply`.
        split: the rules were made looking at `development`; the answers of `held_out` were written after them.
    """

    id: str
    language: str
    prompt: str
    answer: str
    label: str | None
    refuses: bool | None
    kind: str
    split: str

    @property
    def exchange(self) -> Exchange:
        """As judges take it."""
        return Exchange(({"role": "user", "content": self.prompt},), self.answer)


@dataclass(frozen=True)
class Agreement:
    """Counts of (label by hand, label by the judge).

    Attributes:
        labels: the order of rows and columns.
        counts: how often each pair came.
        mistakes: the answers that were judged differently, with the judge's label and reason.
    """

    labels: tuple[str, ...]
    counts: Counter[tuple[str, str]]
    mistakes: list[tuple[LabelledAnswer, str, str]]

    @property
    def total(self) -> int:
        """Answers judged."""
        return sum(self.counts.values())

    @property
    def rate(self) -> float:
        """Share of answers with the same label; nan for none."""
        same = sum(self.counts[label, label] for label in self.labels)
        return same / self.total if self.total else float("nan")

    def table(self) -> str:
        """The matrix as text: rows by hand, columns by the judge."""
        width = max(map(len, self.labels)) + 2
        head = " " * (width + 8) + "".join(label.rjust(width) for label in self.labels)
        rows = [
            f"by hand {label.ljust(width)}"
            + "".join(str(self.counts[label, said]).rjust(width) for said in self.labels)
            for label in self.labels
        ]
        return "\n".join([head, *rows, f"agreement {self.rate:.1%} of {self.total}"])


@cache
def labelled_answers() -> tuple[LabelledAnswer, ...]:
    """The hand-labelled answers, in Chinese and English, borderline ones included."""
    lines = JUDGED_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(LabelledAnswer(**json.loads(line)) for line in lines)


def safety_agreement(judge: Judge, answers: Sequence[LabelledAnswer]) -> Agreement:
    """How a judge does on answers to attack prompts (those with a label)."""
    answers = [answer for answer in answers if answer.label is not None]
    verdicts = judge([answer.exchange for answer in answers])
    return _compare(
        LABELS, [(a, str(a.label), v.label, v.reason) for a, v in zip(answers, verdicts, strict=True)]
    )


def refusal_agreement(answers: Sequence[LabelledAnswer]) -> Agreement:
    """How the rules do at telling refusals from answers, for over-refusal."""
    by_hand = {True: "refuses", False: "answers", None: "unjudged"}
    rows = [(a, by_hand[a.refuses], judge_refusal(a.prompt, a.answer), "") for a in answers]
    return _compare(REFUSAL_LABELS, rows)


def _compare(labels: tuple[str, ...], rows: Sequence[tuple[LabelledAnswer, str, str, str]]) -> Agreement:
    counts = Counter((by_hand, said) for _, by_hand, said, _ in rows)
    mistakes = [(answer, said, reason) for answer, by_hand, said, reason in rows if by_hand != said]
    return Agreement(labels, counts, mistakes)
