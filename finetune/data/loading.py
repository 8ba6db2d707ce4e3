"""Sources of a recipe into checked records: read, recognise the layout, normalise, check.

No tokenizer is needed yet, so that broken data is found within seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from finetune.data.encoding import CONVERT_HINT
from finetune.data.formats import Layout, detect
from finetune.data.read_file import ReadFile
from finetune.data.records import BadRow, Record, Row
from finetune.data.sources import open_source
from finetune.errors import UserError
from finetune.words import plural

SHOWN_BAD_ROWS = 10
File = TypeVar("File", bound=ReadFile[Any])


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


@dataclass
class LoadedFile(ReadFile[Record]):
    """One file's records.

    Attributes:
        layout: as recognised; None where not a single row could be read.
    """

    layout: Layout | None = None

    @property
    def records(self) -> list[Record]:
        """Those that can be used; with data.sampling, those of them that it took."""
        return self.items

    def prompt_of(self, item: Record) -> str:
        return item.prompt or ""


def load_source(
    source: SourceLike,
    *,
    stage: str,
    system: str | None = None,
    max_rows: int | None = None,
    column: str | None = None,
    resolve: Callable[[str], str] = str,
) -> list[LoadedFile]:
    """Read and check one source.

    Args:
        source: path, weight and format ("auto" or None: recognise it, for each file by itself).
        stage: "sft" or "pretrain".
        system: system message for conversations that bring none.
        max_rows: read only so many rows of the source; None is all.
        column: holds the rows' categories; None where nobody asks for them.
        resolve: where a path of the recipe points on this machine.

    Raises:
        UserError: a file is missing, unreadable as a whole, or of no known layout.
    """

    def check(rows: Sequence[Row | BadRow], name: str) -> LoadedFile:
        readable = [row for row in rows if isinstance(row, Row)]
        expected = source.format or "auto"
        layout = detect(readable, stage=stage, name=name, expected=expected) if readable else None
        file = LoadedFile(name, source.weight, len(rows), layout=layout)

        def to_record(row: Row) -> Record:
            assert layout is not None  # there is a row that could be read
            return layout.to_record(row, system=system)

        file.take(rows, to_record, column)
        return file

    return read_files(source, check, max_rows=max_rows, resolve=resolve)


def read_files(
    source: SourceLike,
    check: Callable[[Sequence[Row | BadRow], str], File],
    *,
    max_rows: int | None,
    resolve: Callable[[str], str],
) -> list[File]:
    """The files of one source, in order, as `load_source`.

    Args:
        check: makes a file of its rows and its name.
    """
    loaded: list[File] = []
    for name, read in open_source(source.path, resolve):
        left = None if max_rows is None else max_rows - sum(file.rows for file in loaded)
        if left == 0:
            break
        loaded.append(check(list(islice(read(), left)), name))
    return loaded


def judge_files(files: Mapping[str, Sequence[ReadFile[Any]]], *, on_bad_rows: str) -> None:
    """Stop at bad rows, unless they are to be skipped, and where no row is left.

    Args:
        files: of each split.
        on_bad_rows: "stop" or "skip".

    Raises:
        UserError: as `refuse_bad_rows`; or a split has files, and not a row that can be used.
    """
    every = [file for members in files.values() for file in members]
    if on_bad_rows == "stop":
        refuse_bad_rows([row for file in every for row in file.bad_rows], sum(file.rows for file in every))
    for split, members in files.items():
        _refuse_empty(members, split=split)


def refuse_bad_rows(bad_rows: Sequence[BadRow], rows: int) -> None:
    """Stop at bad rows, listing the first of them.

    Raises:
        UserError: there is at least one.
    """
    if not bad_rows:
        return
    undecodable = sum("not UTF-8" in row.reason for row in bad_rows)
    raise UserError(
        f"{len(bad_rows):,} of {plural(rows, 'data row')} cannot be used:{_listed(bad_rows)}",
        hint=CONVERT_HINT
        if 2 * undecodable > len(bad_rows)
        else "mend these rows, or leave them out with data.on_bad_rows=skip",
    )


def _refuse_empty(files: Sequence[ReadFile[Any]], *, split: str) -> None:
    if not files or any(file.kept for file in files):
        return
    names = ", ".join(file.name for file in files)
    bad_rows = [row for file in files for row in file.bad_rows]
    if not bad_rows:
        raise UserError(f"data.{split}: no rows in {names}", hint="a data set holds at least one row")
    raise UserError(
        f"data.{split}: none of {plural(len(bad_rows), 'row')} in {names} can be used:{_listed(bad_rows)}",
        hint="mend these rows",
    )


def _listed(bad_rows: Sequence[BadRow]) -> str:
    lines = "".join(f"\n  {row}" for row in bad_rows[:SHOWN_BAD_ROWS])
    more = len(bad_rows) - SHOWN_BAD_ROWS
    return f"{lines}\n  and {more:,} more" if more > 0 else lines
