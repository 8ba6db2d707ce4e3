"""The recipe of stage `ppo`. Imports pydantic and nothing heavier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import yaml
from pydantic import Field

from finetune.recipe.combinations import Problem
from finetune.recipe.schema import Adapter, Data, Section, Train
from finetune.recipe.yaml_text import dump_yaml
from finetune.user_functions import is_function
from rlhf.ppo.reward_sections import JOIN_KEYS, Join, RewardPart, Rewards, named_parts
from rlhf.recipe import RlhfRecipe

UNREAD_TRAIN_KEYS = (
    "epochs",
    "max_steps",
    "eval_batch_size",
    "gradient_accumulation",
    "eval_every",
    "log_every",
    "z_loss_weight",
    "kernels",
    "compile",
)
"""Keys of section train that PPO has no use for: what takes their place is in section ppo."""


class PromptAdapter(Adapter):
    """The actor (where no adapter is gone on from) and the critic."""

    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="always 0: an unchanged policy must have the ratio 1"
    )


class PromptData(Data):
    """Prompts: conversations, whose last answer is left out, preferences, or a column such as prompt."""

    max_length: int = Field(
        default=2048, ge=16, description="tokens of prompt and response; longer prompts are bad rows"
    )
    packing: bool = Field(default=False, description="always false: responses are sampled, not packed")


class PPOTrain(Train):
    """Optimisation and checkpoints; the defaults are those of the Baichuan 2 report."""

    batch_size: int = Field(default=4, ge=1, description="responses on each device at once, in the update")
    learning_rate: float = Field(default=5e-6, gt=0, description="of the actor")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.95], description="AdamW's two decay rates"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(default=0.5, gt=0, description="gradients are scaled down to this norm")
    save_every: int | None = Field(default=25, ge=1, description="iterations between checkpoints")
    kernels: Literal["auto", "none", "liger"] = Field(default="none", description="always none")


class PPO(Section):
    """Rollouts, rewards and the update."""

    reward: Rewards = Field(
        description="adapter folder of stage reward, merged reward model, package.module:function, or a list of "
        "them with weights"
    )
    prompt_shares: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] | None = Field(
        default=None,
        description="share of each source of data.train in the prompts of every iteration; null takes all alike",
    )
    iterations: int = Field(default=350, ge=1, description="rollouts with the update after each")
    batch_size: int = Field(default=64, ge=1, description="responses an iteration, over all processes")
    minibatch_size: int = Field(
        default=16, ge=1, description="responses an optimiser step, over all processes"
    )
    epochs: int = Field(default=1, ge=1, description="passes over the responses of an iteration")
    critic_warmup: int = Field(
        default=20, ge=0, description="first iterations, in which the critic learns alone"
    )
    critic_learning_rate: float | None = Field(
        default=None, gt=0, description="of the critic; null is train.learning_rate"
    )
    critic_from_reward: bool = Field(
        default=True, description="begin the critic as a copy of the first reward adapter, if there is one"
    )

    max_new_tokens: int = Field(default=256, ge=1, description="longest response, its EOS included")
    temperature: float = Field(
        default=1.0, gt=0, description="of sampling, and of the policy that is trained"
    )
    top_k: int = Field(default=0, ge=0, description="sample from so many tokens; 0 is all, as PPO assumes")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from this much probability; 1 is all, as PPO assumes"
    )
    rollout_engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="who samples; vllm is faster and wants memory for a base of its own",
    )
    vllm_memory: float = Field(
        default=0.4, gt=0, lt=1, description="vllm: share of the GPU's memory for its base and cache"
    )
    rollout_batch_size: int = Field(default=16, ge=1, description="responses sampled on each device at once")

    clip: float = Field(default=0.1, gt=0, description="how far the policy's ratio may move from 1")
    value_clip: float | None = Field(
        default=0.2, gt=0, description="how far a value may move in an update; null does not clip"
    )
    gamma: float = Field(default=1.0, ge=0, le=1, description="discount of later rewards")
    lam: float = Field(default=0.95, ge=0, le=1, description="GAE's lambda")
    whiten_advantages: bool = Field(default=True, description="advantages with mean 0 and deviation 1")
    whiten_rewards: bool = Field(
        default=False, description="rewards of all tokens with deviation 1, before advantages are estimated"
    )
    missing_eos_penalty: float = Field(
        default=1.0, ge=0, description="subtracted from the normalised score of a response without an end"
    )
    score_clip: float | None = Field(
        default=None, gt=0, description="bound on the normalised score; null is none"
    )

    kl_estimator: Literal["k1", "k3"] = Field(
        default="k1", description="k1 is log p - log q; k3 has less variance and is never negative"
    )
    kl_schedule: Literal["constant", "linear", "cosine", "exponential", "adaptive"] = Field(
        default="linear", description="course of the KL coefficient; adaptive follows kl_target"
    )
    kl_start: float = Field(default=0.2, ge=0, description="KL coefficient of the first iteration")
    kl_end: float = Field(default=0.005, ge=0, description="KL coefficient of the last iteration")
    kl_target: float = Field(default=6.0, gt=0, description="adaptive: KL to steer to, nats a response")
    kl_horizon: int = Field(default=10_000, ge=1, description="adaptive: responses until it has adapted")
    kl_warning: float = Field(
        default=30.0, gt=0, description="warn about a KL to the reference above this, nats a response"
    )
    kl_limit: float | None = Field(
        default=5.0,
        gt=0,
        description="stop the run, its state saved, at a KL to the reference above this, nats a token: what is "
        "sampled is no text any more; null never does",
    )
    early_stop_kl: float | None = Field(
        default=None,
        gt=0,
        description="end an iteration's update when the policy has moved this far from the one that sampled, nats "
        "a token; null never does",
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="keep a moving average of the actor with this decay as the result",
    )
    samples_every: int = Field(
        default=10, ge=1, description="iterations between samples with scores (rollouts.jsonl)"
    )


class PPORecipe(RlhfRecipe):
    """One run of stage ppo."""

    unread: ClassVar[frozenset[str]] = frozenset(
        {"report.max_new_tokens", *(f"train.{key}" for key in UNREAD_TRAIN_KEYS)}
    )
    changeable: ClassVar[frozenset[str]] = frozenset({"ppo.kl_warning", "ppo.kl_limit", "ppo.samples_every"})

    adapter: PromptAdapter = Field(default_factory=PromptAdapter)
    data: PromptData
    train: PPOTrain = Field(default_factory=PPOTrain)
    ppo: PPO
    join: Join = Field(default_factory=Join)

    def reward_parts(self) -> list[RewardPart]:
        """The rewards as a list, names filled in."""
        return named_parts(self.ppo.reward)

    def user_functions(self) -> list[tuple[str, str]]:
        """The rewards that are functions."""
        return [("ppo.reward", part.path) for part in self.reward_parts() if is_function(part.path)]

    def held_to(self) -> list[str]:
        """How several rewards are joined."""
        several = len(self.reward_parts()) > 1
        return [f"join: {self.join.summary()} (scores are normalised)"] if several else []

    def problems(self) -> list[Problem]:
        """Beside those of every stage of rlhf: those of PPO."""
        return [
            *super().problems(),
            *self._ppo_problems(),
            *self._join_problems(),
            *self._share_problems(),
        ]

    def _join_problems(self) -> Iterator[Problem]:
        join, parts = self.join, self.reward_parts()
        for key in sorted(join.model_fields_set - {"method", *JOIN_KEYS[join.method]}):
            yield f"join.{key}", f"has no effect with join.method {join.method}: remove this key"
        names = [str(part.name) for part in parts]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield (
                "ppo.reward",
                f"{names.count(name)} rewards have the name {name}, by which metrics and section join know them: "
                "give each its own",
            )
        if join.method != "weighted":
            if join.harmless not in names or len(names) < 2:
                yield (
                    "join.harmless",
                    f"{join.method} needs a reward of the name {join.harmless} and another one, found "
                    f"{', '.join(names)}: name it, or give the rewards names",
                )
                return
            if any(part.name == join.harmless and part.weight != 1 for part in parts):
                yield (
                    "ppo.reward",
                    f"the weight of {join.harmless} has no effect with join.method {join.method}: remove it",
                )
            parts = [part for part in parts if part.name != join.harmless]
        if parts and all(part.weight == 0 for part in parts):
            yield "ppo.reward", "all weights are 0: there is nothing to learn from"
        if join.method == "lagrangian" and join.multiplier > join.multiplier_max:
            yield "join.multiplier", f"is above join.multiplier_max {join.multiplier_max:g}: lower it"

    def _share_problems(self) -> Iterator[Problem]:
        shares, sources = self.ppo.prompt_shares, self.data.train_sources()
        if shares is None:
            return
        if len(shares) != len(sources):
            yield (
                "ppo.prompt_shares",
                f"expected one for each of the {len(sources)} sources of data.train, found {len(shares)}",
            )
        elif abs(sum(shares) - 1) > 1e-6:
            yield "ppo.prompt_shares", f"add up to {sum(shares):g}, expected 1"
        elif 0 in portions(shares, self.ppo.batch_size):
            yield "ppo.prompt_shares", f"leave a source without prompts in a batch of {self.ppo.batch_size}"

    def _ppo_problems(self) -> Iterator[Problem]:
        ppo, data = self.ppo, self.data
        for key in UNREAD_TRAIN_KEYS:
            if key in self.train.model_fields_set:
                yield (
                    f"train.{key}",
                    "has no effect in stage ppo (its length and sizes are in section ppo): remove it",
                )
        if "max_new_tokens" in self.report.model_fields_set:
            yield (
                "report.max_new_tokens",
                "has no effect in stage ppo (answers are as long as ppo.max_new_tokens allows): remove it",
            )
        sources = [*data.train_sources(), *data.validation_sources()]
        if any(source.format != "auto" for source in sources):
            yield "data.format", "prompts are recognised by their columns: leave out every format"
        if any(source.weight != 1 for source in sources):
            yield "data.train", "stage ppo takes each prompt as often as any other: leave out every weight"
        if self.adapter.dropout > 0:
            yield "adapter.dropout", "makes the ratio of an unchanged policy differ from 1: remove this key"
        if data.packing:
            yield (
                "data.packing",
                "stage ppo samples responses and packs none: set it to false, or remove this key",
            )
        if self.model.dtype == "float16":
            yield "model.dtype", "float16 loses PPO's small gradients: set it to bfloat16 or float32"
        if data.max_length <= ppo.max_new_tokens:
            yield (
                "ppo.max_new_tokens",
                f"leaves no room for a prompt in data.max_length {data.max_length}: lower it",
            )
        if ppo.minibatch_size > ppo.batch_size:
            yield (
                "ppo.minibatch_size",
                f"is more than the {ppo.batch_size} responses of ppo.batch_size: lower it",
            )
        if ppo.kl_schedule == "exponential" and min(ppo.kl_start, ppo.kl_end) == 0:
            yield "ppo.kl_schedule", "exponential needs kl_start and kl_end above 0"
        if ppo.critic_warmup >= ppo.iterations:
            yield (
                "ppo.critic_warmup",
                f"leaves the actor none of the {ppo.iterations} iterations: lower it",
            )

    def dump(self) -> str:
        """As for every recipe, without the keys that are not read."""
        data = yaml.safe_load(super().dump())
        for key in UNREAD_TRAIN_KEYS:
            del data["train"][key]
        del data["report"]["max_new_tokens"]
        join = self.join
        data["join"] = {key: getattr(join, key) for key in ("method", *JOIN_KEYS[join.method])}
        return dump_yaml(data)


def portions(shares: Sequence[float], size: int) -> list[int]:
    """A batch in whole prompts as near to the shares as can be (largest remainders); they add up to its size."""
    exact = [share * size / sum(shares) for share in shares]
    whole = [int(part + 1e-9) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: size - sum(whole)]:
        whole[i] += 1
    return whole
