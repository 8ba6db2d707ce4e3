"""What the benchmarks compare with computes the same, and they start where the package is not installed."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_naive_model_computes_the_same_with_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from models import make_naive

    ids = torch.arange(1, 41).view(2, 20)
    model = tiny_model("alibi")
    made = []
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        naive = make_naive(model)
        fill = torch.Tensor.masked_fill
        monkeypatch.setattr(torch.Tensor, "masked_fill", lambda *args: made.append(args) or fill(*args))
        for _ in range(2):
            torch.testing.assert_close(naive(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert len([args for args in made if args[0].ndim == 3]) == 1


@pytest.mark.parametrize("name", ["train_step", "ppo_step", "merge_memory", "attention", "loss", "matmul"])
def test_benchmarks_find_the_package(tmp_path: Path, name: str) -> None:
    """From any folder, as `python benchmarks/NAME.py`: without an installed package, without PYTHONPATH."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import {name}; import finetune"
    done = subprocess.run(
        [sys.executable, "-E", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_better_of_two_rounds_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import suites

    kept = {"predicted_peak_bytes": 100}
    first = {"seconds_per_step": 2.0, "peak_bytes": 125, "predicted_over_measured": 0.8, **kept}
    second = {"seconds_per_step": 1.0, "peak_bytes": 80, "predicted_over_measured": 1.25, **kept}
    found = suites.better(first, second)
    assert found == {"seconds_per_step": 1.0, "peak_bytes": 125, "predicted_over_measured": 0.8, **kept}


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_rows_are_judged_by_float64(
    monkeypatch: pytest.MonkeyPatch, encoding: str, packed: bool
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import attention

    monkeypatch.setattr(attention, "DOCUMENT", 16)
    case = attention.Case(torch.device("cpu"), encoding, packed, 64, 2)
    for implementation in ("eager", "sdpa, mask", "sdpa, one by one"):
        row = case.measure(implementation, 1)
        assert "error" not in row, row
        assert 0 < row["output_error"] < 1e-5
        assert 0 < row["gradient_error"] < 1e-5
        assert row["milliseconds"] > 0
        assert f"| 64 | {encoding} | {'packed, 16' if packed else 'one'} |" in attention.line(row)
    case.expected[0] = case.expected[0].roll(1, 0)
    assert case.measure("eager", 1)["output_error"] > 0.1
    assert "error" in case.measure("flash_attention_2", 1)  # a row that says why, not a crash


def test_every_row_of_the_suites_is_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are known, and a recipe that our schema accepts; its time can be counted."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import suites
    import train_step
    from models import config_of

    from finetune.train.speed import step_flops

    for rows in suites.SUITES.values():
        for settings in rows.values():
            monkeypatch.setattr(sys, "argv", ["train_step.py", *suites.flags(settings)])
            arguments = train_step.parse()
            recipe = train_step.recipe_of(arguments, Path())
            config = config_of(arguments.shape, arguments.positions, arguments.seq).to_dict()
            sizes = {"tokens": 1.0, "document": 1.0, "supervised": 1.0}
            needed = step_flops(recipe, config, recomputed=False, **sizes)
            assert 0 < needed <= step_flops(recipe, config, **sizes)


def test_a_failing_row_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Targets that need it are not met, and time that is spent is spent: the rest is left out."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import suites

    now = [0.0]
    monkeypatch.setattr(suites.time, "monotonic", lambda: now[0])
    kept: list[dict[str, Any]] = []

    def measured(path: str, options: list[str], *, timeout: float) -> dict[str, Any]:
        now[0] += 100.0
        if "naive" in options or "compile" in " ".join(options):
            return {"error": "out of memory"}
        return {
            "seconds_per_step": 1.0,
            "tokens_per_second": 50.0 if "llama" in options else 100.0,
            "share_of_matmul_peak": 0.6,
            "peak_bytes": 2**30,
            "predicted_over_measured": 1.0,
        }

    monkeypatch.setattr(suites, "in_fresh_process", measured)
    monkeypatch.setattr(suites, "write_result", lambda name, result: kept.append(result) or Path(name))
    suites.run("gpu", "train_step.py")
    output = capsys.readouterr().out
    assert output.count("left out: no time left") > 2
    assert len(kept) == len(suites.SUITES["gpu"])  # written after every row
    met = {ratio["what"]: ratio["met"] for ratio in kept[-1]["ratios"]}
    assert met["7B LoRA against stock Llama at its best"]  # one of the peers ran
    assert not met["13B against the original code"]


@pytest.mark.parametrize("who", ["ours", "llama", "plain", "naive"])
def test_trainers_take_one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, who: str) -> None:
    """Of several, over which transformers would split a batch; and ours refuses bad numbers as a run does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import models
    import train_step
    from transformers import TrainingArguments

    set_up = TrainingArguments.__dict__["_setup_devices"].func

    def four_gpus(self: TrainingArguments) -> torch.device:
        device = set_up(self)
        self._n_gpu = 4
        return device

    counted_once = functools.cached_property(four_gpus)
    counted_once.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", counted_once)
    monkeypatch.setattr(models, "VOCAB", 300)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(models.SHAPES, "nano", small)
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--who", who, "--shape", "nano", "--seq", "16"])
    arguments = train_step.parse()
    config = models.config_of("nano", "rope", 16)
    make = models.random_llama if who in ("llama", "plain") else models.random_model
    model = make(config, torch.device("cpu"), torch.float32)
    trainer, _ = train_step.BUILDERS[who](arguments, model, config, tmp_path)
    assert trainer.args.n_gpu == 1
    guarded = any(
        type(callback).__name__ == "FiniteCallback" for callback in trainer.callback_handler.callbacks
    )
    assert guarded == (who == "ours")


def test_a_failing_row_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: a machine with a GPU may not be there a second time."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from _common import in_fresh_process

    script = tmp_path / "row.py"
    script.write_text("def product():\n    raise RuntimeError('no kernel\\nhint')\nproduct()\n")
    row = in_fresh_process(str(script), [])
    assert row["error"] == "hint"
    assert "in product" in row["said"]
    assert "no kernel" in row["said"]


def test_without_quantisation_nobody_asks_for_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import models

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(models, "VOCAB", 300)
    config = models.config_of("cpu", "alibi", 16)
    config.num_hidden_layers = 1
    model = models.random_model(config, torch.device("cpu"), torch.float32)
    assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])
