"""The models of a recipe, on one base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.ppo.models import ScalarHead, SharedBase
from rlhf.ppo.rewards import Rewards, build_rewards

if TYPE_CHECKING:
    from finetune.baichuan.load import Base
    from rlhf.ppo.recipe import PPORecipe

ACTOR, CRITIC, REFERENCE = "actor", "critic", "reference"


def build_models(
    recipe: PPORecipe, base: Base, tokenizer: Any, *, batch_size: int
) -> tuple[SharedBase, ScalarHead, Rewards]:
    """Actor, reference, rewards and critic on one base, and the critic's head.

    The actor begins as the recipe's `model.adapter`, of which the reference keeps a copy; without one it begins
    as the base, which is the reference then.
    """
    from transformers import set_seed

    from finetune.adapters.build import adapter_config, check_targets
    from finetune.baichuan.checkpointing import Checkpointing
    from finetune.baichuan.load import load_model

    lm = load_model(recipe.model, base)
    lm.name_or_path = lm.config.name_or_path = base.identity  # peft writes it into adapters
    set_seed(recipe.seed)
    models = SharedBase(lm)
    config: Any = adapter_config(recipe.adapter, base)
    if recipe.model.adapter:
        models.add_saved(ACTOR, Path(recipe.resolve(recipe.model.adapter)), trainable=True)
        models.add_copy(REFERENCE, of=ACTOR)
    else:
        check_targets(lm, recipe.adapter)
        models.add_new(ACTOR, config)
    rewards = build_rewards(recipe, models, base, tokenizer, batch_size=batch_size)
    head = ScalarHead(lm.config.hidden_size)
    source = rewards.first_adapter if recipe.ppo.critic_from_reward else None
    if source is not None:
        models.add_copy(CRITIC, of=str(source.adapter), trainable=True)
        head.begin_as(source.head_weight, mean=source.mean, std=source.std)
    else:
        models.add_new(CRITIC, config)
    head.to(models.device)
    if recipe.train.gradient_checkpointing:
        lm.checkpointing = Checkpointing.of(recipe.train)
        models.checkpoint_activations()
    return models, head, rewards
