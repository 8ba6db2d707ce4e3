"""SFT, reward, PPO and merge in one command, struck down in PPO and gone on with: the same numbers as in one go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_ppo import ppo_metrics
from tiny_run import ROOT, steps

CHAIN = Path("runs") / "rlhf_medical"
COMMAND = (
    "run",
    str(ROOT / "recipes" / "rlhf_medical.yaml"),
    "model.base=baichuan2-nano",
    *("train.max_steps=4", "report.samples=2", "report.max_new_tokens=8", "train.save_every=2"),
    *("ppo.iterations=5", "ppo.batch_size=8", "ppo.minibatch_size=4", "ppo.max_new_tokens=12"),
    *("ppo.rollout_batch_size=4", "ppo.samples_every=2"),
)


def run(folder: Path, *arguments: str, script: tuple[str, ...] = ("-m", "finetune"), expect: int = 0) -> str:
    """A command in a process of its own, in its folder; returns what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *script, *COMMAND, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def lasting(result: dict[str, Any]) -> dict[str, Any]:
    """result.json without what depends on the clock and the machine."""
    return {key: value for key, value in result.items() if not key.endswith(("seconds", "bytes"))}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain in one go."""
    folder = tmp_path_factory.mktemp("straight")
    output = run(folder)
    assert [line[:5] for line in output.splitlines() if line.startswith("[")] == [
        f"[{n}/4]" for n in (1, 2, 3, 4)
    ]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "iteration", "name", "kept"),
    [
        ("rollout", 2, "SIGKILL", []),
        ("rollout", 4, "SIGKILL", ["step-2"]),
        ("update", 3, "SIGKILL", ["step-2"]),
        ("checkpoint", 4, "SIGKILL", [".writing", "step-2"]),
        ("update", 3, "SIGINT", ["step-2", "step-3"]),
        ("rollout", 1, "SIGTERM", ["step-1"]),
        ("checkpoint", 2, "SIGTERM", ["step-2", "step-3"]),
    ],
)
def test_a_chain_struck_down_in_ppo_is_the_same_chain(
    straight: Path, tmp_path: Path, moment: str, iteration: int, name: str, kept: list[str]
) -> None:
    shutil.copytree(straight / CHAIN, tmp_path / CHAIN, copy_function=shutil.copy2)
    for step in ("ppo", "merged"):
        shutil.rmtree(tmp_path / CHAIN / step)
    killed = -signal.SIGKILL if name == "SIGKILL" else 130
    script = (str(ROOT / "tests" / "killed.py"), moment, str(iteration), name)
    output = run(tmp_path, script=script, expect=killed)
    assert output.count("done already") == 2
    assert "Traceback" not in output
    assert steps(tmp_path / CHAIN / "ppo") == kept
    assert not (tmp_path / CHAIN / "ppo" / "adapter").exists()
    output = run(tmp_path, "--resume")
    assert output.count("done already") == 2
    assert_same_chain(straight / CHAIN, tmp_path / CHAIN)
    assert run(tmp_path).count("done already") == 4


def assert_same_chain(one: Path, other: Path) -> None:
    """Number by number, and the weights bit for bit."""
    assert ppo_metrics(one / "ppo") == ppo_metrics(other / "ppo")
    found = [lasting(json.loads((path / "ppo" / "result.json").read_text())) for path in (one, other)]
    assert found[0] == found[1]
    weights = ("adapter/adapter_model.safetensors", "samples.jsonl", "rollouts.jsonl")
    for name in (*(f"ppo/{each}" for each in weights), "merged/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
