"""What is told about the data: to the user before training, and in the run's report after it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.data.packing import PackingStatistics
from finetune.data.records import BadRow
from finetune.data.sampling import SamplingReport
from finetune.data.statistics import LengthStatistics
from finetune.words import are, plural

TRUNCATED_SHARE = 0.01
"""From this share of cut conversations on there is a warning."""


@dataclass(frozen=True)
class FileReport:
    """One data file.

    Attributes:
        file: its name as the user wrote it (in folders and patterns: as found).
        split: "train" or "validation", as the recipe has it.
        format: the layout, for example "alpaca"; None where no row could be read.
        columns: the columns that hold the content.
        weight: how often each of its training rows is seen in an epoch.
        rows: rows read.
        kept: rows that can be used.
        bad: rows that cannot.
        duplicates: kept rows whose content stood in an earlier row of this split; they are kept.
        held_out: kept rows moved to the validation set by data.validation_share.
        tokens: of the kept rows.
        sampled: kept rows that data.sampling took, which duplicates, held_out and tokens then count; None
            without sampling.
    """

    file: str
    split: str
    format: str | None
    columns: tuple[str, ...]
    weight: float
    rows: int
    kept: int
    bad: int
    duplicates: int
    held_out: int
    tokens: LengthStatistics
    sampled: int | None = None


@dataclass(frozen=True)
class SplitReport:
    """The training or the validation set as the trainer gets it.

    Attributes:
        rows: rows of the data set: packs if packed, else documents or pieces of texts.
        tokens: statistics of the documents, repeated ones counted as often as an epoch sees them.
        packing: None where rows are not packed.
    """

    rows: int
    tokens: LengthStatistics
    packing: PackingStatistics | None


@dataclass(frozen=True)
class DataReport:
    """Everything about the data of a run.

    Attributes:
        stage: "sft" or "pretrain".
        max_length: tokens of a row.
        files: one entry a file, training files first.
        bad_rows: every row left out, with the reason.
        odd_rows: rows that are kept and look wrong, with the reason.
        train: the training set.
        validation: the validation set, or None.
        leaked: validation rows whose content is also trained on.
        shared_prompts: validation conversations whose first question is also trained on, leaked ones
            included.
        sampling: what data.sampling did; None without it.
    """

    stage: str
    max_length: int
    files: list[FileReport]
    bad_rows: list[BadRow]
    train: SplitReport
    validation: SplitReport | None
    leaked: int = 0
    shared_prompts: int = 0
    odd_rows: list[BadRow] = field(default_factory=list)
    sampling: SamplingReport | None = None

    @property
    def warnings(self) -> list[str]:
        """What the user should know before the numbers are believed, as sentences."""
        found = []
        found += self.rows_left_out()
        if odd := len(self.odd_rows):
            found.append(f"{plural(odd, 'odd data row')} {are(odd)} kept: look before you trust the data")
        found += self.sampling.warnings() if self.sampling else []
        found += self.conversations_cut()
        held_out = sum(file.held_out or file.kept * (file.split == "validation") for file in self.files)
        if self.leaked:
            found.append(
                f"{self.leaked:,} of {plural(held_out, 'validation row')} {are(self.leaked)} also trained on: "
                "the validation loss will look better than it is"
            )
        elif self.shared_prompts:
            found.append(
                f"{self.shared_prompts:,} of {plural(held_out, 'validation conversation')} "
                f"{'begins' if self.shared_prompts == 1 else 'begin'} with a question that is also trained on"
            )
        if any(file.split == "validation" and file.weight != 1 for file in self.files):
            found.append("weights in data.validation have no effect")
        return found

    def rows_left_out(self) -> list[str]:
        """The warning that rows cannot be used, where there are any."""
        bad, rows = len(self.bad_rows), sum(file.rows for file in self.files)
        if not bad:
            return []
        return [f"{bad:,} of {plural(rows, 'data row')} cannot be used and {are(bad)} left out"]

    def conversations_cut(self) -> list[str]:
        """The warning that training conversations are cut, where it is more than a few."""
        cut = self.train.tokens
        if cut.truncated_share <= TRUNCATED_SHARE:
            return []
        return [
            f"{cut.truncated_share:.1%} of the training conversations are cut to data.max_length "
            f"{self.max_length} (the longest has {cut.max:,} tokens)"
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain dictionaries, lists, strings and numbers."""
        return {
            "stage": self.stage,
            "max_length": self.max_length,
            "files": [_plain(file) for file in self.files],
            "bad_rows": [row.as_dict() for row in self.bad_rows],
            "odd_rows": [row.as_dict() for row in self.odd_rows],
            "train": _plain(self.train),
            "validation": None if self.validation is None else _plain(self.validation),
            "leaked": self.leaked,
            "shared_prompts": self.shared_prompts,
            "warnings": self.warnings,
            **({"sampling": self.sampling.as_dict()} if self.sampling else {}),
        }


def _plain(part: FileReport | SplitReport) -> dict[str, Any]:
    plain = asdict(part)
    if "columns" in plain:
        plain["columns"] = list(plain["columns"])
    return plain
