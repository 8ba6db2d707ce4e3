"""Whole PPO runs on the tiny models, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_ppo import ppo_metrics, write_ppo_recipe
from tiny_run import ROOT, finetune, start

from finetune.report.curves import charts
from finetune.report.run_folder import read_run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert ppo_metrics(one) == ppo_metrics(other)
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    for name in ("samples.jsonl", "rollouts.jsonl"):
        assert (one / name).read_text(encoding="utf-8") == (other / name).read_text(encoding="utf-8")


def interrupt_in(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """Have Ctrl-C come while an iteration learns."""
    from rlhf.ppo.trainer import PPOTrainer

    original = PPOTrainer.learn

    def learn(self: Any, experience: Any) -> Any:
        if self.iteration + 1 == iteration:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, experience)

    monkeypatch.setattr(PPOTrainer, "learn", learn)


def test_a_run_and_what_it_leaves(tiny_base: Path, tmp_path: Path) -> None:
    output = finetune("run", write_ppo_recipe(tmp_path, tiny_base))
    run = tmp_path / "run"
    assert "6 prompts in 6 rows" in output
    lines = ppo_metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["kl"] == 0  # the actor begins as the reference
    assert "policy_loss" not in lines[0]  # the critic warms up alone
    assert all(line["policy_loss"] is not None and line["updates"] == 4 for line in lines[1:])
    assert lines[1]["kl"] == 0
    assert lines[3]["kl"] != 0
    assert [line["kl_coef"] for line in lines] == pytest.approx([0.2, 0.135, 0.07, 0.005])
    for key in ("reward", "entropy", "clip_fraction", "explained_variance", "response_length", "eos_share"):
        assert all(key in line for line in lines), key
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["status"] == "finished"
    assert result["steps"] == 4
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 2
    assert all({"before", "after", "reward_before", "reward_after"} <= set(row) for row in samples)
    rollouts = [
        json.loads(line) for line in (run / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["step"] for row in rollouts] == [1] * 3 + [2] * 3 + [4] * 3
    assert rollouts[0]["score"] <= rollouts[2]["score"]
    assert "Responses over time" in (run / "report.html").read_text(encoding="utf-8")
    drawn = {chart.title: chart for chart in charts(read_run(run))}
    assert next(iter(drawn)) == "Reward, normalised"
    assert "KL to the reference, nats a response" in drawn
    assert not any(title[0].islower() for title in drawn), drawn.keys()  # all have words
    for title, chart in drawn.items():
        low, drawn_from = min(y for line in chart.lines for _, y in line.points), chart.readout["bounds"][2]  # type: ignore[index]
        assert drawn_from >= 0 or low < 0, title
    assert json.loads((run / "adapter" / "training.json").read_text())["stage"] == "ppo"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert "finished already" in finetune("run", str(tmp_path / "recipe.yaml"), "--resume")


def test_the_result_is_an_adapter_like_any_other(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """It talks, merges, and PPO goes on from it: then it is the reference."""
    finetune("run", write_ppo_recipe(tmp_path / "one", tiny_bases["rope"]))
    adapter = tmp_path / "one" / "run" / "adapter"
    finetune("chat", "--model", tiny_bases["rope"], "--adapter", adapter, "--prompt", "你好", "--greedy")
    finetune("merge", "--adapter", adapter, "--base", tiny_bases["rope"], "--output", tmp_path / "merged")
    for start_from in ({"adapter": str(adapter)}, {"base": str(tmp_path / "merged")}):
        folder = tmp_path / next(iter(start_from))
        recipe = write_ppo_recipe(folder, tiny_bases["rope"])
        finetune("run", recipe, *(f"model.{key}={value}" for key, value in start_from.items()))
        assert ppo_metrics(folder / "run")[0]["kl"] == 0
        first = json.loads((folder / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
        last = json.loads((tmp_path / "one/run/samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert first["before"] == last["after"]
    run = tmp_path / "adapter" / "run"  # resumed as it began: with its reference, not with the actor of now
    before, lines = weights(run), ppo_metrics(run)
    shutil.rmtree(run / "checkpoints" / "step-4")
    (run / "result.json").unlink()
    finetune("run", tmp_path / "adapter" / "recipe.yaml", f"model.adapter={adapter}", "--resume")
    assert ppo_metrics(run) == lines
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())


def test_on_a_quantised_base(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_ppo_recipe(tmp_path, tiny_bases["rope"], model={"quantization": "nf4"})
    finetune("run", recipe)
    lines = ppo_metrics(tmp_path / "run")
    assert lines[1]["kl"] == 0
    assert lines[3]["kl"] != 0
    assert json.loads((tmp_path / "run/adapter/training.json").read_text())["quantization"] == "nf4"


def test_adapters_of_other_bases(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """One of another base is refused; one of this base in another precision is told of."""
    finetune("run", write_ppo_recipe(tmp_path / "first", tiny_bases["rope"]))
    adapter = tmp_path / "first" / "run" / "adapter"
    recipe = write_ppo_recipe(tmp_path / "second", tiny_bases["rope"])
    output = finetune("check", recipe, f"model.adapter={adapter}", "model.quantization=nf4")
    assert "was trained with model.quantization=none, and this run has nf4" in output
    assert "was trained with" not in finetune("check", recipe, f"model.adapter={adapter}")
    recipe = write_ppo_recipe(tmp_path / "other", tiny_bases["alibi"])
    output = finetune("check", recipe, f"model.adapter={adapter}", expect=2)
    assert f"model.adapter: {adapter}: was trained on" in output


def test_a_merged_reward_model(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """With weights and a tokenizer of its own, and with what its scores mean beside them."""
    from tiny_model import tiny_config

    from finetune.baichuan import BaichuanForSequenceClassification
    from finetune.baichuan.load import load_tokenizer

    folder = tmp_path / "judge"
    torch.manual_seed(0)
    model = BaichuanForSequenceClassification(tiny_config("alibi", num_labels=1))
    model.save_pretrained(folder)
    load_tokenizer(tiny_bases["rope"]).save_pretrained(folder)
    (folder / "reward.json").write_text('{"mean": 3.0, "std": 2.0}')
    finetune("run", write_ppo_recipe(tmp_path, tiny_bases["rope"], ppo={"reward": str(folder)}))
    for line in ppo_metrics(tmp_path / "run"):
        assert line["reward"] == pytest.approx((line["reward/judge"] - 3) / 2, abs=1e-5)
        assert line["reward_std"] > 0


# --- resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ppo",
    [{"kl_schedule": "adaptive", "kl_horizon": 100}, {"ema": 0.9, "kl_schedule": "cosine"}],
    ids=["adaptive", "ema"],
)
@pytest.mark.parametrize("iteration", [1, 3])
def test_resumed_run_is_the_same_run(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ppo: Any, iteration: int
) -> None:
    settings = {"ppo": ppo, "train": {"schedule": "linear", "warmup_ratio": 0.25}}
    finetune("run", write_ppo_recipe(tmp_path / "straight", tiny_bases["rope"], **settings))
    recipe = write_ppo_recipe(tmp_path / "stopped", tiny_bases["rope"], **settings)
    run = tmp_path / "stopped" / "run"
    with monkeypatch.context() as patch:
        interrupt_in(patch, iteration)
        output = finetune("run", recipe, expect=130)
    assert f"step-{iteration}" in output
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    assert (run / "report.html").is_file()
    finetune("run", recipe, "--resume")
    assert_same_run(tmp_path / "straight" / "run", run)


def test_a_run_goes_on_with_what_it_began_with(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other prompts, or another adapter in the place of the one that is the reference, are another run."""
    finetune("run", write_ppo_recipe(tmp_path / "first", tiny_bases["rope"]))
    adapter = tmp_path / "first" / "run" / "adapter"
    recipe = write_ppo_recipe(tmp_path / "second", tiny_bases["rope"])
    with monkeypatch.context() as patch:
        interrupt_in(patch, 3)
        finetune("run", recipe, f"model.adapter={adapter}", expect=130)
    resume = ("run", recipe, f"model.adapter={adapter}", "--resume")
    for path in (adapter / "adapter_model.safetensors", tmp_path / "second" / "prompts.jsonl"):
        whole = path.read_bytes()
        if path.suffix == ".jsonl":
            path.write_bytes(whole.replace("头痛".encode(), "牙痛".encode()))
        else:
            save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
        output = finetune(*resume, expect=2)
        named = "the prompts" if path.suffix == ".jsonl" else f"model.adapter {adapter}"
        assert f"cannot be gone on from, since {named} changed" in output
        path.write_bytes(whole)
    finetune(*resume)


