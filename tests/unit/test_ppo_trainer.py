"""Each detail of an iteration, on given responses: what is learned from, who learns, and what moves on after."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_ppo import write_ppo_recipe

from finetune.baichuan import cpu_matmul
from finetune.baichuan.load import load_tokenizer, resolve_base
from finetune.recipe import load_recipe
from rlhf.ppo.build import ACTOR, CRITIC, build_models
from rlhf.ppo.experience import Experience
from rlhf.ppo.functional import adapt_kl_coefficient, last_counted
from rlhf.ppo.rewards import Part, Rewards
from rlhf.ppo.rollout import as_rollout
from rlhf.ppo.trainer import PPOTrainer

EOS = 2
pytestmark = pytest.mark.filterwarnings("ignore:Seems like .optimizer.step")  # tests look in on it
PROMPTS = [[195, 1400 + row, 196] for row in range(5)]
RESPONSES = [[1600, 1601, EOS], [EOS], [1650, 1651, 1652, 1653], [1500, EOS], [1700, 1701, 1702]]
SCORES = [0.5, -3.0, 2.5, 1.0, -0.25]
ENDED = [True, True, False, True, False]


def make_trainer(base_folder: Path, folder: Path, **ppo: Any) -> PPOTrainer:
    """Five responses with known scores, in one minibatch, in place of sampled ones."""
    settings = {
        "batch_size": 5,
        "minibatch_size": 5,
        "epochs": 1,
        "critic_warmup": 0,
        "value_clip": None,
        **ppo,
    }
    path = write_ppo_recipe(folder, base_folder, ppo=settings)
    recipe: Any = load_recipe(path, ["train.schedule=constant"])
    base = resolve_base(str(base_folder))
    tokenizer = load_tokenizer(base.folder)
    models, head, _ = build_models(recipe, base, tokenizer, batch_size=2)
    prompts: Any = [SimpleNamespace(ids=ids, messages=[]) for ids in PROMPTS]
    rewards = Rewards([Part("judge", "x:judge", lambda answered: SCORES)])
    trainer = PPOTrainer(recipe, models, head, rewards, tokenizer, prompts, Accelerator(cpu=True))
    rollout = as_rollout(PROMPTS, RESPONSES, eos_token_id=EOS, device=torch.device("cpu"))
    trainer.answer = lambda *_, **__: rollout  # type: ignore[method-assign]
    trainer.next_prompts = lambda: prompts  # type: ignore[method-assign]
    return trainer


def leave_the_reference(trainer: PPOTrainer) -> None:
    """An actor that differs from the base."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.parameters[ACTOR].values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def judged(trainer: PPOTrainer) -> Experience:
    prompts = trainer.next_prompts()
    return trainer.judge(prompts, trainer.answer(prompts))


