"""Sources of a recipe into checked preferences. No tokenizer is needed yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.data.loading import SourceLike, read_files
from finetune.data.read_file import ReadFile
from finetune.data.records import BadRow, Row
from finetune.errors import UserError
from rlhf.preferences.layouts import Preference, layout_of, to_preference


@dataclass
class PreferenceFile(ReadFile[Preference]):
    """One file's preferences.

    Attributes:
        layout: that of most rows; None where not a single row could be read.
    """

    layout: str | None = None

    @property
    def preferences(self) -> list[Preference]:
        """Those that can be used; with data.sampling, those of them that it took."""
        return self.items

    def prompt_of(self, item: Preference) -> str:
        return next(turn["content"] for turn in item.prompt if turn["role"] == "user")


def load_source(
    source: SourceLike,
    *,
    system: str | None = None,
    max_rows: int | None = None,
    column: str | None = None,
    resolve: Callable[[str], str] = str,
) -> list[PreferenceFile]:
    """Read and check one source.

    Args:
        source: path and weight.
        system: system message for prompts that bring none.
        max_rows: read only so many rows of the source; None is all.
        column: holds the rows' categories; None where nobody asks for them.
        resolve: where a path of the recipe points on this machine.

    Raises:
        UserError: a file is missing, unreadable as a whole, or holds no preferences at all.
    """

    def check(rows: Sequence[Row | BadRow], name: str) -> PreferenceFile:
        layouts = Counter(layout_of(row.columns) for row in rows if isinstance(row, Row))
        if layouts and set(layouts) == {None}:
            raise _no_preferences([row for row in rows if isinstance(row, Row)], name)
        del layouts[None]
        layout = layouts.most_common(1)[0][0] if layouts else None
        file = PreferenceFile(name, source.weight, len(rows), layout=layout)
        file.take(rows, lambda row: to_preference(row, system=system), column)
        return file

    return read_files(source, check, max_rows=max_rows, resolve=resolve)


def _no_preferences(rows: Sequence[Row], name: str) -> UserError:
    columns = list(dict.fromkeys(column for row in rows for column in row.columns))
    listed = ", ".join(map(repr, columns[:12])) or "none"
    return UserError(
        f"{name}: no preference data: columns {listed}, expected 'responses', or 'chosen' and 'rejected'",
        hint="conversations without a comparison are for stage sft",
    )
