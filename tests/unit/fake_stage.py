"""The command line in this process, with a function in place of the stage that it would run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune import stages
from finetune.cli import app

RECIPE = "stage: sft\nmodel: {base: baichuan2-nano}\ndata: {train: train.jsonl}\n"


def call(*args: str) -> Any:
    """Run a command."""
    return CliRunner().invoke(app, list(args))


def fake_stage(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Have every stage be ``function``."""
    monkeypatch.setattr(stages, "_function", lambda stage: function)


def raise_(error: BaseException) -> Any:
    """A stage that fails."""

    def stage(recipe: Any, **_: Any) -> Path:
        raise error

    return stage
