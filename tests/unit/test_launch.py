"""Runs in several processes: how they are launched, and how they tell that they failed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_stage import call, fake_stage, raise_

from finetune import stages
from finetune.errors import UserError


class FakeLauncher:
    """Stands in for subprocess.Popen: records the command and lets a process tell how it failed."""

    def __init__(self, code: int = 0, outcome: dict[str, Any] | None = None, interrupts: int = 0) -> None:
        self.code, self.outcome, self.interrupts = code, outcome, interrupts
        self.command: list[str] = []

    def __call__(self, command: list[str], env: dict[str, str]) -> FakeLauncher:
        self.command, self.env = command, env
        return self

    def wait(self) -> int:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        if self.outcome:
            Path(self.env[stages.OUTCOME_VARIABLE]).write_text(json.dumps(self.outcome))
        return self.code


@pytest.mark.usefixtures("no_gpu")
def test_processes_go_through_accelerate(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = FakeLauncher()
    monkeypatch.setattr(subprocess, "Popen", launcher)
    assert call("run", recipe, "seed=1", "--processes", "2", "--overwrite").exit_code == 0
    assert launcher.command[0] == sys.executable
    assert "from accelerate.commands.launch import main" in launcher.command[2]
    assert launcher.env["ACCELERATE_USE_CPU"] == "true"
    assert launcher.command[launcher.command.index("--num_processes") + 1] == "2"
    assert launcher.command[-5:] == ["finetune", "run", recipe, "seed=1", "--overwrite"]


@pytest.mark.usefixtures("no_gpu")
def test_launched_process_does_not_launch_again(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("launched again"))
    fake_stage(monkeypatch, lambda recipe, **_: ran.append(recipe.name))
    assert call("run", recipe, "--processes", "2").exit_code == 0
    assert ran == ["recipe"]


def test_launched_process_tells_how_it_failed(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome = tmp_path / "outcome.json"
    monkeypatch.setenv(stages.OUTCOME_VARIABLE, str(outcome))
    fake_stage(monkeypatch, raise_(UserError("no data", hint="give some")))
    result = call("run", recipe)
    assert (result.exit_code, result.stderr) == (2, "")
    fake_stage(monkeypatch, raise_(UserError("the second to fail")))
    assert call("run", recipe).exit_code == 2
    assert json.loads(outcome.read_text()) == {
        "exit_code": 2,
        "message": "no data\n  → give some",
        "checkpoint": None,
    }


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("launcher", "code", "part"),
    [
        (FakeLauncher(1, {"exit_code": 2, "message": "no data"}), 2, "error: no data\n"),
        (
            FakeLauncher(1, {"exit_code": 130, "message": "", "checkpoint": "c/step-3"}, 2),
            130,
            "saved c/step-3",
        ),
        (FakeLauncher(1, None, 1), 130, "interrupted"),
        (FakeLauncher(1, {"exit_code": 1, "message": "ValueError"}), 1, "a training process failed"),
    ],
)
def test_failures_of_launched_processes_keep_their_exit_codes(
    recipe: str, monkeypatch: pytest.MonkeyPatch, launcher: FakeLauncher, code: int, part: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", launcher)
    result = call("run", recipe, "--processes", "2")
    assert result.exit_code == code
    assert part in result.stderr


def test_no_more_processes_than_gpus(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    result = call("run", recipe, "--processes", "2")
    assert result.exit_code == 2
    assert "--processes: expected at most 1, the GPUs of this machine, found 2" in result.stderr
