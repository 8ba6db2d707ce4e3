"""Stages reward and dpo through the command line, on the tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import write_rows
from tiny_preferences import ranked_rows, write_preferences
from tiny_run import finetune, interrupt_at, losses, metrics, start, steps, write_recipe

from finetune.baichuan.load import load_model, load_tokenizer, resolve_base
from finetune.recipe.schema import Model
from rlhf.reward.adapter import load_reward
from rlhf.reward.scoring import score_conversations

TRAIN = {
    "max_steps": 24,
    "eval_every": 24,
    "save_every": 24,
    "batch_size": 4,
    "learning_rate": 5e-3,
    "gradient_checkpointing": False,
}


def recipe(folder: Path, base: Path, stage: str, **sections: Any) -> str:
    data = {**write_preferences(folder), "packing": stage == "reward", **sections.pop("data", {})}
    train = {**TRAIN, **sections.pop("train", {})}
    return write_recipe(folder, base, stage=stage, data=data, train=train, **sections)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))


def same_weights(first: Path, second: Path) -> None:
    for name in ("adapter_model.safetensors", "score.safetensors"):
        if (first / name).is_file():
            one, other = load_file(first / name), load_file(second / name)
            assert one.keys() == other.keys()
            for key in one:
                torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-7)


# --- reward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections", [{}, {"train": {"gradient_checkpointing": "matmul"}}, {"data": {"packing": False}}]
)
def test_reward_learns_the_order(tiny_base: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    output = finetune("run", recipe(tmp_path, tiny_base, "reward", **sections))
    assert "gap 1" in output
    assert "gap 3" in output
    found = result(tmp_path)
    assert found["eval_accuracy"] >= 0.9
    assert found["eval_loss_before"] == pytest.approx(0.6931, abs=1e-3)
    adapter = tmp_path / "run" / "adapter"
    info = json.loads((adapter / "reward.json").read_text(encoding="utf-8"))
    assert info["mean"] == found["score_mean"]
    assert info["accuracy"] == found["eval_accuracy"]
    assert info["responses"] == 18
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert set(evaluation["by_gap"]) == {"1", "2", "3"}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for text in ("Reward model", "Accuracy by gap", "By first-tier category", "多喝水，多休息。"):
        assert text in page
    assert "--adapter" not in page  # nothing to talk with


def test_reward_adapter_scores_as_it_was_measured(tiny_base: Path, tmp_path: Path) -> None:
    """Loaded back onto a fresh base, held-out responses have the mean and deviation that were stored."""
    finetune("run", recipe(tmp_path, tiny_base, "reward"))
    base = resolve_base(str(tiny_base))
    tokenizer = load_tokenizer(base.folder)
    model = load_model(Model(base=str(tiny_base)), base)
    loaded = load_reward(tmp_path / "run" / "adapter", model, base=base, tokenizer=tokenizer)
    held_out = [
        [*row["messages"], {"role": "assistant", "content": response["text"]}]
        for row in ranked_rows(6, first=16)
        for response in row["responses"]
    ]
    scores = torch.tensor(score_conversations(loaded, tokenizer, held_out))
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    raw = score_conversations(loaded, tokenizer, held_out, normalised=False, batch_size=1)
    assert sum(raw) / len(raw) == pytest.approx(loaded.info.mean, abs=1e-3)


def test_steps_do_not_depend_on_how_they_are_cut_up(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    shapes = {"whole": (4, 1), "halves": (2, 2), "single": (1, 4)}
    for name, (batch, accumulation) in shapes.items():
        train = {"max_steps": 6, "eval_every": 6, "batch_size": batch, "gradient_accumulation": accumulation}
        settings = {"reward": {"margin": 0.1, "mean_score_coef": 0.01}, "adapter": {"dropout": 0.0}}
        finetune("run", recipe(tmp_path / name, tiny_bases["rope"], "reward", train=train, **settings))
    whole = tmp_path / "whole" / "run"
    for name in ("halves", "single"):
        other = tmp_path / name / "run"
        assert losses(other) == pytest.approx(losses(whole), rel=1e-4)
        assert metrics(other)[-1]["eval_accuracy"] == metrics(whole)[-1]["eval_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_two_processes_train_as_one(tiny_bases: dict[str, Path], tmp_path: Path, stage: str) -> None:
    """The same prompts to a step; held-out prompts are scored once, whichever process has them."""
    settings: dict[str, Any] = {"adapter": {"dropout": 0.0}, "report": {"samples": 0}}
    train = {"max_steps": 4, "eval_every": 4, "eval_batch_size": 2}
    finetune("run", recipe(tmp_path / "1", tiny_bases["rope"], stage, train=train, **settings))
    halves = {**train, "batch_size": 2}
    process = start(
        "run", recipe(tmp_path / "2", tiny_bases["rope"], stage, train=halves, **settings), "--processes", 2
    )
    output = process.communicate()[0]
    assert process.returncode == 0, output
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    evaluations = [json.loads((run / "evaluation.json").read_text(encoding="utf-8")) for run in (one, two)]
    assert evaluations[1]["accuracy"] == pytest.approx(evaluations[0]["accuracy"], abs=0.06)
    assert evaluations[1]["mean"] == pytest.approx(evaluations[0]["mean"], rel=0.02, abs=1e-2)
    assert evaluations[1]["responses"] == 18


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_a_resumed_run_is_the_same_run(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    train = {"max_steps": 8, "save_every": 4, "eval_every": 8}
    settings: dict[str, Any] = {"train": train, "report": {"samples": 0}}
    finetune("run", recipe(tmp_path / "whole", tiny_bases["rope"], stage, **settings))
    stopped = recipe(tmp_path / "stopped", tiny_bases["rope"], stage, **settings)
    interrupt_at(monkeypatch, 5)
    output = finetune("run", stopped, expect=130)
    assert "step-5, continue with --resume" in output
    finetune("run", stopped, "--resume")
    assert "step-8" in steps(tmp_path / "stopped" / "run")
    same_weights(tmp_path / "whole" / "run" / "adapter", tmp_path / "stopped" / "run" / "adapter")
    assert result(tmp_path / "stopped")["eval_accuracy"] == result(tmp_path / "whole")["eval_accuracy"]


# --- dpo --------------------------------------------------------------------------------------------


def test_dpo_learns_and_keeps_the_chosen_likely(tiny_base: Path, tmp_path: Path) -> None:
    output = finetune("run", recipe(tmp_path, tiny_base, "dpo", dpo={"sft_weight": 0.1}))
    found = result(tmp_path)
    assert found["eval_accuracy"] >= 0.9
    assert found["eval_loss_before"] > found["eval_loss_after"]
    assert found["chosen_logp_after"] > found["chosen_logp_before"]
    assert found["rejected_logp_after"] < found["chosen_logp_after"]
    assert "log-probability a token  chosen" in output
    logged = metrics(tmp_path / "run")[-2]
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= set(logged)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Implicit rewards" in page
    assert "Answers before and after" in page


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_going_on_from_an_sft_adapter(tiny_bases: dict[str, Path], tmp_path: Path, stage: str) -> None:
    sft = write_recipe(
        tmp_path / "sft", tiny_bases["rope"], adapter={"rank": 4, "alpha": 12.0, "targets": ["W_pack"]}
    )
    finetune("run", sft)
    start = tmp_path / "sft" / "run" / "adapter"
    path = recipe(tmp_path, tiny_bases["rope"], stage, train={"max_steps": 2}, report={"samples": 0})
    finetune("run", path, f"model.adapter={start}")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 12.0, ["W_pack"])
    recorded = (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
    assert "rank: 4" in recorded
    finetune("run", tmp_path / "run" / "recipe.yaml", "--overwrite")  # the recorded recipe repeats the run


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_check_says_what_a_run_would_do(tiny_bases: dict[str, Path], tmp_path: Path, stage: str) -> None:
    output = finetune("check", recipe(tmp_path, tiny_bases["rope"], stage))
    assert f"stage {stage}" in output
    assert "layout ranked" in output
    assert "the recipe can run" in output
    # 16 prompts; each has 3 pairs
    assert ("48 rows" if stage == "dpo" else "16 rows") in output
    assert not (tmp_path / "run").exists()


# --- what is refused --------------------------------------------------------------------------------


def test_bad_rows_are_named(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    rows = ranked_rows(4)
    rows[1]["responses"] = rows[1]["responses"][:1]
    for response in rows[2]["responses"]:
        response["rank"] = 1
    path = recipe(
        tmp_path, tiny_bases["rope"], "reward", data={"train": str(write_rows(tmp_path / "bad.jsonl", rows))}
    )
    output = finetune("run", path, expect=2)
    assert "bad.jsonl:2: 1 response, expected at least 2" in output
    assert "bad.jsonl:3: all 3 responses are equally good" in output
    assert not (tmp_path / "run").exists()
    output = finetune("run", path, "data.on_bad_rows=skip", "train.max_steps=1")
    assert "2 of 4 rows" in output


def test_a_base_that_would_be_cut_up_is_refused(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.session.base_is_sharded", lambda: True)
    output = finetune("run", recipe(tmp_path, tiny_bases["rope"], "dpo"), expect=2)
    assert "stage dpo needs the whole base in each process" in output


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_quantised_base(tiny_bases: dict[str, Path], tmp_path: Path, stage: str) -> None:
    path = recipe(
        tmp_path, tiny_bases["rope"], stage, train={"max_steps": 2, "eval_every": 2}, report={"samples": 0}
    )
    finetune("run", path, "model.quantization=nf4")
    assert result(tmp_path)["eval_loss_before"] == pytest.approx(0.6931, abs=1e-3)
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.adapter=nowhere", "model.adapter: nowhere: no such folder"),
        ("model.adapter=DATA", "no adapter_config.json"),
        ("data.train=SFT", "no preference data: columns 'question', 'answer'"),
        ("adapter.method=ptuning", "adapter.method: stage reward switches adapters"),
        ("adapter.targets=[lm_head]", "lm_head cannot be adapted"),
    ],
)
def test_what_cannot_work_is_said(
    tiny_bases: dict[str, Path], tmp_path: Path, override: str, message: str
) -> None:
    path = recipe(tmp_path, tiny_bases["rope"], "reward", adapter={})
    override = override.replace("DATA", str(tmp_path)).replace("SFT", str(tmp_path / "train.jsonl"))
    extra = ["adapter.rank=8"] if "method" not in override else []
    assert message in finetune("run", path, override, *extra, expect=2)
    assert not (tmp_path / "run").exists()
