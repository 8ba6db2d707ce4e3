"""Rewards that are known exactly, to see PPO at work: a model that is paid for something should do more of it.

Functions of conversations, as `ppo.reward` takes them; see `rlhf.ppo.rewards`.
"""

from __future__ import annotations

from finetune.data.records import Message

NUMERALS = frozenset("零一二三四五六七八九十百千万")
SHORTEST, LONGEST = 8, 60


def numeral_share(conversations: list[list[Message]]) -> list[float]:
    """Share of Chinese numerals among the characters of each response, 0 to 1.

    The length is bounded: full marks are given between `SHORTEST` and `LONGEST` characters, and proportionally
    less outside, so that neither a single 一 nor an endless count pays.
    """
    return [_share(messages[-1]["content"]) for messages in conversations]


def _share(response: str) -> float:
    text = "".join(response.split())
    if not text:
        return 0.0
    share = sum(character in NUMERALS for character in text) / len(text)
    return share * min(1.0, len(text) / SHORTEST, LONGEST / len(text))
