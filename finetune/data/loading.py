"""Sources of a recipe into checked records: read, recognise the layout, normalise, check.

No tokenizer is needed yet, so that broken data is found within seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from finetune.data.encoding import CONVERT_HINT
from finetune.data.formats import Layout, detect
from finetune.data.records import BadRow, Record, Row, RowError
from finetune.data.sources import open_source
from finetune.errors import UserError

SHOWN_BAD_ROWS = 10


class SourceLike(Protocol):
    """An entry of `data.train` or `data.validation` (finetune.recipe.schema.Source)."""

    @property
    def path(self) -> str:
        """File, folder, pattern or hub id."""

    @property
    def weight(self) -> float:
        """How often each of its rows is seen in an epoch."""

    @property
    def format(self) -> str | None:
        """Layout of its rows, or "auto"."""


class FileLike(Protocol):
    """A file that was read, as far as it is judged here."""

    @property
    def name(self) -> str:
        """The file as messages call it."""

    @property
    def bad_rows(self) -> list[BadRow]:
        """Rows that cannot be used."""

    @property
    def kept(self) -> int:
        """Number of rows that can."""


@dataclass
class LoadedFile:
    """One file's records, and what was found wrong in it.

    Attributes:
        name: the file as messages call it.
        weight: how often each of its rows is seen in an epoch.
        layout: as recognised; None where not a single row could be read.
        rows: rows read, good and bad.
    """

    name: str
    weight: float
    layout: Layout | None
    rows: int
    records: list[Record]
    bad_rows: list[BadRow] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Rows that can be used."""
        return self.rows - len(self.bad_rows)


def load_source(
    source: SourceLike,
    *,
    stage: str,
    system: str | None = None,
    max_rows: int | None = None,
    resolve: Callable[[str], str] = str,
) -> list[LoadedFile]:
    """Read and check one source.

    Args:
        source: path, weight and format ("auto" or None: recognise it, for each file by itself).
        stage: "sft" or "pretrain".
        system: system message for conversations that bring none.
        max_rows: read only so many rows of the source; None is all.
        resolve: where a path of the recipe points on this machine.

    Raises:
        UserError: a file is missing, unreadable as a whole, or of no known layout.
    """
    loaded: list[LoadedFile] = []
    for name, read in open_source(source.path, resolve):
        left = None if max_rows is None else max_rows - sum(file.rows for file in loaded)
        if left == 0:
            break
        rows = list(islice(read(), left))
        loaded.append(_check_rows(rows, name, source, stage=stage, system=system))
    return loaded


def _check_rows(
    rows: Sequence[Row | BadRow], name: str, source: SourceLike, *, stage: str, system: str | None
) -> LoadedFile:
    readable = [row for row in rows if isinstance(row, Row)]
    expected = source.format or "auto"
    layout = detect(readable, stage=stage, name=name, expected=expected) if readable else None
    file = LoadedFile(name, source.weight, layout, len(rows), [])
    for row in rows:
        if isinstance(row, BadRow):
            file.bad_rows.append(row)
            continue
        assert layout is not None  # there is a row that could be read
        try:
            file.records.append(layout.to_record(row, system=system))
        except RowError as error:
            file.bad_rows.append(BadRow(row.location, str(error)))
    return file


def refuse_bad_rows(bad_rows: Sequence[BadRow], rows: int) -> None:
    """Stop at bad rows, listing the first of them.

    Raises:
        UserError: there is at least one.
    """
    if not bad_rows:
        return
    undecodable = sum("not UTF-8" in row.reason for row in bad_rows)
    raise UserError(
        f"{len(bad_rows):,} of {rows:,} data rows cannot be used:{_listed(bad_rows)}",
        hint=CONVERT_HINT
        if 2 * undecodable > len(bad_rows)
        else "mend these rows, or leave them out with data.on_bad_rows=skip",
    )


def refuse_empty(files: Sequence[FileLike], *, split: str) -> None:
    """Stop where files were named and no row of them is left.

    Raises:
        UserError: names the files and the first bad rows.
    """
    if not files or any(file.kept for file in files):
        return
    names = ", ".join(file.name for file in files)
    bad_rows = [row for file in files for row in file.bad_rows]
    if not bad_rows:
        raise UserError(f"data.{split}: no rows in {names}", hint="a data set holds at least one row")
    raise UserError(
        f"data.{split}: none of the {len(bad_rows):,} rows in {names} can be used:{_listed(bad_rows)}",
        hint="mend these rows",
    )


def _listed(bad_rows: Sequence[BadRow]) -> str:
    lines = "".join(f"\n  {row}" for row in bad_rows[:SHOWN_BAD_ROWS])
    more = len(bad_rows) - SHOWN_BAD_ROWS
    return f"{lines}\n  and {more:,} more" if more > 0 else lines
