"""Answers of a model: many at once for reports, one streamed for chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.baichuan.tokenization import BaichuanTokenizer


def greedy_answers(
    model: Any,
    tokenizer: BaichuanTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[str]:
    """The most likely continuation of each prompt.

    Args:
        model: causal LM, PEFT or not; its train/eval mode is restored.
        tokenizer: decodes.
        prompts: token ids, from `finetune.baichuan.chat.build_prompt`.
        max_new_tokens: longest answer.
        batch_size: prompts at once, padded on the left; prompts of like length go together.

    Returns:
        Texts without special tokens, in the order of the prompts.
    """
    settings = {"do_sample": False, **NO_SAMPLING, "max_new_tokens": max_new_tokens}
    return _answers(model, tokenizer, prompts, settings, batch_size)


def sampled_answers(
    model: Any,
    tokenizer: BaichuanTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
    batch_size: int = 8,
) -> list[str]:
    """A random continuation of each prompt, the same for the same seed, prompts and batch size.

    Args:
        model: as for `greedy_answers`, as are the other arguments.
        temperature: above 0; below 1 is steadier, above is wilder.
        seed: of the draws; the global generators stay as they are.
        top_p: sample from this much probability.

    Returns:
        Texts without special tokens, in the order of the prompts.
    """
    import torch

    settings = {"do_sample": True, **NO_SAMPLING, "max_new_tokens": max_new_tokens}
    settings |= {"temperature": temperature, "top_k": 0, "top_p": top_p}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _answers(model, tokenizer, prompts, settings, batch_size)


def _answers(
    model: Any,
    tokenizer: BaichuanTokenizer,
    prompts: Sequence[Sequence[int]],
    settings: dict[str, Any],
    batch_size: int,
) -> list[str]:
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    # Gradient checkpointing turns the cache off for as long as the model trains.
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            pad = [width - len(prompts[i]) for i in chosen]
            ids = torch.tensor([[0] * n + list(prompts[i]) for n, i in zip(pad, chosen)], device=device)
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in pad], device=device)
            with torch.no_grad():
                output = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **settings)
            for i, row in zip(chosen, output[:, width:].tolist()):
                answers[i] = decode_answer(tokenizer, row)
    finally:
        model.train(was_training)
    return answers


NO_SAMPLING: dict[str, Any] = {"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": 1.0}
"""Overrides of the sampling settings in the official generation config, for greedy decoding."""


def decode_answer(tokenizer: BaichuanTokenizer, ids: Sequence[int]) -> str:
    """Text of generated ids up to the end of the answer, special tokens left out."""
    stops = {tokenizer.eos_token_id, tokenizer.user_token_id}
    kept: list[int] = []
    for token in ids:
        if token in stops:
            break
        kept.append(token)
    return tokenizer.decode(kept, skip_special_tokens=True).strip()
