"""A data file that was read: what can be used of it, and what was found wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Generic, Protocol, TypeVar

from finetune.data.records import BadRow, Location, Row, RowError
from finetune.data.sampling import Candidate, category_in


class Located(Protocol):
    """What a row becomes."""

    @property
    def location(self) -> Location:
        """Where it was read."""


Item = TypeVar("Item", bound=Located)


@dataclass
class ReadFile(ABC, Generic[Item]):
    """One file.

    Attributes:
        name: the file as messages call it.
        weight: how often each of its rows is seen in an epoch.
        rows: rows read, good and bad.
        bad_rows: rows that cannot be used.
        items: what the other ones became; with data.sampling, those of them that it took.
        categories: what each item's column of that name says, where data.sampling names one.
        sampled: number of items that data.sampling took; None where nothing was sampled.
    """

    name: str
    weight: float
    rows: int
    bad_rows: list[BadRow] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    categories: list[str | None] = field(default_factory=list)
    sampled: int | None = None

    @property
    def kept(self) -> int:
        """Rows that can be used."""
        return self.rows - len(self.bad_rows)

    def take(self, rows: Sequence[Row | BadRow], convert: Callable[[Row], Item], column: str | None) -> None:
        """Fill in items and categories; rows that cannot be read or converted become bad rows.

        Args:
            rows: all of the file's.
            convert: raises RowError for a row that cannot be used.
            column: holds the rows' categories; None where nobody asks for them.
        """
        for row in rows:
            if isinstance(row, BadRow):
                self.bad_rows.append(row)
                continue
            try:
                item, category = convert(row), category_in(row.columns, column)
            except RowError as error:
                self.bad_rows.append(BadRow(row.location, str(error)))
                continue
            self.items.append(item)
            self.categories.append(category)

    @abstractmethod
    def prompt_of(self, item: Item) -> str:
        """What its first user turn asks; empty if it asks nothing."""

    def candidates(self) -> Iterator[Candidate]:
        """The items as data.sampling looks at them."""
        for item, category in zip(self.items, self.categories, strict=True):
            yield Candidate(self.prompt_of(item), item.location, category)

    def keep(self, chosen: Sequence[bool]) -> None:
        """Drop the items that data.sampling did not take."""
        self.items = list(compress(self.items, chosen))
        self.categories = list(compress(self.categories, chosen))
        self.sampled = len(self.items)
