"""Several processes that train together: the same result as one, the same messages, the same Ctrl-C."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import write_rows
from tiny_run import finetune, losses, metrics, start, steps, wait_for, write_recipe

pytestmark = pytest.mark.slow


def test_two_processes_train_as_one(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The same rows to a step, seven held-out rows that two processes cannot share evenly."""
    rows = [{"question": f"问题{i}", "answer": "血压" * (1 + i * i % 11)} for i in range(7)]
    validation = write_rows(tmp_path / "validation.jsonl", rows)
    runs = {}
    for processes, batch_size in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        recipe = write_recipe(
            folder,
            tiny_bases["rope"],
            adapter={"dropout": 0.0},
            data={"validation": str(validation)},
            train={"max_steps": 4, "batch_size": batch_size, "eval_batch_size": 2, "eval_every": 2},
        )
        if processes == 1:
            finetune("run", recipe)
        else:
            process = start("run", recipe, "--processes", processes)
            output = process.communicate()[0]
            assert process.returncode == 0, output
        runs[processes] = folder / "run"
    one, two = runs[1], runs[2]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    evaluations = [[line["eval_loss"] for line in metrics(run) if "eval_loss" in line] for run in (one, two)]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-4)
    assert [line["tokens"] for line in metrics(two) if "tokens" in line] == [
        line["tokens"] for line in metrics(one) if "tokens" in line
    ]
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-3, rtol=0.05)


def test_failure_in_two_processes_is_told_once(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    process = start("run", recipe, "--processes", 2, "adapter.targets=[q_proj]")
    output = process.communicate()[0]
    assert process.returncode == 2, output
    assert output.count("Baichuan packs q, k and v into W_pack") == 1
    assert "Traceback" not in output


def test_a_step_that_one_process_does(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The others wait, and end where it fails."""
    recipe = tmp_path / "redteam.yaml"
    recipe.write_text(
        f"stage: redteam\nmodel: {{base: {tiny_bases['rope']}}}\noutput_dir: {tmp_path / 'run'}\n"
        "redteam: {limit: 3, max_new_tokens: 4, judge: rules}\n"
    )
    process = start("run", recipe, "--processes", 2, "redteam.compare=nowhere")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert output.count("nowhere: no such folder") == 1
    process = start("run", recipe, "--processes", 2)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert output.count("over-refusal") == 1
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_processes_save_and_resume(
    tiny_bases: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C reaches every process; a scheduler's SIGTERM may reach the launching one alone."""
    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"max_steps": 5000})
    run = tmp_path / "run"
    process = start("run", recipe, "--processes", 2)
    wait_for(process, lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) > 3)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    last = max(steps(run), key=lambda name: int(name.removeprefix("step-")))
    assert f"saved {run / 'checkpoints' / last}, continue with --resume" in output
    step = int(last.removeprefix("step-"))
    finetune("run", recipe, "--resume", f"train.max_steps={step + 2}")
    assert metrics(run)[-1]["step"] == step + 2


def test_bad_number_in_one_process_stops_both(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"learning_rate": 1e30, "max_steps": 20})
    process = start("run", recipe, "--processes", 2)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    assert output.count("is not a number (NaN or infinite)") == 1