def weights(trainer: PPOTrainer, name: str) -> dict[str, torch.Tensor]:
    return {key: parameter.detach().clone() for key, parameter in trainer.parameters[name].items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_scoring_and_learning_multiply_by_the_faster_library(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both: of a policy to itself the ratio is exactly 1 only by the same library."""
    seen: dict[str, list[str]] = {"judge": [], "learn": []}
    trainer = make_trainer(tiny_bases["rope"], tmp_path)
    monkeypatch.setattr(cpu_matmul, "onednn_is_better", lambda: True)
    monkeypatch.setattr(cpu_matmul, "MIN_HIDDEN_SIZE", 1)
    settings, now = torch.backends.mkldnn.matmul, "judge"

    def look(*_: Any) -> None:
        seen[now].append(settings.fp32_precision)

    trainer.models.lm.model.register_forward_hook(look)
    experience = judged(trainer)
    now = "learn"
    trainer.learn(experience)
    assert set(seen["judge"]) == set(seen["learn"]) == {"bf16"}
    assert settings.fp32_precision == "none"


@pytest.mark.parametrize("clip", [None, 1.5])
def test_what_a_response_is_worth(tiny_bases: dict[str, Path], tmp_path: Path, clip: float | None) -> None:
    """The return at the last token is the score, bounded, less the penalty where there is no EOS; the return at the
    first, with nothing discounted, is that less the price of the whole response's KL."""
    trainer = make_trainer(
        tiny_bases["rope"],
        tmp_path,
        **{"kl_start": 0.3, "kl_end": 0.3, "missing_eos_penalty": 0.75, "score_clip": clip, "lam": 1.0},
    )
    leave_the_reference(trainer)
    experience = judged(trainer)
    mask = experience.rollout.mask
    bounded = [score if clip is None else max(-clip, min(clip, score)) for score in SCORES]
    worth = torch.tensor([score - 0.75 * (not ended) for score, ended in zip(bounded, ENDED)])
    price = 0.3 * (experience.logprobs - experience.ref_logprobs)
    assert experience.kl.abs().min() > 0.01
    torch.testing.assert_close(experience.returns[last_counted(mask)], worth - price[last_counted(mask)])
    torch.testing.assert_close(experience.returns[:, 0], worth - 0.3 * experience.kl, rtol=1e-4, atol=1e-5)
    counted = experience.advantages[mask]
    assert counted.mean().item() == pytest.approx(0, abs=1e-6)
    assert counted.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_the_critic_warms_up_alone(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_bases["rope"], tmp_path, critic_warmup=1)
    actor, critic = weights(trainer, ACTOR), weights(trainer, CRITIC)
    metrics, _ = trainer.step()
    assert same(actor, weights(trainer, ACTOR))
    assert not same(critic, weights(trainer, CRITIC))
    assert "policy_loss" not in metrics
    metrics, _ = trainer.step()
    assert not same(actor, weights(trainer, ACTOR))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)  # of the only step: before it, nothing had moved


def test_an_update_that_goes_too_far_ends(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Before the step that would have followed; the one that went too far stays."""
    free = make_trainer(tiny_bases["rope"], tmp_path / "free", epochs=2)
    once = make_trainer(tiny_bases["rope"], tmp_path / "once", epochs=1)
    stopped = make_trainer(tiny_bases["rope"], tmp_path / "stopped", epochs=6, early_stop_kl=1e-9)
    assert free.step()[0]["updates"] == 2
    assert once.step()[0]["updates"] == stopped.step()[0]["updates"] == 1
    assert same(weights(once, ACTOR), weights(stopped, ACTOR))
    assert not same(weights(free, ACTOR), weights(stopped, ACTOR))
    assert all(parameter.grad is None for parameter in stopped.parameters[ACTOR].values())


def test_the_moving_average_is_one(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """0.8 of what it was and 0.2 of the actor, after each step; it is the result, and no state to train on."""
    trainer = make_trainer(tiny_bases["rope"], tmp_path, ema=0.8, epochs=3)
    expected, step = weights(trainer, ACTOR), trainer.optimizers[ACTOR].step

    def recorded() -> None:
        step()
        for key, now in weights(trainer, ACTOR).items():
            expected[key] = 0.8 * expected[key] + 0.2 * now

    trainer.optimizers[ACTOR].step = recorded  # type: ignore[method-assign,assignment]
    trainer.step()
    assert not same(weights(trainer, ACTOR), expected)
    for key, average in trainer.average.items():
        torch.testing.assert_close(average, expected[key])
    trainer.use_average()
    assert same(weights(trainer, ACTOR), trainer.average)


def test_the_adaptive_coefficient_follows_the_kl(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    settings = {"kl_schedule": "adaptive", "kl_target": 0.5, "kl_horizon": 50, "kl_start": 0.1}
    trainer = make_trainer(tiny_bases["rope"], tmp_path, **settings)
    assert trainer.step()[0]["kl"] == 0
    assert trainer.kl_coef == pytest.approx(0.1 * (1 - 0.2 * 5 / 50))  # below the target: it falls
    leave_the_reference(trainer)
    before = trainer.kl_coef
    kl = trainer.step()[0]["kl"]
    assert trainer.kl_coef == adapt_kl_coefficient(before, kl, target=0.5, responses=5, horizon=50)
    assert (trainer.kl_coef > before) == (kl > 0.5)


def test_gradients_are_clipped_and_their_norm_told(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The norm that is told is the one before."""
    trainer = make_trainer(tiny_bases["rope"], tmp_path)
    seen: dict[str, float] = {}
    for name in (ACTOR, CRITIC):

        def norm(name: str = name) -> None:
            grads = [p.grad.flatten() for p in trainer.parameters[name].values() if p.grad is not None]
            seen[name] = float(torch.cat(grads).norm())

        trainer.optimizers[name].step = norm  # type: ignore[method-assign,assignment]
    metrics, _ = trainer.step()
    for name, told in ((ACTOR, metrics["grad_norm"]), (CRITIC, metrics["critic_grad_norm"])):
        assert seen[name] == pytest.approx(min(told, 0.5), rel=1e-4)
    assert metrics["critic_grad_norm"] > 0.5
