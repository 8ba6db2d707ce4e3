"""Everything between the `data` section of a recipe of preferences and the trainer, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.baichuan.chat import role_ids
from finetune.data.cache import TokenCache
from finetune.data.loading import judge_files
from finetune.data.mixing import held_out_digests, shuffled, weighted_indices
from finetune.data.records import BadRow, Record
from finetune.data.report import FileReport, SplitReport
from finetune.data.sampling import sample_files
from finetune.data.statistics import LengthStatistics, length_statistics
from finetune.data.tokenize import tokenize
from finetune.errors import UserError
from rlhf.preferences.fitting import Tokens, fit
from rlhf.preferences.layouts import Preference
from rlhf.preferences.loading import PreferenceFile, load_source
from rlhf.preferences.report import PreferenceReport, count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.recipe import PreferenceData


_UNCUT = 2**31 - 1


class PreferenceSet:
    """Preferences with their tokens, as a map-style data set.

    Attributes:
        preferences: in order, repeated as often as an epoch sees them.
        tokens: of each.
    """

    def __init__(self, items: Sequence[tuple[Preference, Tokens]]) -> None:
        self.preferences = [preference for preference, _ in items]
        self.tokens = [tokens for _, tokens in items]

    def __len__(self) -> int:
        return len(self.preferences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` (one list a response, best first), `prompt_length`, `levels` and `graded`."""
        preference, tokens = self.preferences[index], self.tokens[index]
        return {
            "input_ids": tokens.input_ids,
            "prompt_length": tokens.prompt_length,
            "levels": [response.level for response in preference.responses],
            "graded": preference.graded,
        }

    @property
    def longest(self) -> int:
        """Tokens of the longest response with its prompt."""
        return max((len(ids) for tokens in self.tokens for ids in tokens.input_ids), default=0)

    @property
    def most_responses(self) -> int:
        """Responses of the prompt that has most."""
        return max((len(tokens.input_ids) for tokens in self.tokens), default=0)


@dataclass(frozen=True)
class PreparedPreferences:
    """What a stage that learns from preferences needs.

    Attributes:
        train: the training set, shuffled.
        validation: the held-out set, or None.
        report: what was read, left out and counted.
    """

    train: PreferenceSet
    validation: PreferenceSet | None
    report: PreferenceReport

    @property
    def longest(self) -> int:
        """Tokens of the longest training response with its prompt."""
        return self.train.longest

    @property
    def sequences(self) -> int:
        """Rows that go through the model for each prompt."""
        return self.train.most_responses

    @property
    def row_tokens(self) -> float:
        """Mean tokens of all responses to a prompt, the prompt before each."""
        return self.report.train.tokens.total / max(1, len(self.train))

    @property
    def supervised_share(self) -> float:
        """Of the tokens, those whose logits are computed: a reward model has no language head."""
        return 0.0

    @property
    def reference_passes(self) -> int:
        """Forward passes of a reference beside that of the model."""
        return 0

    @property
    def held_out(self) -> list[Record]:
        """The held-out prompts, each with its best response."""
        preferences = self.validation.preferences if self.validation else []
        return [
            Record(messages=conversation(each.prompt, each.responses[0].text), location=each.location)
            for each in preferences
        ]


def conversation(prompt: Sequence[dict[str, str]], response: str) -> list[dict[str, str]]:
    """A prompt's messages with the response at their end."""
    return [*prompt, {"role": "assistant", "content": response}]


