"""Tables and live lines for people on a terminal and for programs behind a pipe."""

from __future__ import annotations

import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


def print_table(headers: list[str], rows: list[list[str]]) -> None:
    """A rich table on a terminal; aligned columns, easy to grep and cut, in a pipe or file.

    Columns that no row fills are left out.
    """
    keep = [index for index in range(len(headers)) if any(row[index] for row in rows)]
    headers, rows = [headers[i] for i in keep], [[row[i] for i in keep] for row in rows]
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headers, box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(display_width(line[index]) for line in [headers, *rows]) for index in range(len(headers))]
    for line in [headers, *rows]:
        cells = (cell + " " * (width - display_width(cell)) for cell, width in zip(line, widths))
        print("  ".join(cells).rstrip())


def training_bar(console: Console, title: str, *, total: int, done: int = 0) -> tuple[Progress, TaskID]:
    """A live line of a training: title, bar, steps, the field ``numbers`` and the time left; started."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    bar.start()
    return bar, bar.add_task("", total=total, completed=done, numbers="")


def display_width(text: str) -> int:
    """Columns that a text takes on a terminal: two for a Chinese character."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
