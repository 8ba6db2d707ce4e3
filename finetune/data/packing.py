"""Short documents joined into full rows, each still seeing only itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.mixing import shuffled

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


@dataclass(frozen=True)
class PackingStatistics:
    """How well documents filled the rows.

    Attributes:
        documents: documents packed, repeated ones counted as often as they are seen.
        packs: rows they became.
        tokens: in all of them.
        efficiency: tokens / (packs * max_length), 0 to 1.
    """

    documents: int
    packs: int
    tokens: int
    efficiency: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Distribute documents over as few rows as possible.

    The longest first, each into the row with the least room that still holds it (best-fit decreasing: at most
    11/9 of the optimum, Johnson 1974). Rows are grouped by the room they have left; the smallest sufficient
    room is the lowest set bit of an integer, so the whole is O(n log n) and a few machine words a document.

    Args:
        lengths: tokens of each document, 1 to `capacity`.
        capacity: tokens that a row holds.

    Returns:
        For each row the indices of its documents. Every index occurs once.

    Raises:
        ValueError: a document is longer than a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a document of {lengths.max()} tokens does not fit into {capacity}")
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r is set if some pack has room for exactly r more tokens
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        by_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return packs


def pack_documents(table: pa.Table, order: Sequence[int], max_length: int, *, seed: int) -> Dataset:
    """A data set of packs.

    Args:
        table: with columns input_ids and labels; no row longer than `max_length`, first labels -100.
        order: rows of the table to pack, repeated ones as often as they are to be seen.
        max_length: tokens of a pack.
        seed: decides the order of the packs.

    Returns:
        Columns input_ids, labels and seq_lengths: the lengths of the documents in each pack, in order.
        The column has trl's name, whose trainers keep it.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    lengths = list_lengths(table["input_ids"])[np.asarray(order, dtype=np.int64)]
    packs = best_fit_decreasing(lengths, max_length)
    packs = [packs[index] for index in shuffled(range(len(packs)), seed=seed)]
    documents = np.fromiter((index for pack in packs for index in pack), dtype=np.int64)
    picked = table.select(["input_ids", "labels"]).take(
        pa.array(np.asarray(order, dtype=np.int64)[documents])
    )
    counts = np.array([len(pack) for pack in packs])
    tokens = np.add.reduceat(lengths[documents], np.concatenate([[0], np.cumsum(counts)[:-1]]))
    columns = {
        "input_ids": _lists(_flat(picked["input_ids"]), tokens),
        "labels": _lists(_flat(picked["labels"]), tokens),
        "seq_lengths": _lists(pa.array(lengths[documents], pa.int32()), counts),
    }
    # Without a fingerprint `datasets` would hash all of it; nothing here is looked up by one.
    return Dataset(pa.table(columns), fingerprint=generate_random_fingerprint())


def packing_statistics(packed: Dataset, max_length: int) -> PackingStatistics:
    """How well `pack_documents` did."""
    tokens = int(list_lengths(packed.data.table["input_ids"]).sum())
    documents = int(list_lengths(packed.data.table["seq_lengths"]).sum())
    return PackingStatistics(documents, len(packed), tokens, tokens / (len(packed) * max_length))


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Elements in each list of a list column, shape (rows,), int64."""
    import pyarrow.compute as pc

    return pc.list_value_length(column).to_numpy().astype(np.int64)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    import pyarrow.compute as pc

    return pc.list_flatten(column).combine_chunks()


def _lists(values: pa.Array, lengths: np.ndarray) -> pa.Array:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
