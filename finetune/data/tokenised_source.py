"""A source's records side by side with their tokens: what can be selected, and what it amounts to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from finetune.data.loading import LoadedFile
from finetune.data.packing import list_lengths
from finetune.data.records import BadRow, Record
from finetune.data.statistics import LengthStatistics, length_statistics
from finetune.words import plural

if TYPE_CHECKING:
    from datasets import Dataset


class TokenisedSource:
    """Records of one source (one or more files) and the table that `tokenize` made of them.

    Attributes:
        files: as loaded; rows that turn out to have nothing to learn are added to their bad rows.
        records: of all files, in order.
        weight: how often each of its training records is seen in an epoch.
        dataset: the tokenised table.
        usable: which records can be learned from, bool of shape (records,).
        held_out: which records are kept for validation, bool of shape (records,).
    """

    def __init__(self, files: Sequence[LoadedFile], dataset: Dataset, *, max_length: int) -> None:
        self.files = files
        self.weight = files[0].weight if files else 1.0
        self.records: list[Record] = list(chain.from_iterable(file.records for file in files))
        self.dataset = dataset
        self.max_length = max_length
        table = dataset.data.table
        count = len(self.records)
        record = table["record"].to_numpy()
        self._first_row = np.searchsorted(record, np.arange(count + 1))
        self._length = table["length"].to_numpy()[self._first_row[:-1]].astype(np.int64)
        self._tokens = _sum_by(record, list_lengths(table["input_ids"]), count)
        self._supervised = _sum_by(record, table["supervised"].to_numpy(), count)
        self.usable = self._supervised > 0
        self.held_out = np.zeros(count, dtype=bool)
        self._note_bad_rows()

    def _note_bad_rows(self) -> None:
        file_of = {id(record): file for file in self.files for record in file.records}
        for index in np.flatnonzero(~self.usable).tolist():
            record = self.records[index]
            reason = (
                f"nothing to learn: the first {self.max_length} (data.max_length) of its "
                f"{plural(int(self._length[index]), 'token')} hold none of an answer"
            )
            file_of[id(record)].bad_rows.append(BadRow(record.location, reason))

    def rows_of(self, records: np.ndarray) -> np.ndarray:
        """Rows of the table that hold the given records, in their order."""
        starts, ends = self._first_row[records], self._first_row[records + 1]
        parts = [np.arange(start, end) for start, end in zip(starts, ends)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def indices_of(self, file: LoadedFile) -> np.ndarray:
        """Indices of a file's usable records."""
        start = 0
        for other in self.files:
            if other is file:
                break
            start += len(other.records)
        return start + np.flatnonzero(self.usable[start : start + len(file.records)])

    def statistics(self, records: np.ndarray) -> LengthStatistics:
        """Token counts of the given records, repeated ones counted as often."""
        return statistics_of([(self, records)])


def statistics_of(parts: Sequence[tuple[TokenisedSource, np.ndarray]]) -> LengthStatistics:
    """Token counts of records of several sources, repeated ones counted as often."""
    lengths = np.concatenate(
        [source._length[records] for source, records in parts] or [np.zeros(0, np.int64)]
    )
    is_cut = [
        int((source._length[records] > source.max_length).sum())
        for source, records in parts
        if len(source.records) and source.records[0].messages is not None  # texts are divided, not cut
    ]
    return length_statistics(
        lengths,
        total=sum(int(source._tokens[records].sum()) for source, records in parts),
        supervised=sum(int(source._supervised[records].sum()) for source, records in parts),
        truncated=sum(is_cut),
    )


def _sum_by(groups: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Sum of the values of each group, shape (count,), int64."""
    sums = np.zeros(count, dtype=np.int64)
    np.add.at(sums, groups, values)
    return sums
