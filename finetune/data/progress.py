"""A progress bar for whatever takes longer than two seconds, on terminals only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

DELAY_SECONDS = 2.0


class Advance(Protocol):
    """Tells how many more units are done."""

    def __call__(self, units: int) -> None: ...


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Advance]:
    """A bar on standard error that appears after two seconds, and not at all where nobody looks."""
    if not sys.stderr.isatty():
        yield lambda units: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title, total=total)
    begin = time.monotonic()

    def advance(units: int) -> None:
        bar.advance(task, units)
        if not bar.live.is_started and time.monotonic() - begin > DELAY_SECONDS:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
