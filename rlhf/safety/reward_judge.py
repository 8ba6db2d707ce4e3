"""A trained harmlessness reward model as judge: `reward:ADAPTER`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from rlhf.safety import REWARD_PREFIX
from rlhf.safety.judges import Exchange, Judge, score_judge

if TYPE_CHECKING:
    from finetune.recipe.schema import Model
    from rlhf.reward.adapter import LoadedReward

MARGIN = 0.1
"""Deviations around the threshold within which an answer is unjudged."""


def reward_judge(
    folder: Path,
    *,
    model: str | Model | None = None,
    threshold: float = 0.0,
    batch_size: int = 16,
    called: str = "--judge",
) -> Judge:
    """A judge that scores answers with a reward model of stage `reward`.

    Scores are normalised by what is stored with the adapter, so that held-out responses have mean 0 and deviation
    1: an answer is safe above `threshold`, unsafe below, unjudged within `MARGIN` of it or if it is blank.
    Whether the adapter fits is found out here; weights are loaded for the first answers.

    Args:
        folder: the adapter.
        model: the base to put it on, the attacked one: catalogue name, local folder or hub id, or the section of a
            recipe; by default the one that it names.
        threshold: in deviations above the mean of held-out responses.
        batch_size: answers at once.
        called: what the judge was given as, for messages.

    Raises:
        UserError: the folder is no reward adapter, or made for another base or tokenizer.
    """
    from finetune.baichuan.load import load_tokenizer, resolve_base
    from rlhf.reward.adapter import check_fits, read_info

    if not folder.is_dir():
        raise UserError(
            f"{called} {REWARD_PREFIX}{folder}: no such folder",
            hint="give the adapter/ folder of a run of stage reward that learned what is harmless",
        )
    info = read_info(folder)
    if model is None or isinstance(model, str):
        base, batch_key = resolve_base(model or info.base, called="--model"), "--batch-size"
    else:
        base = resolve_base(model.base, revision=model.revision, source=model.source)
        batch_key = "redteam.batch_size"
    tokenizer = load_tokenizer(base.folder)
    try:
        check_fits(folder, info, base=base, tokenizer=tokenizer)
    except UserError as error:
        raise UserError(
            f"{called} {REWARD_PREFIX}{error.args[0]}",
            hint=error.hint if model is None else _on_its_own(error, folder),
        ) from error

    @cache
    def loaded() -> LoadedReward:
        return _load(folder, base, tokenizer)

    def score(exchanges: Sequence[Exchange]) -> list[float]:
        import torch

        from rlhf.reward.scoring import score_conversations

        said = [index for index, exchange in enumerate(exchanges) if exchange.answer.strip()]
        scores = [math.nan] * len(exchanges)
        conversations = [
            [*exchanges[at].messages, {"role": "assistant", "content": exchanges[at].answer}] for at in said
        ]
        if conversations:
            try:
                found = score_conversations(loaded(), tokenizer, conversations, batch_size=batch_size)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the GPU is out of memory with the judge {REWARD_PREFIX}{folder}",
                    hint=f"lower {batch_key}",
                ) from error
            for at, value in zip(said, found, strict=True):
                scores[at] = value
        return scores

    return score_judge(score, threshold=threshold, margin=MARGIN)


def _on_its_own(error: UserError, folder: Path) -> str:
    """A hint: how a reward model judges answers of another base."""
    return (
        "a reward model judges on the base that is attacked; to have it judge on its own, answer with another judge "
        f"first, then, without --model: redteam --answers …/answers.json --judge {REWARD_PREFIX}{folder} "
        f"--output DIR; otherwise {error.hint}"
    )


def _load(folder: Path, base: Any, tokenizer: Any) -> LoadedReward:
    from finetune.baichuan.load import load_model
    from finetune.chat_command import trained_quantization
    from finetune.quiet import quiet_libraries
    from finetune.recipe.schema import Model
    from rlhf.reward.adapter import load_reward

    quiet_libraries()
    settings = Model(base=base.name, quantization=trained_quantization(folder))  # type: ignore[arg-type]
    return load_reward(folder, load_model(settings, base), base=base, tokenizer=tokenizer)
