"""What a data set amounts to, in tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LengthStatistics:
    """Token counts of a set of documents (conversations or texts).

    Attributes:
        count: documents.
        min, median, p95, max: tokens of a document before anything is cut.
        total: tokens after cutting, which is what a pass over the data reads.
        truncated: documents that lose tokens to max_length.
        truncated_share: of the documents, 0 to 1.
        supervised: tokens whose prediction is learned.
        supervised_share: of the total, 0 to 1.
    """

    count: int
    min: int
    median: float
    p95: float
    max: int
    total: int
    truncated: int
    truncated_share: float
    supervised: int
    supervised_share: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def length_statistics(
    lengths: np.ndarray, *, total: int, supervised: int, truncated: int
) -> LengthStatistics:
    """Summarise documents.

    Args:
        lengths: tokens of each document before cutting, shape (documents,).
        total: tokens after cutting.
        supervised: tokens that are learned.
        truncated: documents that were cut.
    """
    count = len(lengths)
    values = lengths if count else np.zeros(1, dtype=np.int64)
    return LengthStatistics(
        count=count,
        min=int(values.min()),
        median=float(np.median(values)),
        p95=float(np.percentile(values, 95)),
        max=int(values.max()),
        total=int(total),
        truncated=int(truncated),
        truncated_share=truncated / count if count else 0.0,
        supervised=int(supervised),
        supervised_share=supervised / total if total else 0.0,
    )
