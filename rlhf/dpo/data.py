"""Preferences as pairs for trl's DPO trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.data.records import Record
from rlhf.preferences import Preference, PreferenceReport, PreferenceSet, PreparedPreferences

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class PreparedPairs:
    """What stage dpo needs.

    Attributes:
        train: columns prompt_ids, chosen_ids and rejected_ids (lists of int).
        validation: the same of the held-out set, or None.
        preferences: what the pairs were made of.
    """

    train: Dataset
    validation: Dataset | None
    preferences: PreparedPreferences

    @property
    def report(self) -> PreferenceReport:
        """What was read, left out and counted."""
        return self.preferences.report

    @property
    def held_out(self) -> list[Record]:
        """The held-out prompts, each with its best response."""
        return self.preferences.held_out

    @property
    def longest(self) -> int:
        """Tokens of the longest training response with its prompt."""
        return self.preferences.longest

    @property
    def sequences(self) -> int:
        """Rows that go through the model for each pair."""
        return 2

    @property
    def row_tokens(self) -> float:
        """Mean tokens of both responses of a pair, the prompt before each."""
        counted = {"prompt_ids": 2, "chosen_ids": 1, "rejected_ids": 1}
        total = sum(times * sum(map(len, self.train[name])) for name, times in counted.items())
        return total / max(1, len(self.train))

    @property
    def supervised_share(self) -> float:
        """Of the tokens, those whose logits are computed."""
        return self.report.train.tokens.supervised_share

    @property
    def reference_passes(self) -> int:
        """Forward passes of the reference beside that of the model."""
        return 1


def prepare_pairs(preferences: PreparedPreferences, *, pairs_per_prompt: int | None) -> PreparedPairs:
    """Pairs of every prompt, of ranked responses at most so many, widest gaps first."""
    validation = preferences.validation
    return PreparedPairs(
        train=pairs_of(preferences.train, pairs_per_prompt),
        validation=None if validation is None else pairs_of(validation, pairs_per_prompt),
        preferences=preferences,
    )


def pairs_of(preferences: PreferenceSet, pairs_per_prompt: int | None) -> Dataset:
    """One row a pair, in the order of the prompts."""
    from datasets import Dataset

    rows = []
    for preference, tokens in zip(preferences.preferences, preferences.tokens):
        cut = tokens.prompt_length
        for better, worse in choose_pairs(preference, pairs_per_prompt):
            rows.append(
                {
                    "prompt_ids": tokens.input_ids[better][:cut],
                    "chosen_ids": tokens.input_ids[better][cut:],
                    "rejected_ids": tokens.input_ids[worse][cut:],
                }
            )
    return Dataset.from_list(rows)


def choose_pairs(preference: Preference, limit: int | None) -> list[tuple[int, int]]:
    """The pairs to learn from, widest gap first; of equal gaps the one with the better response first."""
    levels = [response.level for response in preference.responses]
    return sorted(preference.pairs, key=lambda pair: levels[pair[1]] - levels[pair[0]])[:limit]
