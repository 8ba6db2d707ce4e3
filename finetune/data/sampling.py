"""`data.sampling`: a sample of the training rows, balanced over the categories of what they ask.

It is drawn once rows are read and checked and before anything is tokenised: the rest of the pipeline sees a
smaller data set, and the cache of tokens knows it by its content as it knows any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from finetune.data.records import Location, RowError, kind_of
from finetune.errors import UserError

UNKNOWN = "unknown"
"""Stands for the category of rows that have none."""


class SamplingSettings(Protocol):
    """The recipe's section data.sampling (finetune.recipe.schema.Sampling)."""

    size: int
    method: Any
    temperature: float | None
    categories: list[str] | None
    column: str | None
    overlays: list[str]


@dataclass(frozen=True)
class Candidate:
    """A row that could be taken.

    Attributes:
        prompt: what its first user turn asks.
        location: where it was read.
        category: what the column data.sampling.column says; None where it says nothing or none is named.
    """

    prompt: str
    location: Location
    category: str | None = None


@dataclass(frozen=True)
class CategoryShare:
    """A secondary category: its rows without near-duplicates, and how many of them were taken."""

    id: str
    name: str
    rows: int
    taken: int


@dataclass(frozen=True)
class Draw:
    """What a sampler chose.

    Attributes:
        chosen: indices of the rows taken, ascending.
        repeats: (row, the earlier one that it nearly repeats), by index; these were not taken.
        other: rows of categories that were not asked for.
        categories: every secondary category that rows were found of.
    """

    chosen: list[int]
    repeats: list[tuple[int, int]]
    other: int
    categories: list[CategoryShare]


Sampler = Callable[..., Draw]
"""Called with (candidates, settings, seed=, resolve=); see `rlhf.taxonomy.drawing.draw`."""


@dataclass(frozen=True)
class SamplingReport:
    """What data.sampling did.

    Attributes:
        size: rows asked for.
        method: quota or temperature.
        rows: training rows that there were.
        taken: of them.
        other_categories: rows outside data.sampling.categories.
        near_duplicates: (row, the earlier one that it nearly repeats); they were left out.
        categories: what there was and what was taken of each secondary category.
    """

    size: int
    method: str
    rows: int
    taken: int
    other_categories: int
    near_duplicates: list[tuple[Location, Location]]
    categories: list[CategoryShare]

    def summary(self) -> str:
        """One line for the terminal."""
        known = [share for share in self.categories if share.id != UNKNOWN]
        unknown = sum(share.taken for share in self.categories) - sum(share.taken for share in known)
        return (
            f"data.sampling: {self.taken:,} of {self.rows:,} training rows, from "
            f"{sum(share.taken > 0 for share in known)} of {len(known)} secondary categories "
            f"({unknown:,} of unknown category); near-duplicates left out: {len(self.near_duplicates):,}"
        )

    def warnings(self) -> list[str]:
        """What the user should know, as sentences."""
        if self.taken >= self.size:
            return []
        return [f"data.sampling.size is {self.size:,}, and only {self.taken:,} rows are there to be taken"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "size": self.size,
            "method": self.method,
            "rows": self.rows,
            "taken": self.taken,
            "other_categories": self.other_categories,
            "categories": [asdict(share) for share in self.categories],
            "near_duplicates": [
                {"row": str(row), "repeats": str(first)} for row, first in self.near_duplicates
            ],
        }


def category_in(columns: dict[str, Any], column: str | None) -> str | None:
    """What a row's column says of its category; None if it says nothing, or no column is asked for.

    Raises:
        RowError: it holds something other than text.
    """
    value = None if column is None else columns.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError(
            f"column '{column}' (data.sampling.column) is {kind_of(value)}, expected the id of a category "
            'such as "2.01"'
        )
    return value.strip() or None


def choose(
    candidates: Sequence[Candidate],
    settings: SamplingSettings,
    *,
    seed: int,
    resolve: Callable[[str], str] = str,
) -> tuple[set[int], SamplingReport]:
    """Indices of the rows to train on, and what is told about them. The seed and the rows decide alone.

    Raises:
        UserError: a category or overlay does not exist, or no row is left.
    """
    from finetune.sampling_table import load_sampler

    if settings.column is not None and candidates and not any(each.category for each in candidates):
        raise UserError(
            f"data.sampling.column: no training row has a column {settings.column!r} with a category",
            hint="`finetune taxonomy classify FILE --output JSONL` shows categories; remove the key to have "
            "the prompts classified",
        )
    sampler: Sampler = load_sampler()
    draw = sampler(candidates, settings, seed=seed, resolve=resolve)
    if candidates and not draw.chosen:
        raise UserError(
            f"data.sampling.categories: none of the {len(candidates):,} training rows is of these categories",
            hint="`finetune taxonomy coverage FILE` shows which categories a file has",
        )
    places = [each.location for each in candidates]
    report = SamplingReport(
        size=settings.size,
        method=settings.method,
        rows=len(candidates),
        taken=len(draw.chosen),
        other_categories=draw.other,
        near_duplicates=[(places[row], places[first]) for row, first in draw.repeats],
        categories=draw.categories,
    )
    return set(draw.chosen), report


class SampledFile(Protocol):
    """A file whose rows can be taken away."""

    def candidates(self) -> Iterable[Candidate]:
        """Its usable rows, in order."""

    def keep(self, chosen: Sequence[bool]) -> None:
        """Drop the usable rows that were not chosen."""


def sample_files(
    files: Sequence[SampledFile],
    settings: SamplingSettings | None,
    *,
    seed: int,
    resolve: Callable[[str], str] = str,
) -> SamplingReport | None:
    """Leave in the files what `choose` takes of all of them together; None, and nothing happens, without settings.

    Raises:
        UserError: as `choose`.
    """
    if settings is None:
        return None
    candidates = [list(file.candidates()) for file in files]
    chosen, report = choose(
        [each for members in candidates for each in members], settings, seed=seed, resolve=resolve
    )
    start = 0
    for file, members in zip(files, candidates):
        file.keep([start + index in chosen for index in range(len(members))])
        start += len(members)
    return report
