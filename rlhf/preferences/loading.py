"""Sources of a recipe into checked preferences. No tokenizer is needed yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from finetune.data.loading import SourceLike
from finetune.data.records import BadRow, Row, RowError
from finetune.data.sources import open_source
from finetune.errors import UserError
from rlhf.preferences.layouts import Preference, layout_of, to_preference


@dataclass
class PreferenceFile:
    """One file's preferences, and what was found wrong in it.

    Attributes:
        name: the file as messages call it.
        weight: how often each of its rows is seen in an epoch.
        layout: that of most rows; None where not a single row could be read.
        rows: rows read, good and bad.
    """

    name: str
    weight: float
    layout: str | None
    rows: int
    preferences: list[Preference]
    bad_rows: list[BadRow] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Rows that can be used."""
        return self.rows - len(self.bad_rows)


def load_source(
    source: SourceLike,
    *,
    system: str | None = None,
    max_rows: int | None = None,
    resolve: Callable[[str], str] = str,
) -> list[PreferenceFile]:
    """Read and check one source.

    Args:
        source: path and weight.
        system: system message for prompts that bring none.
        max_rows: read only so many rows of the source; None is all.
        resolve: where a path of the recipe points on this machine.

    Raises:
        UserError: a file is missing, unreadable as a whole, or holds no preferences at all.
    """
    loaded: list[PreferenceFile] = []
    for name, read in open_source(source.path, resolve):
        left = None if max_rows is None else max_rows - sum(file.rows for file in loaded)
        if left == 0:
            break
        loaded.append(_check_rows(list(islice(read(), left)), name, source.weight, system))
    return loaded


def _check_rows(rows: Sequence[Row | BadRow], name: str, weight: float, system: str | None) -> PreferenceFile:
    layouts = Counter(layout_of(row.columns) for row in rows if isinstance(row, Row))
    if layouts and set(layouts) == {None}:
        raise _no_preferences([row for row in rows if isinstance(row, Row)], name)
    del layouts[None]
    layout = layouts.most_common(1)[0][0] if layouts else None
    file = PreferenceFile(name, weight, layout, len(rows), [])
    for row in rows:
        if isinstance(row, BadRow):
            file.bad_rows.append(row)
            continue
        try:
            file.preferences.append(to_preference(row, system=system))
        except RowError as error:
            file.bad_rows.append(BadRow(row.location, str(error)))
    return file


def _no_preferences(rows: Sequence[Row], name: str) -> UserError:
    columns = list(dict.fromkeys(column for row in rows for column in row.columns))
    listed = ", ".join(map(repr, columns[:12])) or "none"
    return UserError(
        f"{name}: no preference data: columns {listed}, expected 'responses', or 'chosen' and 'rejected'",
        hint="conversations without a comparison are for stage sft",
    )
