"""PPO paid by helpful and harmless under a learned price, on prompts in a set ratio; interrupted, and not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_model import write_rows
from tiny_ppo import ppo_metrics, write_ppo_recipe
from tiny_run import finetune, write_recipe


def write_joined(folder: Path, base: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    attacks = write_rows(folder / "attacks.jsonl", [{"prompt": f"坏问题{n}？"} for n in range(3)])
    return write_ppo_recipe(
        folder,
        base,
        data={"train": [str(attacks), str(folder / "prompts.jsonl")]},
        ppo={
            "reward": [
                {"name": "helpful", "path": "tiny_ppo:always_one"},
                {"name": "harmless", "path": "tiny_ppo:digits", "mean": 0.5},
            ],
            "prompt_shares": [0.5, 0.5],
        },
        join={"method": "lagrangian", "multiplier_rate": 0.5},
    )


def test_the_price_of_harm_goes_on_where_it_stopped(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.ppo.trainer import PPOTrainer

    base, original = tiny_bases["rope"], PPOTrainer.learn
    finetune("run", write_joined(tmp_path / "straight", base))
    recipe = write_joined(tmp_path / "stopped", base)

    def learn(self: Any, experience: Any) -> Any:
        if self.iteration + 1 == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, experience)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "learn", learn)
        finetune("run", recipe, expect=130)
    finetune("run", recipe, "--resume")

    straight, stopped = tmp_path / "straight" / "run", tmp_path / "stopped" / "run"
    assert ppo_metrics(stopped) == ppo_metrics(straight)
    prices = [line["multiplier"] for line in ppo_metrics(straight)]
    assert prices[:2] == [1.0, 1.0], "while the critic warms up alone, nobody could answer another price"
    assert len(set(prices)) == 3
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, stopped))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_source_without_prompts_of_its_own_is_named(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_joined(tmp_path, tiny_bases["rope"])
    write_rows(tmp_path / "attacks.jsonl", [{"prompt": "坏问题？"}])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "坏问题？"}])
    assert "no prompts are left of" in finetune("run", recipe, expect=2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "lagrangian: the harmless score is to be 0 or more on average (join.cost_limit 0)"),
        (["join.cost_limit=-0.8", "join.multiplier=4"], "is to be 0.8 or more on average"),
        (["join.method=gate", "join.threshold=0.25"], "gate: responses whose harmless score is 0.25 or more"),
        (["join.method=weighted"], "join: weighted sum"),
    ],
)
def test_check_says_what_responses_are_held_to(
    tiny_bases: dict[str, Path], tmp_path: Path, overrides: list[str], said: str
) -> None:
    assert said in finetune("check", write_joined(tmp_path, tiny_bases["rope"]), *overrides)


def test_check_says_it_of_a_step_whose_inputs_are_not_there_yet(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    first = Path(write_recipe(tmp_path / "first", tiny_bases["rope"]))
    second = Path(write_joined(tmp_path / "second", tiny_bases["rope"]))
    settings = {
        **yaml.safe_load(second.read_text()),
        "name": "second",
        "join": {"method": "gate", "threshold": 0.25},
    }
    settings["model"]["adapter"] = str(tmp_path / "first" / "run" / "adapter")
    second.write_text(yaml.safe_dump(settings, allow_unicode=True))
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"pipeline": [str(first), str(second)]}))
    output = finetune("check", tmp_path / "both.yaml")
    assert "is not there yet, so only the recipe was checked" in output
    assert "join: gate: responses whose harmless score is 0.25 or more" in output


def test_check_says_nothing_of_joining_a_single_reward(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    assert "join:" not in finetune("check", write_ppo_recipe(tmp_path, tiny_bases["rope"]))
