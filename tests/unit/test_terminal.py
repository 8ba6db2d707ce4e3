"""What people see while a run trains."""

from __future__ import annotations

import io

from rich.console import Console

from finetune.terminal import training_bar


def test_the_live_line_of_a_training() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, color_system=None)
    bar, task = training_bar(console, "training", total=400, done=100)
    bar.refresh()
    assert "100/400" in output.getvalue()
    bar.update(task, completed=150, numbers="loss 1.2345")
    bar.refresh()
    shown = output.getvalue()
    bar.stop()
    for part in ("training", "150/400", "loss 1.2345"):
        assert part in shown
