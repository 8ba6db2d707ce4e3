"""PPO runs whose rewards, numbers or KL go wrong: told in one message, nothing learned, the state kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_ppo
from safetensors.torch import load_file
from test_ppo import assert_same_run
from tiny_ppo import ppo_metrics, write_ppo_recipe
from tiny_run import finetune


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("tiny_ppo:raises", "raised ZeroDivisionError: no good (tiny_ppo.py:"),
        ("tiny_ppo:fails_when_read", "raised ZeroDivisionError: no good (tiny_ppo.py:"),
        ("tiny_ppo:nan", "expected finite numbers, found nan for the response"),
        ("tiny_ppo:one_too_few", "expected 2 numbers, one for each response, found 1"),
        ("tiny_ppo:words", "expected a list of numbers"),
        ("tiny_ppo:digit", "did you mean tiny_ppo:digits?"),
        ("no_such_module:reward", "cannot be imported"),
        ("tiny_ppo:PROMPTS", "is no function"),
        ("runs/nowhere/adapter", "no such folder"),
    ],
)
def test_rewards_that_cannot_be_used(
    tiny_bases: dict[str, Path], tmp_path: Path, reward: str, message: str
) -> None:
    output = finetune("run", write_ppo_recipe(tmp_path, tiny_bases["rope"]), f"ppo.reward={reward}", expect=2)
    assert message in output
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_in_the_middle_costs_nothing(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    straight = {"ppo": {"reward": [{"path": "tiny_ppo:digits", "name": "judge"}]}}
    finetune("run", write_ppo_recipe(tmp_path / "straight", tiny_bases["rope"], **straight))
    reward = [{"path": "tiny_ppo:raises_later", "name": "judge"}]
    settings = {"ppo": {"reward": reward}, "train": {"save_every": 50}}
    recipe = write_ppo_recipe(tmp_path / "failed", tiny_bases["rope"], **settings)
    run = tmp_path / "failed" / "run"
    tiny_ppo.raises_later.calls = 0  # type: ignore[attr-defined]
    output = finetune("run", recipe, expect=2)
    assert "raised ConnectionError: the judge has left" in output
    assert "step-2" in output
    tiny_ppo.raises_later.calls = -100  # type: ignore[attr-defined]
    finetune("run", recipe, "--resume")
    assert_same_run(tmp_path / "straight" / "run", run)


def test_numbers_that_explode_stop_the_run_and_are_not_learned(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"ppo": {"reward": "tiny_ppo:infinite_later", "whiten_advantages": False}}
    recipe = write_ppo_recipe(tmp_path, tiny_bases["rope"], **settings)
    tiny_ppo.infinite_later.calls = 0  # type: ignore[attr-defined]
    output = finetune("run", recipe, expect=2)
    assert "training stopped in iteration 3" in output
    assert "is not a finite number" in output
    assert "step-2" in output
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "trainable.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_equal_rewards_are_warned_about(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_ppo_recipe(
        tmp_path, tiny_bases["rope"], ppo={"reward": "tiny_ppo:always_one", "iterations": 11}
    )
    assert "all rewards of the last 10 iterations are equal" in finetune("run", recipe)
    assert "all rewards of the last 10" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_several_rewards_are_joined(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    parts = [{"path": "tiny_ppo:digits", "weight": 2.0}, {"path": "tiny_ppo:always_one", "name": "constant"}]
    finetune("run", write_ppo_recipe(tmp_path, tiny_bases["rope"], ppo={"reward": parts}))
    for line in ppo_metrics(tmp_path / "run"):
        assert line["reward/constant"] == 1
        assert line["reward"] == pytest.approx(2 * line["reward/digits"] + 1, abs=1e-5)


def test_numbers_that_explode_between_two_steps_of_an_update(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are half an iteration ahead are no state to go on from: what remains is the last whole one."""
    from rlhf.ppo.errors import NotFinite
    from rlhf.ppo.trainer import PPOTrainer

    finetune("run", write_ppo_recipe(tmp_path / "straight", tiny_bases["rope"]))
    recipe = write_ppo_recipe(tmp_path / "failed", tiny_bases["rope"])
    run, update = tmp_path / "failed" / "run", PPOTrainer._update

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.iteration + 1 == 4 and self.changed:
            raise NotFinite("gradient of the actor is not a finite number")
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "_update", failing)
        output = finetune("run", recipe, expect=2)
    assert f"the last state before it is in {run / 'checkpoints' / 'step-2'}" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    finetune("run", recipe, "--resume")
    assert_same_run(tmp_path / "straight" / "run", run)


def test_a_kl_that_explodes_stops_the_run(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Before anything is learned from it, its state saved; with a higher limit it goes on as if nothing had been."""
    finetune("run", write_ppo_recipe(tmp_path / "straight", tiny_bases["rope"]))
    lines = ppo_metrics(tmp_path / "straight" / "run")
    first = next(line["step"] for line in lines if line["kl"] > 1e-3 * line["response_length"])
    settings = {"ppo": {"kl_limit": 1e-3}, "train": {"save_every": 50}}
    recipe = write_ppo_recipe(tmp_path / "stopped", tiny_bases["rope"], **settings)
    run = tmp_path / "stopped" / "run"
    output = finetune("run", recipe, expect=2)
    assert f"training stopped in iteration {first}: the KL to the reference is" in output
    assert "above ppo.kl_limit 0.001" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{first - 1}"]
    assert "training stopped" in finetune("run", recipe, "--resume", expect=2)
    finetune("run", recipe, "--resume", "ppo.kl_limit=1000")
    assert_same_run(tmp_path / "straight" / "run", run)


def test_a_reward_that_spoils_its_arguments_spoils_nothing_else(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("digits", "spoils_its_arguments"):
        reward = [{"path": f"tiny_ppo:{name}", "name": "judge"}]
        finetune("run", write_ppo_recipe(tmp_path / name, tiny_bases["rope"], ppo={"reward": reward}))
    assert_same_run(tmp_path / "digits" / "run", tmp_path / "spoils_its_arguments" / "run")


def test_equal_rewards_are_told(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    settings = {"ppo": {"reward": "tiny_ppo:thirds", "iterations": 10, "epochs": 1, "max_new_tokens": 4}}
    output = finetune("run", write_ppo_recipe(tmp_path, tiny_bases["rope"], **settings))
    assert "all rewards of the last 10 iterations are equal" in output
    assert all(line["reward_std"] < 1e-6 for line in ppo_metrics(tmp_path / "run"))
