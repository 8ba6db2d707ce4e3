"""PPO on one base, top to bottom: sample, judge, learn; as in InstructGPT and the Baichuan 2 report.

What follows was settled by others, and is named where it happens: the KL penalty as a reward of each token and
the adaptive coefficient (Ziegler et al. 2019), GAE and the clipped losses (Schulman et al. 2016 and 2017), the
value loss clipped alike, whitened advantages and Adam's epsilon of 1e-5 (OpenAI's baselines), the critic begun
from the reward model (Ouyang et al. 2022), the critic's warm-up alone and the constants (Baichuan 2 report).
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from finetune.baichuan.cpu_matmul import fast_matmul
from rlhf.ppo import functional
from rlhf.ppo.build import ACTOR, CRITIC, REFERENCE
from rlhf.ppo.engines import TransformersEngine, sampling_of
from rlhf.ppo.errors import KLExploded, NotFinite
from rlhf.ppo.experience import Experience, describe
from rlhf.ppo.optimisation import make_optimizer, make_scheduler
from rlhf.ppo.processes import Processes
from rlhf.ppo.prompts import Prompt, iteration_prompts
from rlhf.ppo.randomness import random_state
from rlhf.ppo.rewards import Answered, Rewards
from rlhf.ppo.rollout import Rollout, batches_by_length, policy, select, values

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlhf.ppo.engines import Engine
    from rlhf.ppo.models import ScalarHead, SharedBase
    from rlhf.ppo.recipe import PPORecipe

P = ParamSpec("P")
T = TypeVar("T")


def _with_fast_matmul(
    method: Callable[Concatenate[PPOTrainer, P], T],
) -> Callable[Concatenate[PPOTrainer, P], T]:
    """Scoring and learning multiply alike, or the first ratio of a policy to itself would not be 1."""

    @functools.wraps(method)
    def within(self: PPOTrainer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with fast_matmul(self.models.lm.config.hidden_size, self.models.device):
            return method(self, *args, **kwargs)

    return within


class PPOTrainer:
    """The algorithm, and the state that it advances: two adapters, a head, two optimisers, a coefficient.

    Attributes:
        iteration: rollouts learned from so far.
        kl_coef: coefficient of the KL penalty in the next iteration.
        tokens: response tokens sampled so far, over all processes.
        inputs: digests of what the run stands on, see `rlhf.ppo.inputs`; filled by who saves checkpoints.
        average: moving average of the actor's parameters, by name; empty without `ppo.ema`.
        random_state: within an iteration, that of its beginning: where one that fails is begun again.
        changed: whether this iteration has changed weights, so that it cannot be begun again.
    """

    def __init__(
        self,
        recipe: PPORecipe,
        models: SharedBase,
        head: ScalarHead,
        rewards: Rewards,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        accelerator: Accelerator,
        engine: Engine | None = None,
    ) -> None:
        self.recipe, self.models, self.head, self.rewards = recipe, models, head, rewards
        self.tokenizer, self.prompts, self.accelerator = tokenizer, prompts, accelerator
        self.processes = Processes(accelerator)
        self.reference = REFERENCE if models.has(REFERENCE) else None  # None: the bare base
        self.engine = engine or TransformersEngine(
            models,
            sampling_of(recipe),
            eos_token_id=tokenizer.eos_token_id,
            batch_size=recipe.ppo.rollout_batch_size,
        )
        actor = dict(models.named_parameters(ACTOR))
        critic = {**dict(models.named_parameters(CRITIC)), **dict(head.named_parameters())}
        self.parameters = {ACTOR: actor, CRITIC: critic}
        rate = recipe.train.learning_rate
        rates = {ACTOR: rate, CRITIC: recipe.ppo.critic_learning_rate or rate}
        self.optimizers = {
            name: make_optimizer(recipe, list(p.values()), rates[name]) for name, p in self.parameters.items()
        }
        self.schedulers = {name: make_scheduler(recipe, each) for name, each in self.optimizers.items()}
        self.average = {key: p.detach().clone() for key, p in actor.items()} if recipe.ppo.ema else {}
        self.inputs: dict[str, str] = {}
        self.iteration = 0
        self.tokens = 0
        self.kl_coef = recipe.ppo.kl_start
        self.random_state: dict[str, Any] | None = None
        self.changed = False

    @property
    def actor_learns(self) -> bool:
        """Whether the critic's warm-up, alone, is over."""
        return self.iteration >= self.recipe.ppo.critic_warmup

    # ---- an iteration ----

    def step(self) -> tuple[dict[str, float], Experience]:
        """One iteration: a rollout, its judgement, and the update.

        Returns:
            What happened, over all processes, and the experience of this one.

        Raises:
            RewardError, KLExploded: before anything was changed.
            NotFinite: before the optimiser step that would have spoiled the weights.
        """
        self.random_state = random_state()
        start = time.monotonic()
        prompts = self.next_prompts()
        with self.processes.all_or_none():
            rollout = self.answer(prompts)
        sampled = time.monotonic()
        experience = self.judge(prompts, rollout)
        judged = time.monotonic()
        responses = self.recipe.ppo.batch_size
        metrics = describe(experience, responses, self.processes.sum)
        self._require_near_reference(metrics["kl"] / metrics["response_length"])
        metrics |= {"kl_coef": self.kl_coef, "clip_fraction": 0.0, **self.learn(experience)}
        metrics |= self.rewards.learn(
            experience.raw, responses, self.processes.sum, actor_learns=self.actor_learns
        )
        metrics |= {
            "rollout_seconds": sampled - start,
            "scoring_seconds": judged - sampled,
            "update_seconds": time.monotonic() - judged,
        }
        self._advance(metrics)
        self.random_state, self.changed = None, False
        return metrics, experience

    def next_prompts(self) -> list[Prompt]:
        """This iteration's prompts; of several processes each answers its share."""
        chosen = iteration_prompts(
            self.prompts,
            self.iteration,
            batch_size=self.recipe.ppo.batch_size,
            seed=self.recipe.seed,
            shares=self.recipe.ppo.prompt_shares,
        )
        return chosen[self.processes.rank :: self.processes.count]

    def answer(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Rollout:
        """Responses of the actor as it is.

        Raises:
            NotFinite: its probabilities are none.
        """
        try:
            with self.accelerator.autocast():
                return self.engine.sample([prompt.ids for prompt in prompts], greedy=greedy)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise NotFinite(
                f"training stopped in iteration {self.iteration + 1}: the actor's probabilities are not finite"
            ) from error

    @torch.no_grad()
    @_with_fast_matmul
    def judge(self, prompts: Sequence[Prompt], rollout: Rollout) -> Experience:
        """Scores, log-probabilities and values, each model once over all rows; then rewards and advantages."""
        ppo, mask = self.recipe.ppo, rollout.mask
        responses = [rollout.response_ids(row) for row in range(len(prompts))]
        answered = [self.as_answered(prompt, ids) for prompt, ids in zip(prompts, responses)]
        with self.processes.all_or_none(), self.accelerator.autocast():
            scores, raw = self.rewards(answered)
        scores = scores.to(mask.device)

        logprobs, ref_logprobs, old_values, entropy = (
            torch.zeros(mask.shape, device=mask.device) for _ in range(4)
        )
        self.models.lm.train()  # the training path, whatever that changes; there is no dropout
        for index in batches_by_length(rollout, self.recipe.train.batch_size):
            rows = select(rollout, index)
            with self.accelerator.autocast():
                logprobs[rows.index], entropy[rows.index] = policy(
                    self.models, ACTOR, rows, temperature=ppo.temperature
                )
                ref_logprobs[rows.index], _ = policy(
                    self.models, self.reference, rows, temperature=ppo.temperature
                )
                old_values[rows.index] = values(self.models, CRITIC, self.head, rows)

        prepared = functional.prepare_scores(
            scores, rollout.ended, clip=ppo.score_clip, missing_eos_penalty=ppo.missing_eos_penalty
        )
        rewards = functional.shape_rewards(
            prepared, logprobs, ref_logprobs, mask, kl_coef=self.kl_coef, kl_estimator=ppo.kl_estimator
        )
        if ppo.whiten_rewards:
            rewards = functional.whiten(rewards, mask, shift_mean=False, reduce=self.processes.sum)
        advantages, returns = functional.gae(rewards, old_values, mask, gamma=ppo.gamma, lam=ppo.lam)
        if ppo.whiten_advantages:  # over the whole rollout: over each minibatch, it would depend on the split
            advantages = functional.whiten(advantages, mask, reduce=self.processes.sum)
        return Experience(
            rollout,
            [each.messages for each in answered],
            scores,
            raw,
            logprobs,
            ref_logprobs,
            old_values,
            entropy,
            advantages,
            returns,
        )

    def as_answered(self, prompt: Prompt, response: Sequence[int]) -> Answered:
        """A response as rewards see it."""
        text = self.tokenizer.decode(response, skip_special_tokens=True)
        messages = [*prompt.messages, {"role": "assistant", "content": text}]
        return Answered(messages, [*prompt.ids, *response, self.tokenizer.eos_token_id])

    @_with_fast_matmul
    def learn(self, experience: Experience) -> dict[str, float]:
        """Epochs of minibatches over the experience; the critic alone in its warm-up."""
        ppo = self.recipe.ppo
        total: dict[str, float] = {}
        updates = 0
        for minibatch in self.processes.minibatches(
            ppo.batch_size, ppo.minibatch_size, ppo.epochs, seed=f"{self.recipe.seed}:{self.iteration}"
        ):
            stats = self._update(experience, minibatch, train_actor=self.actor_learns)
            if stats is None:  # the policy has moved far enough
                break
            updates += 1
            for name, value in stats.items():
                total[name] = total.get(name, 0.0) + value
        rates = {"learning_rate": self.optimizers[ACTOR].param_groups[0]["lr"]}
        return {
            **{name: value / max(updates, 1) for name, value in total.items()},
            "updates": updates,
            **rates,
        }

    def _update(
        self, experience: Experience, minibatch: torch.Tensor, *, train_actor: bool
    ) -> dict[str, float] | None:
        """One optimiser step of critic and actor; None if the early stop on KL came before it."""
        found = self._accumulate(experience, minibatch, train_actor=train_actor)
        bound = self.recipe.ppo.early_stop_kl
        too_far = bound is not None and found.get("approx_kl", 0.0) > bound
        if not too_far:
            trained = (ACTOR, CRITIC) if train_actor else (CRITIC,)
            norms = {name: self._summed_gradient_norm(name) for name in trained}
            self._require_finite(
                {**found, **{f"gradient of the {name}": norm for name, norm in norms.items()}}
            )
            self.changed = True
            for name in trained:
                self.optimizers[name].step()
                found["grad_norm" if name == ACTOR else "critic_grad_norm"] = norms[name]
            if train_actor:
                self._average()
                self.engine.actor_changed()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return None if too_far else found

    def _accumulate(
        self, experience: Experience, minibatch: torch.Tensor, *, train_actor: bool
    ) -> dict[str, float]:
        """Gradients of both losses over a minibatch, a micro-batch at a time; returns the global statistics.

        The losses are divided by the counted tokens of the whole minibatch, so that micro-batches and processes
        add up to it. No DDP: adapters are small, and their gradients are summed by hand, once.
        """
        ppo, rollout = self.recipe.ppo, experience.rollout
        count = self.processes.sum(rollout.mask[minibatch].sum().float())
        sums: dict[str, torch.Tensor] = {}
        for chosen in minibatch.split(self.recipe.train.batch_size) if len(minibatch) else ():
            rows = select(rollout, chosen)
            index, mask = rows.index, rows.mask
            with self.accelerator.autocast():
                predicted = values(self.models, CRITIC, self.head, rows)
            old_values, returns = experience.values[index], experience.returns[index]
            loss, stats = functional.value_loss(
                predicted, old_values, returns, mask, clip=ppo.value_clip, count=count
            )
            loss.backward()
            stats["value_loss"] = loss.detach()
            if train_actor:
                with self.accelerator.autocast():
                    logprobs, _ = policy(self.models, ACTOR, rows, temperature=ppo.temperature)
                old_logprobs, advantages = experience.logprobs[index], experience.advantages[index]
                loss, policy_stats = functional.policy_loss(
                    logprobs, old_logprobs, advantages, mask, clip=ppo.clip, count=count
                )
                loss.backward()
                stats |= {"policy_loss": loss.detach(), **policy_stats}
            for name, value in stats.items():
                sums[name] = sums.get(name, torch.zeros_like(count)) + value
        # All processes sum the same numbers, also one that had no rows.
        names = [*_VALUE_STATS, *(_POLICY_STATS if train_actor else ())]
        summed = self.processes.sum(torch.stack([sums.get(name, torch.zeros_like(count)) for name in names]))
        return dict(zip(names, summed.tolist()))

    def _summed_gradient_norm(self, name: str) -> float:
        """Sum a model's gradients over processes and clip them; returns the norm before clipping."""
        parameters = list(self.parameters[name].values())
        for parameter in parameters:
            if parameter.grad is None:  # no row of the minibatch was this process's
                parameter.grad = torch.zeros_like(parameter)
        if self.processes.count > 1:
            flat = self.processes.sum(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
                parameter.grad = part.view_as(parameter)
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.max_grad_norm))

    def _require_near_reference(self, kl: float) -> None:
        limit = self.recipe.ppo.kl_limit
        where = f"training stopped in iteration {self.iteration + 1}"
        if not math.isfinite(kl):
            raise NotFinite(f"{where}: the KL to the reference is not a finite number", hint=_SMALLER_STEPS)
        if limit is not None and kl > limit:
            raise KLExploded(
                f"{where}: the KL to the reference is {kl:.3g} nats a token, above ppo.kl_limit {limit:g}",
                hint="raise ppo.kl_start and ppo.kl_end or lower train.learning_rate, and begin again with "
                "--overwrite; or go on all the same with --resume and a higher ppo.kl_limit",
            )

    def _require_finite(self, numbers: dict[str, float]) -> None:
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            raise NotFinite(
                f"training stopped in iteration {self.iteration + 1}: {', '.join(bad)} is not a finite number",
                hint=_SMALLER_STEPS,
            )

    @torch.no_grad()
    def _average(self) -> None:
        for key, average in self.average.items():
            average.lerp_(self.parameters[ACTOR][key], 1 - self.recipe.ppo.ema)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the moving average, if there is one, in the actor's place: the result, no state to train on."""
        for key, average in self.average.items():
            self.parameters[ACTOR][key].copy_(average)
        self.engine.actor_changed()

    def _advance(self, metrics: dict[str, float]) -> None:
        """Everything that has a course moves on by an iteration."""
        ppo = self.recipe.ppo
        self.iteration += 1
        self.tokens += round(metrics["response_length"] * ppo.batch_size)
        with warnings.catch_warnings():  # torch misses the actor's steps in the critic's warm-up
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for scheduler in self.schedulers.values():
                scheduler.step()
        if ppo.kl_schedule == "adaptive":
            self.kl_coef = functional.adapt_kl_coefficient(
                self.kl_coef,
                metrics["kl"],
                target=ppo.kl_target,
                responses=ppo.batch_size,
                horizon=ppo.kl_horizon,
            )
        else:
            self.kl_coef = functional.kl_coefficient(
                self.iteration,
                ppo.iterations - 1,
                start=ppo.kl_start,
                end=ppo.kl_end,
                schedule=ppo.kl_schedule,
            )


_SMALLER_STEPS = (
    "lower train.learning_rate or ppo.critic_learning_rate, or set ppo.score_clip, and begin again "
    "with --overwrite"
)
_VALUE_STATS = ("value_loss", "value_clip_fraction")
_POLICY_STATS = ("policy_loss", "clip_fraction", "approx_kl", "ratio")
