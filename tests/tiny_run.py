"""Whole runs on the tiny models through the command line, in this process so that each takes a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_model import write_rows
from typer.testing import CliRunner

from finetune.cli import app

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = ("多喝水，多休息。", "少吃盐，每天测量血压。", "控制饮食，定期检查血糖。", "按时服药，及时就医。")


def write_recipe(folder: Path, base: Path | str, **sections: dict[str, Any] | str) -> str:
    """A recipe of eight short conversations, four steps an epoch, that finishes in a second.

    Args:
        folder: where recipe and data are written; the run goes to its ``run``.
        base: model folder.
        sections: recipe keys; sections are merged into the defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"问题{i}：怎么办？", "answer": ANSWERS[i % 4]} for i in range(8)]
    train = write_rows(folder / "train.jsonl", rows)
    recipe: dict[str, Any] = {
        "stage": "sft",
        "model": {"base": str(base)},
        "adapter": {"rank": 8},
        "data": {"train": str(train), "max_length": 64, "packing": False, "workers": 1},
        "train": {
            "batch_size": 2,
            "gradient_accumulation": 1,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "log_every": 1,
        },
        "report": {"samples": 2, "max_new_tokens": 8},
        "output_dir": str(folder / "run"),
    }
    if sections.get("adapter", {}).get("method", "lora") != "lora":  # type: ignore[union-attr]
        del recipe["adapter"]["rank"]
    for key, value in sections.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return str(path)


def finetune(*arguments: Any, expect: int = 0, given: str | None = None, notes: bool = True) -> str:
    """Run a command here, ``given`` on its standard input.

    Returns:
        Everything it printed; without ``notes`` what went to the standard output only.
    """
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=given)
    torch.set_num_threads(threads)
    if result.exit_code != expect and result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == expect, result.output
    if expect in (2, 130):
        assert "Traceback" not in result.output
    return result.output if notes else result.stdout


def start(*arguments: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches all processes of a terminal's job, and no other
    )


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait until something has happened in a running process."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def interrupt_at(monkeypatch: Any, step: int, number: int = signal.SIGINT) -> None:
    """Have Ctrl-C come during a step of the next run, once."""
    from finetune.train.adapter_training import AdapterTraining

    original = AdapterTraining.training_step
    pending = [True]

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 == step and pending:
            pending.clear()
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTraining, "training_step", training_step)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> list[float]:
    """Training losses, one a step."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


def steps(run: Path) -> list[str]:
    """Names in checkpoints/."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())
