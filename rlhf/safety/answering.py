"""A model's answers to attack prompts, many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.progress import progress_bar
from finetune.errors import UserError
from rlhf.safety.attacks import AttackPrompt

if TYPE_CHECKING:
    from finetune.recipe.schema import Model

MAX_NEW_TOKENS = 128
BATCH_SIZE = 16

OPTIONS_HINT = "lower --batch-size or --max-new-tokens, or hold the base in 4 bits with --quantization nf4"
RECIPE_HINT = "lower redteam.batch_size or redteam.max_new_tokens, or set model.quantization=nf4"


@contextmanager
def opened_model(model: str | Model, adapter: Path | None, *, quantization: str) -> Iterator[tuple[Any, Any]]:
    """A model, named or as the section of a recipe, with its adapter; and its tokenizer.

    Raises:
        UserError: they cannot be had, or the GPU is out of memory while they are used.
    """
    from finetune.chat_command import load
    from finetune.quiet import quiet_libraries

    quiet_libraries()
    import torch

    try:
        yield load(model, adapter, quantization=quantization)
    except torch.OutOfMemoryError as error:
        name, hint = (model, OPTIONS_HINT) if isinstance(model, str) else (model.base, RECIPE_HINT)
        raise UserError(f"the GPU is out of memory with {name}", hint=hint) from error


def with_system(prompt: AttackPrompt, system: str | None) -> list[dict[str, str]]:
    """A prompt's messages, behind a system message if there is one and the prompt brings none."""
    messages = [dict(message) for message in prompt.messages]
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def answer_all(
    network: Any,
    tokenizer: Any,
    conversations: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answers to conversations, in their order, with a progress bar on terminals.

    Args:
        network: causal LM, PEFT or not.
        tokenizer: Baichuan's.
        conversations: messages, the last one the user's.
        max_new_tokens: longest answer; at most half of what the model holds.
        batch_size: prompts at once; those of like length go together.
        temperature: 0 takes the likeliest tokens; above, answers are sampled.
        seed: of sampling.
    """
    from finetune.baichuan.chat import build_prompt
    from finetune.generate import greedy_answers, sampled_answers

    longest = int(network.config.model_max_length)
    budget = min(max_new_tokens, longest // 2)
    prompts = [build_prompt(tokenizer, c, max_length=longest, max_new_tokens=budget) for c in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with progress_bar("answering", len(prompts)) as advance:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[i] for i in chosen]
            if temperature == 0:
                texts = greedy_answers(
                    network, tokenizer, batch, max_new_tokens=budget, batch_size=batch_size
                )
            else:
                texts = sampled_answers(
                    network,
                    tokenizer,
                    batch,
                    max_new_tokens=budget,
                    temperature=temperature,
                    seed=seed + start,
                    batch_size=batch_size,
                )
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
            advance(len(chosen))
    return answers
