"""Commands that other packages contribute to the command line. Names only, imported when they are needed.

Their modules are imported to show `--help`: they import typer and nothing heavier at their top.
"""

from __future__ import annotations

import importlib
from typing import Any

COMMANDS: dict[str, str] = {
    "taxonomy": "rlhf.taxonomy.cli:app",
    "redteam": "rlhf.safety.cli:app",
}
"""Name of a command, or group of commands → "module:typer app"."""


def load_command(name: str) -> Any:
    """The command, or group of commands, of a name in `COMMANDS`."""
    import typer

    module, _, attribute = COMMANDS[name].partition(":")
    command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
    command.name = name
    return command
