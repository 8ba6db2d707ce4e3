"""Optimisers and learning rates of PPO, from the recipe's section train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rlhf.ppo.recipe import PPORecipe

ADAM_EPSILON = 1e-5
"""As in OpenAI's PPO: larger than Adam's 1e-8, so that rare small gradients are not blown up to full steps."""


def make_optimizer(
    recipe: PPORecipe, parameters: Sequence[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW, or one of bitsandbytes' that need a GPU."""
    train = recipe.train
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": tuple(train.betas),
        "eps": ADAM_EPSILON,
        "weight_decay": train.weight_decay,
    }
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes.optim as bnb

    kinds = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw": bnb.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
    }
    return kinds[train.optimizer](parameters, **settings)


def make_scheduler(recipe: PPORecipe, optimizer: torch.optim.Optimizer) -> Any:
    """The course of the learning rate over the iterations."""
    from transformers import get_scheduler

    train, iterations = recipe.train, recipe.ppo.iterations
    warmup = round(train.warmup_ratio * iterations)
    return get_scheduler(train.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=iterations)
