"""Tokens of a prompt and its responses, cut to a length where they have to be.

A response may always have half of the room, or more where the prompt leaves it, and is cut on the right. The
prompt is cut as Baichuan 2's chat format cuts it: whole rounds are dropped from the left, the newest is kept,
the system message stays in front; then what is still too long is cut from the left. All responses to a prompt
get the same cut prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.baichuan.chat import RoleIds


@dataclass(frozen=True)
class Tokens:
    """A prompt with its responses as token ids.

    Attributes:
        input_ids: prompt and response, for each response, best first; closed by EOS unless it was cut.
        prompt_length: how many of them, the same in each, are the prompt.
        lengths: of each before anything was cut.
        prompt_cut: whether tokens of the prompt are missing.
    """

    input_ids: list[list[int]]
    prompt_length: int
    lengths: list[int]
    prompt_cut: bool


def fit(conversations: Sequence[Sequence[int]], roles: RoleIds, max_length: int) -> Tokens:
    """Cut whole conversations that differ in their last answer.

    Args:
        conversations: the same prompt with each response and EOS, uncut. Content holds no role ids.
        roles: ids that open a turn.
        max_length: most tokens of each result.
    """
    first = list(conversations[0])
    start = len(first) - first[::-1].index(roles.assistant)  # behind the opening of the last answer
    prompt = first[:start]
    responses = [list(each)[start:] for each in conversations]
    longest = max(len(response) for response in responses)
    kept = cut_prompt(prompt, roles, max_length - min(longest, max_length // 2))
    room = max_length - len(kept)
    return Tokens(
        input_ids=[kept + response[:room] for response in responses],
        prompt_length=len(kept),
        lengths=[len(each) for each in conversations],
        prompt_cut=len(kept) < len(prompt),
    )


def cut_prompt(prompt: list[int], roles: RoleIds, room: int) -> list[int]:
    """A prompt in at most `room` tokens, as `finetune.baichuan.chat.build_prompt` cuts it.

    Args:
        prompt: system message, rounds, and the opening of the answer.
        roles: ids that open a turn.
        room: at least 1.
    """
    if len(prompt) <= room:
        return prompt
    starts = [place for place, token in enumerate(prompt) if token == roles.user]
    system = prompt[: starts[0]]
    rounds = len(prompt) - 1  # the opening of the answer is not counted, as in build_prompt
    fitting = (place for place in starts if len(system) + rounds - place <= room)
    return (system + prompt[next(fitting, starts[-1]) :])[-room:]
