"""Held-out prompts to answer before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.generate import greedy_answers
from finetune.report.samples import Sample

if TYPE_CHECKING:
    from finetune.data import Record

PROMPT_SHARE = 1 / 3
"""How much of a held-out text is given; the model continues it."""

LONGEST_CONTINUATION = 120


def choose_samples(records: Sequence[Record], count: int) -> list[Sample]:
    """``count`` records spread evenly over the held-out ones, as prompts with reference answers."""
    if not records or count < 1:
        return []
    count = min(count, len(records))
    chosen = [records[(2 * i + 1) * len(records) // (2 * count)] for i in range(count)]
    return [_sample(record) for record in chosen]


def _sample(record: Record) -> Sample:
    if record.messages is not None:
        return Sample(list(record.messages[:-1]), record.messages[-1]["content"])
    text = record.text or ""
    cut = max(1, int(len(text) * PROMPT_SHARE))
    return Sample([{"role": "text", "content": text[:cut]}], text[cut : cut + LONGEST_CONTINUATION])


def answer(
    model: Any, tokenizer: Any, samples: Sequence[Sample], *, max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """The model's greedy answers (for raw text: continuations) to the samples' prompts."""
    from finetune.baichuan.chat import build_prompt, virtual_token_ids

    prompts = []
    for sample in samples:
        if sample.messages[0]["role"] == "text":
            text = tokenizer.encode_content(sample.messages[0]["content"])
            prompts.append(virtual_token_ids(tokenizer) + text)
        else:
            prompts.append(build_prompt(tokenizer, sample.messages, max_new_tokens=max_new_tokens))
    return greedy_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