def test_more_samples_when_resumed(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has an answer of before and one of after, whatever was shown when the run began."""
    finetune("run", write_ppo_recipe(tmp_path / "straight", tiny_bases["rope"], report={"samples": 3}))
    recipe = write_ppo_recipe(tmp_path / "stopped", tiny_bases["rope"])
    with monkeypatch.context() as patch:
        interrupt_in(patch, 3)
        finetune("run", recipe, expect=130)
    finetune("run", recipe, "--resume", "report.samples=3")
    assert_same_run(tmp_path / "straight" / "run", tmp_path / "stopped" / "run")


def test_killed_run_goes_on_from_its_last_checkpoint(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """What was logged after the checkpoint is done again, and stands once."""
    finetune("run", write_ppo_recipe(tmp_path / "straight", tiny_bases["alibi"]))
    recipe = write_ppo_recipe(tmp_path / "killed", tiny_bases["alibi"])
    finetune("run", recipe)
    run = tmp_path / "killed" / "run"
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')
    with (run / "rollouts.jsonl").open("ab") as torn:  # within an object, and within a character
        torn.write(b'{"step": 4, "parts": {"digits": 0.5}' + "头".encode()[:2])
    finetune("run", recipe, "--resume")
    assert_same_run(tmp_path / "straight" / "run", run)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/reward")] == [1, 2, 3, 4]


def test_resuming_with_other_settings_or_a_damaged_checkpoint(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_ppo_recipe(tmp_path, tiny_bases["rope"])
    finetune("run", recipe)
    run = tmp_path / "run"
    (run / "result.json").unlink()
    assert "ppo.clip: was 0.1, now 0.3" in finetune("run", recipe, "--resume", "ppo.clip=0.3", expect=2)
    checkpoint = run / "checkpoints" / "step-4" / "optimizer.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    output = finetune("run", recipe, "--resume", expect=2)
    assert "optimizer.pt" in output
    assert "step-2" in output


# --- recipe and prompts -----------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_used(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": "你好" * 60},
        {"prompt": ""},
        {"messages": [{"role": "assistant", "content": "我先说"}]},
        {"answer": "没有问题"},
        {"prompt": "你好"},
    ]
    recipe = write_ppo_recipe(tmp_path, tiny_bases["rope"])
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    output = finetune("run", recipe, expect=2)
    assert "4 of 5 data rows cannot be used" in output
    assert "prompts.jsonl:1: the prompt has" in output
    assert "ppo.max_new_tokens 10 leaves 54" in output
    assert not (tmp_path / "run").exists()
    output = finetune("check", recipe, "data.on_bad_rows=skip")
    assert "1 prompt in 5 rows" in output
    assert "reward: digits: tiny_ppo:digits" in output
    assert "predicted peak memory" in output
    output = finetune("check", recipe, "data.on_bad_rows=skip", "--device", "24GiB")
    assert "fits 24GiB (24.0 GiB)" in output


def test_settings_that_do_not_go_together(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_ppo_recipe(tmp_path, tiny_bases["rope"])
    for override, message in (
        ("train.epochs=3", "train.epochs: has no effect in stage ppo"),
        ("train.log_every=3", "train.log_every: has no effect in stage ppo"),
        ("report.max_new_tokens=3", "report.max_new_tokens: has no effect in stage ppo"),
        ("data.format=alpaca", "data.format: prompts are recognised by their columns"),
        ("data.train=[{path: prompts.jsonl, weight: 2}]", "leave out every weight"),
        ("adapter.dropout=0.1", "adapter.dropout: makes the ratio"),
        ("adapter.method=ptuning", "adapter.method"),
        ("model.dtype=float16", "model.dtype: float16 loses"),
        ("ppo.max_new_tokens=64", "leaves no room for a prompt"),
        ("ppo.minibatch_size=7", "ppo.minibatch_size: is more than the 6"),
        ("ppo.critic_warmup=4", "leaves the actor none"),
        ("ppo.kl_schedule=square", "ppo.kl_schedule"),
        ("ppo.rewards=x:y", "did you mean ppo.reward?"),
    ):
        assert message in finetune("check", recipe, override, expect=2), override


# --- several processes ------------------------------------------------------------------------------------------


def test_two_processes(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """They sample apart and learn together: five responses, so that one has more than the other."""
    settings = {"ppo": {"batch_size": 5, "reward": "rlhf.ppo.reward_functions:numeral_share"}}
    recipe = write_ppo_recipe(tmp_path, tiny_bases["rope"], **settings)
    process = start("run", recipe, "--processes", "2")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    run = tmp_path / "run"
    assert len(ppo_metrics(run)) == 4
    state = json.loads((run / "checkpoints" / "step-4" / "trainer_state.json").read_text())
    assert state["processes"] == 2
    assert {path.name for path in (run / "checkpoints" / "step-4").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    (run / "result.json").unlink()
    assert "written by 2 processes" in finetune("run", recipe, "--resume", expect=2)
    straight = tmp_path / "straight"
    shutil.copytree(run, straight)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-4")
    process = start("run", recipe, "--processes", "2", "--resume")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert_same_run(straight, run)  # each with its own random numbers


# --- learning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_learns_on_the_nano(tmp_path: Path) -> None:
    """Paid for numerals it writes numerals, near its reference; held ten times closer, it learns less."""
    recipe = [str(ROOT / "recipes" / "ppo_helpful.yaml"), "model.base=baichuan2-nano"]
    finetune("run", *recipe, f"output_dir={tmp_path / 'free'}")
    finetune("run", *recipe, f"output_dir={tmp_path / 'held'}", "ppo.kl_start=5", "ppo.kl_end=4")
    free, held = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("free", "held"))
    gain = free["reward_last"] - free["reward_first"]
    assert gain > 2 * free["reward_std_first"]
    assert free["kl_last"] < 15
    assert held["reward_last"] - held["reward_first"] < gain
    assert held["kl_last"] < free["kl_last"]