def prepare_preferences(
    config: PreferenceData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stage: str,
    seed: int,
    resolve: Callable[[str], str] = str,
    cache: TokenCache | None = None,
) -> PreparedPreferences:
    """Read, check, tokenise, split and mix the preferences of a recipe.

    What is longer than data.max_length is cut as `rlhf.preferences.fitting` says. As in `finetune.data.prepare`,
    the result depends on content, settings and seed alone, and tokens are cached.

    Args:
        config: the recipe's `data` section.
        tokenizer: with Baichuan's vocabulary.
        stage: name of the stage, for the report.
        seed: decides the order of rows, and which ones a fractional weight picks.
        resolve: where a path of the recipe points on this machine.
        cache: where tokens are kept; None is the user's cache.

    Raises:
        UserError: a file is missing or unreadable, holds no preferences, has a bad row while data.on_bad_rows is
            stop, or nothing is left.
    """
    sources = {"train": config.train_sources(), "validation": config.validation_sources()}
    column = {"train": config.sampling.column if config.sampling else None}
    loaded = {
        split: [
            load_source(
                source,
                system=config.system,
                max_rows=config.max_rows,
                column=column.get(split),
                resolve=resolve,
            )
            for source in entries
        ]
        for split, entries in sources.items()
    }
    files = {split: [file for each in groups for file in each] for split, groups in loaded.items()}
    judge_files(files, on_bad_rows=config.on_bad_rows)  # before the slow part
    sampling = sample_files(files["train"], config.sampling, seed=seed, resolve=resolve)
    tokens = {
        split: [_tokenise(each, tokenizer, config, cache) for each in groups]
        for split, groups in loaded.items()
    }
    judge_files(files, on_bad_rows=config.on_bad_rows)  # now with those of which too little is left

    held_out = _held_out(tokens["train"], config.validation_share)
    train, validation = [], []
    for group, items in zip(loaded["train"], tokens["train"]):
        own = [item for item in items if item[0].prompt_digest not in held_out]
        validation += [item for item in items if item[0].prompt_digest in held_out]
        weight = group[0].weight if group else 1.0
        train += [own[index] for index in weighted_indices(len(own), weight, seed=seed)]
    validation += [item for items in tokens["validation"] for item in items]
    if not train:
        raise UserError("data.train: no row is left to train on", hint="lower data.validation_share")

    train = [train[index] for index in shuffled(range(len(train)), seed=seed)]
    prompts = {preference.prompt_digest for preference, _ in train}
    report = PreferenceReport(
        stage=stage,
        max_length=config.max_length,
        files=[
            report
            for split in files
            for report in _file_reports(split, files[split], tokens[split], held_out)
        ],
        bad_rows=[row for members in files.values() for file in members for row in file.bad_rows],
        train=SplitReport(len(train), _statistics([t for _, t in train]), None),
        validation=SplitReport(len(validation), _statistics([t for _, t in validation]), None)
        if validation
        else None,
        sampling=sampling,
        cut_prompts=sum(tokens.prompt_cut for _, tokens in train),
        shared_prompts=sum(preference.prompt_digest in prompts for preference, _ in validation),
        counts={
            split: count([preference for preference, _ in items], config.families)
            for split, items in (("train", train), ("validation", validation))
            if items
        },
    )
    return PreparedPreferences(
        PreferenceSet(train), PreferenceSet(validation) if validation else None, report
    )


def _tokenise(
    files: Sequence[PreferenceFile],
    tokenizer: PreTrainedTokenizerBase,
    config: PreferenceData,
    cache: TokenCache | None,
) -> list[tuple[Preference, Tokens]]:
    """Tokens of the preferences of one source; those that cannot be used are moved to the bad rows."""
    records = [
        Record(messages=conversation(preference.prompt, response.text), location=preference.location)
        for file in files
        for preference in file.preferences
        for response in preference.responses
    ]
    table = tokenize(records, tokenizer, max_length=_UNCUT, workers=config.workers, cache=cache)
    table = table.select_columns(["input_ids"])
    roles = role_ids(tokenizer)
    items: list[tuple[Preference, Tokens]] = []
    start = 0
    for file in files:
        kept = []
        for preference in file.preferences:
            conversations = table[start : start + len(preference.responses)]["input_ids"]
            start += len(preference.responses)
            tokens = fit(conversations, roles, config.max_length)
            if len({tuple(ids) for ids in tokens.input_ids}) < len(tokens.input_ids):
                reason = f"responses are the same in what data.max_length {config.max_length} leaves of them"
                file.bad_rows.append(BadRow(preference.location, reason))
            else:
                kept.append(preference)
                items.append((preference, tokens))
        file.items = kept
    return items


def _held_out(sources: Sequence[Sequence[tuple[Preference, Tokens]]], share: float) -> set[bytes]:
    """Prompts to hold out: all preferences on one prompt land on one side."""
    if share == 0:
        return set()
    digests = [preference.prompt_digest for items in sources for preference, _ in items]
    chosen = held_out_digests(digests, share)
    if not chosen:
        raise UserError(
            "data.validation_share: nothing can be held out: the training data has a single prompt",
            hint="add data, name held-out data with data.validation, or remove this key",
        )
    return chosen


def _file_reports(
    split: str,
    files: Sequence[PreferenceFile],
    tokens: Sequence[Sequence[tuple[Preference, Tokens]]],
    held_out: set[bytes],
) -> list[FileReport]:
    by_location = {id(preference): each for items in tokens for preference, each in items}
    seen: set[bytes] = set()
    reports = []
    for file in files:
        before = len(seen)
        seen.update(preference.digest for preference in file.preferences)
        in_held_out = sum(preference.prompt_digest in held_out for preference in file.preferences)
        reports.append(
            FileReport(
                file=file.name,
                split=split,
                format=file.layout,
                columns=(),
                weight=file.weight,
                rows=file.rows,
                kept=file.kept,
                sampled=file.sampled,
                bad=len(file.bad_rows),
                duplicates=len(file.preferences) - (len(seen) - before),
                held_out=in_held_out if split == "train" else 0,
                tokens=_statistics([by_location[id(preference)] for preference in file.preferences]),
            )
        )
    return reports


def _statistics(tokens: Sequence[Tokens]) -> LengthStatistics:
    """Token counts of the responses, each with its prompt; responses count as supervised."""
    lengths = [length for each in tokens for length in each.lengths]
    kept = [len(ids) for each in tokens for ids in each.input_ids]
    supervised = [len(ids) - each.prompt_length for each in tokens for ids in each.input_ids]
    return length_statistics(
        np.array(lengths, dtype=np.int64),
        total=sum(kept),
        supervised=sum(supervised),
        truncated=sum(whole > cut for whole, cut in zip(lengths, kept)),
    )
