"""Interrupted runs: saved whole, continued exactly, and never mixed up with other runs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import finetune, interrupt_at, losses, metrics, start, steps, wait_for, write_recipe

from finetune.train.run_folder import OURS


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same adapter, and the same losses on the way."""
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert losses(one) == losses(other)


def interrupted(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, step: int, **sections: Any
) -> tuple[str, Path]:
    """A recipe and its run folder after Ctrl-C in a step."""
    recipe = write_recipe(tmp_path, base, **sections)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        output = finetune("run", recipe, expect=130)
    run = tmp_path / "run"
    assert f"saved {run / 'checkpoints' / f'step-{step}'}, continue with --resume" in output
    return recipe, run


VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"adapter": {"dropout": 0.3}, "train": {"schedule": "cosine"}},
    "packed": {"data": {"packing": True}, "train": {"batch_size": 1, "gradient_accumulation": 2}},
    "evaluated": {"data": {"validation_share": 0.25}, "train": {"eval_every": 2, "save_every": 2}},
    "sampled": {"data": {"sampling": {"size": 5}}},
    "nf4": {"model": {"quantization": "nf4"}},
    "pissa": {"adapter": {"init": "pissa"}},
    "ptuning": {"adapter": {"method": "ptuning"}},
    "prefix": {"adapter": {"method": "prefix", "prefix_projection": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_an_uninterrupted_one(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    tiny_base = tiny_bases["rope" if variant in ("dropout", "nf4", "ptuning") else "alibi"]
    sections = VARIANTS[variant]
    sections = {**sections, "train": {"max_steps": 6, **sections.get("train", {})}}
    straight = write_recipe(tmp_path / "straight", tiny_base, **sections)
    finetune("run", straight)
    recipe, run = interrupted(tmp_path / "stopped", tiny_base, monkeypatch, 3, **sections)
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    assert not (run / "adapter").exists()
    finetune("run", recipe, "--resume")
    assert_same_run(tmp_path / "straight" / "run", run)
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
    recorded = [(line["step"], "loss" in line) for line in metrics(run)]
    assert len(recorded) == len(set(recorded))  # no step twice


@pytest.mark.parametrize("step", [1, 4, 5])
def test_interruption_at_any_step(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also in the first step, at the end of an epoch (4), and just after."""
    sections = {"train": {"max_steps": 6}, "data": {"validation_share": 0}}
    finetune("run", write_recipe(tmp_path / "straight", tiny_bases["rope"], **sections))
    recipe, run = interrupted(tmp_path / "stopped", tiny_bases["rope"], monkeypatch, step, **sections)
    assert f"step-{step}" in steps(run)
    finetune("run", recipe, "--resume")
    assert_same_run(tmp_path / "straight" / "run", run)


def test_termination_is_an_interruption(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What batch schedulers send."""
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    interrupt_at(monkeypatch, 2, signal.SIGTERM)
    finetune("run", recipe, expect=130)
    assert steps(tmp_path / "run") == ["step-2"]


def test_interruption_in_the_last_step_finishes(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"max_steps": 3})
    interrupt_at(monkeypatch, 3)
    finetune("run", recipe)
    assert adapter(tmp_path / "run")


def test_resuming_twice_and_for_longer(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune("run", write_recipe(tmp_path / "straight", tiny_bases["rope"], train={"max_steps": 6}))
    recipe, run = interrupted(tmp_path / "s", tiny_bases["rope"], monkeypatch, 2, train={"max_steps": 6})
    seconds = [line["seconds"] for line in metrics(run) if "seconds" in line][-1]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert "going on after step 2" in finetune("run", recipe, "--resume", expect=130)
    assert "going on after step 4" in finetune("run", recipe, "--resume")
    assert_same_run(tmp_path / "straight" / "run", run)
    later = [line["seconds"] for line in metrics(run) if "seconds" in line]
    assert later == sorted(later)  # each part goes on counting where the last one stopped
    assert json.loads((run / "result.json").read_text())["train_seconds"] > later[-1] - 0.1 > seconds
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert [len(environment["earlier"]), "earlier" in environment["earlier"][0]] == [2, False]
    assert "finished already" in finetune("run", recipe, "--resume")


@pytest.mark.parametrize("content", ["", "- a\n- list\n", "model: [broken\n"])
def test_a_recipe_that_was_damaged_cannot_be_resumed(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    recipe, run = interrupted(tmp_path, tiny_bases["rope"], monkeypatch, 2)
    (run / "recipe.yaml").write_text(content, encoding="utf-8")
    output = finetune("run", recipe, "--resume", expect=2)
    assert f"{run / 'recipe.yaml'}: is no recipe any more" in output
    assert steps(run) == ["step-2"]


def test_a_taken_folder_is_refused_before_torch_is_imported(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: another\n", encoding="utf-8")
    command = [sys.executable, "-X", "importtime", "-m", "finetune", "run", str(recipe)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "holds a run already" in result.stderr
    assert "| torch\n" not in result.stderr


def test_resuming_where_nothing_is_is_refused(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    assert "holds no run that could be resumed" in finetune("run", recipe, "--resume", expect=2)
    assert not (tmp_path / "run").exists()


def test_resuming_without_a_checkpoint_begins_at_the_beginning(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = interrupted(tmp_path, tiny_bases["rope"], monkeypatch, 2)
    shutil.rmtree(run / "checkpoints")
    finetune("run", recipe, "--resume")
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 9))


def test_second_ctrl_c_stops_at_once(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of step 4: what step 2 saved is what remains."""
    sections = {"train": {"max_steps": 6, "save_every": 2, "gradient_accumulation": 2, "batch_size": 1}}
    finetune("run", write_recipe(tmp_path / "straight", tiny_bases["rope"], **sections))
    recipe = write_recipe(tmp_path / "stopped", tiny_bases["rope"], **sections)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        interrupt_at(patch, 4)
        assert "Traceback" not in finetune("run", recipe, expect=130)
    run = tmp_path / "stopped" / "run"
    assert steps(run) == ["step-2"]
    finetune("run", recipe, "--resume")
    assert_same_run(tmp_path / "straight" / "run", run)


def test_run_that_ended_while_it_wrote_its_result(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """All steps done, no adapter yet: resuming writes it without training again."""
    sections = {"train": {"max_steps": 4, "eval_every": 2}, "data": {"validation_share": 0.25}}
    recipe = write_recipe(tmp_path, tiny_bases["rope"], **sections)
    finetune("run", recipe)
    run = tmp_path / "run"
    before, lines = adapter(run), metrics(run)
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    finetune("run", recipe, "--resume")
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter(run).items())
    assert metrics(run) == lines
    assert json.loads((run / "result.json").read_text())["steps"] == 4


# --- signals to a real process ----------------------------------------------------------------------------------


def test_ctrl_c_in_a_terminal(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"max_steps": 5000})
    run = tmp_path / "run"
    process = start("run", recipe)
    wait_for(process, lambda: (run / "metrics.jsonl").is_file() and len(metrics_so_far(run)) > 3)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    assert "stopping after this step" in output
    assert "Traceback" not in output
    (checkpoint,) = [path for path in (run / "checkpoints").iterdir() if str(path) in output]
    last = int(checkpoint.name.removeprefix("step-"))
    finetune("run", recipe, "--resume", f"train.max_steps={last + 2}")
    assert losses(run)[-1] < losses(run)[0]
    assert metrics(run)[-1]["step"] == last + 2


def test_killed_process_leaves_a_run_that_can_be_resumed(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Killed while it saves after every step, most likely in the middle of a checkpoint."""
    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"max_steps": 5000, "save_every": 1})
    run = tmp_path / "run"
    process = start("run", recipe)
    wait_for(process, lambda: (run / "metrics.jsonl").is_file() and len(metrics_so_far(run)) > 3)
    wait_for(process, lambda: (run / "checkpoints" / ".writing").is_dir())
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()
    last = max(int(name.removeprefix("step-")) for name in steps(run) if name.startswith("step-"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99')  # a line torn by the crash
    finetune("run", recipe, "--resume", f"train.max_steps={last + 2}", "train.save_every=100")
    assert [line["step"] for line in metrics(run)] == list(range(1, last + 3))
    assert ".writing" not in steps(run)


def metrics_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


# --- what a folder holds already --------------------------------------------------------------------------------


def test_folder_of_another_run(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"max_steps": 2})
    finetune("run", recipe)
    run = tmp_path / "run"
    before = adapter(run)
    output = finetune("run", recipe, "train.max_steps=4", expect=2)
    assert f"output_dir: {run} holds a run already" in output
    assert "--resume" in output
    assert "--overwrite" in output
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter(run).items())
    (run / "notes.txt").write_text("mine")
    finetune("run", recipe, "train.max_steps=4", "--overwrite")
    assert json.loads((run / "result.json").read_text())["steps"] == 4
    assert len(losses(run)) == 4
    assert (run / "notes.txt").read_text() == "mine"  # not ours to remove
    assert {path.name for path in run.iterdir()} <= {*OURS, "notes.txt"}


def test_folder_that_is_no_run(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    precious = tmp_path / "run" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    for flag in ([], ["--overwrite"], ["--resume"]):
        output = finetune("run", recipe, *flag, expect=2)
        assert "is not empty and holds no run of this toolkit" in output
        assert [path.name for path in precious.parent.iterdir()] == ["thesis.txt"]
    precious.unlink()
    precious.parent.rmdir()
    precious.parent.write_text("")
    assert "is a file" in finetune("run", recipe, expect=2)


def test_resuming_with_other_settings(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = interrupted(tmp_path, tiny_bases["rope"], monkeypatch, 2)
    saved = (run / "recipe.yaml").read_text(encoding="utf-8")
    output = finetune("run", recipe, "--resume", "train.learning_rate=0.5", "adapter.rank=4", expect=2)
    assert "train.learning_rate: was 0.01, now 0.5" in output
    assert "adapter.rank: was 8, now 4" in output
    assert (run / "recipe.yaml").read_text(encoding="utf-8") == saved
    finetune("run", recipe, "--resume", "train.log_every=2", "report.samples=0")


@pytest.mark.parametrize("kind", ["gone", "torn"])
def test_damaged_checkpoint(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    recipe, run = interrupted(tmp_path, tiny_bases["rope"], monkeypatch, 3, train={"save_every": 2})
    checkpoint = run / "checkpoints" / "step-3"
    needed = ("trainable.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt", "rng_state.pth")
    for name in needed:
        whole = (checkpoint / name).read_bytes()
        if kind == "gone":
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        output = finetune("run", recipe, "--resume", expect=2)
        assert name in output
        assert "remove that folder to continue from step-2" in output
        (checkpoint / name).write_bytes(whole)
    shutil.rmtree(checkpoint)
    finetune("run", recipe, "--resume")
    assert len(losses(run)) == 8
