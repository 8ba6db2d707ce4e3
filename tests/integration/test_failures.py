"""What goes wrong on the user's side: one message, exit code 2, nothing half written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_rows
from tiny_run import finetune, losses, steps, write_recipe

GOOD = {"question": "感冒怎么办？", "answer": "多喝水。"}


def test_loss_that_is_no_number_stops_the_run(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two good steps; what they taught is saved and can be resumed from."""
    from finetune.train.trainer import AdapterTrainer

    compute = AdapterTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 2 else loss

    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"gradient_accumulation": 2, "batch_size": 1})
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "compute_loss", compute_loss)
        output = finetune("run", recipe, expect=2)
    run = tmp_path / "run"
    assert "the loss or gradient of step 3 is not a number" in output
    assert f"the state before it is in {run / 'checkpoints' / 'step-2'}" in output
    assert steps(run) == ["step-2"]
    saved = load_file(run / "checkpoints" / "step-2" / "trainable.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert not (run / "adapter").exists()
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    assert len(losses(run)) == 2
    finetune("run", recipe, "--resume")
    assert len(losses(run)) == 8


def test_gradient_that_is_no_number_stops_the_run(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is fine, the gradient is not: a step would spoil the weights for good."""
    from finetune.train.trainer import AdapterTrainer

    step = AdapterTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 2:
            next(p for p in self.model.parameters() if p.requires_grad).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)
    output = finetune("run", write_recipe(tmp_path, tiny_bases["rope"]), expect=2)
    assert "the loss or gradient of step 3 is not a number" in output
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "trainable.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_bad_numbers_between_logged_steps(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out at the next logged step; what is saved is the step before, and going on from it loses nothing."""
    from finetune.train.trainer import AdapterTrainer

    compute = AdapterTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 2 else loss

    settings = {"max_steps": 8, "log_every": 5, "schedule": "linear"}
    made = [
        write_recipe(tmp_path / name, tiny_bases["rope"], train=settings, adapter={"dropout": 0.0})
        for name in ("sound", "stopped")
    ]
    finetune("run", made[0])
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "compute_loss", compute_loss)
        output = finetune("run", made[1], expect=2)
    assert "the loss or gradient of step 3 is not a number" in output
    assert steps(tmp_path / "stopped" / "run") == ["step-2"]
    finetune("run", made[1], "--resume")
    sound, resumed = (
        load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors")
        for name in ("sound", "stopped")
    )
    for name, tensor in sound.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)


def test_diverging_run_stops_with_advice(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"learning_rate": 1e30, "max_steps": 20})
    output = finetune("run", recipe, expect=2)
    assert "is not a number" in output
    assert "lower train.learning_rate" in output


