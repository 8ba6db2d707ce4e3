"""Processes in which nothing imports this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def ask_stock(code: str, *arguments: str | Path, folder: Path, given: Any = None) -> Any:
    """Run ``code`` in a process of its own.

    Args:
        code: prints JSON last.
        arguments: its ``sys.argv[1:]``.
        folder: where it runs.
        given: on its standard input, as JSON.

    Returns:
        What it printed last.
    """
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])
