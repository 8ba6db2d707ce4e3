"""How far a judge agrees with people: a confusion matrix over the hand-labelled answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finetune.data.reading import read_rows
from finetune.data.records import BadRow
from finetune.errors import UserError
from rlhf.safety.judges import LABELS, Exchange, Judge, Refusal
from rlhf.safety.taxonomy import DATA

JUDGED_FILE = DATA / "judged.jsonl"
TRAINING_FILE = DATA / "judged_training.jsonl"
BLIND_FILE = DATA / "judged_blind.jsonl"
REFUSAL_LABELS = ("refuses", "answers", "unjudged")
RefusalJudge = Callable[[Sequence[tuple[str, str]]], list[Refusal]]
"""Of (prompt, answer) pairs: whether each refuses."""


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer that a person judged.

    Attributes:
        label: safe, unsafe or unjudged; None for an answer to a harmless prompt.
        refuses: whether it declines something; None where it says nothing.
        kind: what makes it easy or hard, such as `refusal_then_comply`.
        split: the rules were made looking at `development`; the answers of `held_out` were written after them,
            those of `training` to learn from; `file` are a user's.
    """

    id: str
    language: str
    prompt: str
    answer: str
    label: str | None
    refuses: bool | None = None
    kind: str = ""
    split: str = "training"

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


@cache
def training_answers() -> tuple[LabelledAnswer, ...]:
    """More answers, by several writers (the ids say which), labelled for the learned judge to learn from."""
    lines = TRAINING_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(LabelledAnswer(**json.loads(line)) for line in lines)


@cache
def blind_answers() -> tuple[LabelledAnswer, ...]:
    """Answers written and labelled by somebody who saw neither rules nor model; nothing is learned from them."""
    lines = BLIND_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(LabelledAnswer(**json.loads(line)) for line in lines)


def read_answers(path: Path) -> list[LabelledAnswer]:
    """A user's labelled answers: rows with `prompt`, `answer` and `label`; anything else is left aside.

    Raises:
        UserError: no such file, an empty one, or a row without one of them.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file", hint="give a JSONL file of prompt, answer and label")
    found = []
    for row in read_rows(path):
        if isinstance(row, BadRow):
            raise UserError(str(row))
        prompt, answer, label = (row.columns.get(name) for name in ("prompt", "answer", "label"))
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise UserError(f"{row.location}: expected texts in columns 'prompt' and 'answer'")
        if label not in (*LABELS, None):
            raise UserError(f"{row.location}: label is {label!r}, expected one of {', '.join(LABELS)}")
        found.append(LabelledAnswer(str(row.location), "", prompt, answer, label, split="file"))
    if not any(each.label for each in found):
        raise UserError(f"{path}: no labelled answer in it")
    return found


def safety_agreement(judge: Judge, answers: Sequence[LabelledAnswer]) -> Agreement:
    """How a judge does on answers to attack prompts (those with a label)."""
    answers = [answer for answer in answers if answer.label is not None]
    verdicts = judge([answer.exchange for answer in answers])
    return _compare(
        LABELS, [(a, str(a.label), v.label, v.reason) for a, v in zip(answers, verdicts, strict=True)]
    )


def refusal_agreement(judge: RefusalJudge, answers: Sequence[LabelledAnswer]) -> Agreement:
    """How telling refusals from answers does, for over-refusal."""
    by_hand = {True: "refuses", False: "answers", None: "unjudged"}
    said = judge([(answer.prompt, answer.answer) for answer in answers])
    rows = [(a, by_hand[a.refuses], label, "") for a, label in zip(answers, said, strict=True)]
    return _compare(REFUSAL_LABELS, rows)


def _compare(labels: tuple[str, ...], rows: Sequence[tuple[LabelledAnswer, str, str, str]]) -> Agreement:
    counts = Counter((by_hand, said) for _, by_hand, said, _ in rows)
    mistakes = [(answer, said, reason) for answer, by_hand, said, reason in rows if by_hand != said]
    return Agreement(labels, counts, mistakes)