def test_base_with_broken_numbers(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """No step was taken, so there is nothing to save."""
    base = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    output = finetune("run", write_recipe(tmp_path / "r", base), expect=2)
    assert "the loss or gradient of step 1 is not a number" in output
    assert steps(tmp_path / "r" / "run") == []


# --- data -------------------------------------------------------------------------------------------------------


BAD: list[Any] = [
    {"question": "", "answer": "空"},
    {"question": "没有回答", "answer": ""},
    {"question": 5, "answer": "x"},
]


def recipe_for(folder: Path, base: Path, rows: list[Any], **data: Any) -> str:
    path = write_rows(folder / "rows.jsonl", rows)
    return write_recipe(folder / "r", base, data={"train": str(path), **data}, train={"max_steps": 1})


def test_bad_rows_stop_the_run_by_line(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_bases["rope"], [GOOD, *BAD, GOOD])
    output = finetune("run", recipe, expect=2)
    for line in (2, 3, 4):
        assert f"rows.jsonl:{line}" in output
    assert "data.on_bad_rows" in output
    assert not (tmp_path / "r" / "run").exists()


def test_bad_rows_are_skipped_on_request_and_reported(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_bases["rope"], [GOOD, *BAD, GOOD], on_bad_rows="skip")
    output = finetune("run", recipe)
    assert "2 of 5 rows" in output
    assert "rows.jsonl:3" in output
    report = json.loads((tmp_path / "r" / "run" / "data_report.json").read_text(encoding="utf-8"))
    assert [row["line"] for row in report["bad_rows"]] == [2, 3, 4]
    assert "rows.jsonl" in (tmp_path / "r" / "run" / "report.html").read_text(encoding="utf-8")


def test_torn_line_and_conversation_that_begins_with_the_assistant(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    answer_first = {"conversations": [{"from": "gpt", "value": "我先说"}, {"from": "human", "value": "好"}]}
    good = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
    lines = [json.dumps(row, ensure_ascii=False) for row in (good, answer_first, good)]
    rows.write_text("\n".join([*lines, lines[0][:20]]) + "\n", encoding="utf-8")
    recipe = write_recipe(tmp_path / "r", tiny_bases["rope"], data={"train": str(rows)})
    output = finetune("run", recipe, expect=2)
    assert "rows.jsonl:2" in output
    assert "rows.jsonl:4" in output


@pytest.mark.parametrize(("content", "says"), [("", "empty"), ("\n\n", "empty")])
def test_empty_data(tiny_bases: dict[str, Path], tmp_path: Path, content: str, says: str) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    (tmp_path / "train.jsonl").write_text(content)
    output = finetune("run", recipe, expect=2)
    assert "train.jsonl" in output
    assert says in output


def test_missing_data_and_missing_base(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    output = finetune("run", recipe, f"data.train={tmp_path / 'trian.jsonl'}", expect=2)
    assert "trian.jsonl" in output
    output = finetune("run", recipe, "model.base=baichuan2-nanoo", expect=2)
    assert "did you mean baichuan2-nano" in output
    (tmp_path / "empty").mkdir()
    output = finetune("run", recipe, f"model.base={tmp_path / 'empty'}", expect=2)
    assert "no config.json" in output
    assert not (tmp_path / "run").exists()


def test_settings_that_this_machine_cannot_serve(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    for override, says in (
        ("train.optimizer=paged_adamw_8bit", "train.optimizer: paged_adamw_8bit needs a GPU"),
        ("train.activation_offloading=true", "train.activation_offloading needs a GPU"),
        ("model.attention=flash_attention_2", "model.attention: flash_attention_2 is not available here"),
        ("adapter.init=loftq", "adapter.init: loftq needs a GPU"),
    ):
        assert says in finetune("run", recipe, override, expect=2)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["run", "check"])
def test_unknown_targets_and_keys(tiny_bases: dict[str, Path], tmp_path: Path, command: str) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    assert "packs q, k and v into W_pack" in finetune(command, recipe, "adapter.targets=[q_proj]", expect=2)
    output = finetune(command, recipe, "adapter.targets=[W_pack, lm_head]", expect=2)
    assert "lm_head cannot be adapted" in output
    output = finetune(command, recipe, "train.learning_rat=1", expect=2)
    assert "learning_rate" in output
    assert not (tmp_path / "run").exists()


def test_refused_run_leaves_the_one_that_it_would_replace(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"max_steps": 1})
    finetune("run", recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for override in ("adapter.targets=[q_proj]", "adapter.init=loftq", "data.train=absent.jsonl"):
        if "loftq" in override and torch.cuda.is_available():
            continue
        finetune("run", recipe, override, "--overwrite", expect=2)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


def test_base_that_fails_to_load_leaves_no_run(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """A weight is missing, which shows when the model is built."""
    base = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    output = finetune("run", write_recipe(tmp_path / "r", base), expect=2)
    assert "1 weight missing" in output
    assert not (tmp_path / "r" / "run").exists()


def test_bug_is_told_apart_from_user_error(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.train import runner

    def broken(*args: Any) -> Any:
        raise AssertionError("impossible")

    monkeypatch.setattr(runner, "predict", broken)
    with pytest.raises(AssertionError):
        finetune("run", write_recipe(tmp_path, tiny_bases["rope"]), expect=2)


@pytest.mark.parametrize("at", [4, 8])
def test_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"], train={"save_every": 4})
    run, save = tmp_path / "run", torch.save

    def full(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        """As torch does on a full disk."""
        save(content, file, *args, **kwargs)
        if f"checkpoint-{at}" in str(file):
            raise RuntimeError("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))  # type: ignore[attr-defined]
        output = finetune("run", recipe, expect=2)
    assert f"no space left in {run}: a checkpoint takes " in output
    if at == 4:
        assert "free some, then start again" in output
        assert not run.exists()
        return
    assert "free some, then continue with --resume" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-4"]
    finetune("run", recipe, "--resume")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_a_checkpoint_that_fails_for_another_reason_is_no_full_disk(tmp_path: Path) -> None:
    from finetune.train.run_folder import RunFolder

    def fail() -> None:
        with RunFolder(tmp_path).writing(1) as staging:
            (staging / "checkpoint-1").mkdir(parents=True)
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(RuntimeError, match="unexpected pos"):
        fail()
    assert not (tmp_path / "checkpoints" / ".writing").exists()
