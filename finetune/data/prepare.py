"""Everything between the recipe's `data` section and the trainer, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from finetune.data.cache import TokenCache
from finetune.data.loading import LoadedFile, SourceLike, judge_files, load_source
from finetune.data.mixing import held_out_digests, shuffled, weighted_indices
from finetune.data.oddities import oddities
from finetune.data.packing import pack_documents, packing_statistics
from finetune.data.records import Record
from finetune.data.report import DataReport, FileReport, SplitReport
from finetune.data.sampling import SamplingReport, SamplingSettings, sample_files
from finetune.data.tokenised_source import TokenisedSource, statistics_of
from finetune.data.tokenize import tokenize
from finetune.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Selection = list[tuple[TokenisedSource, np.ndarray]]
"""Sources, and the indices of the records taken from each, repeated as often as they are seen."""


class DataSettings(Protocol):
    """The recipe's `data` section, as far as it is read here (finetune.recipe.schema.Data)."""

    validation_share: float
    max_length: int
    packing: bool
    on_bad_rows: Any
    system: str | None
    max_rows: int | None
    sampling: Any
    workers: int | None

    def train_sources(self) -> Sequence[SourceLike]:
        """The training data, formats and weights filled in."""

    def validation_sources(self) -> Sequence[SourceLike]:
        """The held-out data."""


@dataclass(frozen=True)
class PreparedData:
    """What a training stage needs.

    Attributes:
        train: columns input_ids and labels (lists of int), and seq_lengths if packed.
            `Collator` makes batches of them.
        validation: the same for the held-out rows, or None.
        held_out: the validation rows in normalised form, in order; empty without validation.
        report: what was read, left out and counted.
    """

    train: Dataset
    validation: Dataset | None
    held_out: list[Record]
    report: DataReport

    @property
    def longest(self) -> int:
        """Tokens of the longest training row."""
        return max((len(ids) for ids in self.train["input_ids"]), default=0)

    @property
    def sequences(self) -> int:
        """Rows that go through the model for each one that a batch counts."""
        return 1

    @property
    def row_tokens(self) -> float:
        """Mean tokens of what goes through the model for each row that a batch counts."""
        return self.report.train.tokens.total / max(1, len(self.train))

    @property
    def supervised_share(self) -> float:
        """Of the tokens, those whose logits are computed."""
        return self.report.train.tokens.supervised_share

    @property
    def reference_passes(self) -> int:
        """Forward passes of a reference beside that of the model."""
        return 0


def prepare(
    config: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stage: str,
    seed: int,
    resolve: Callable[[str], str] = str,
    cache: TokenCache | None = None,
) -> PreparedData:
    """Read, check, tokenise, split, mix and pack the data of a recipe.

    The result depends on the content of the files, the settings, the vocabulary and the seed alone: every
    process of a distributed run gets the same. Let one process go first (accelerate's `main_process_first`):
    the others find its tokens in the cache.

    Args:
        config: the recipe's `data` section.
        tokenizer: with Baichuan's vocabulary.
        stage: "sft" learns conversations, "pretrain" raw text.
        seed: decides the order of rows, and which ones a fractional weight picks.
        resolve: where a path of the recipe points on this machine (Recipe.resolve).
        cache: where tokens are kept; None is the user's cache.

    Raises:
        UserError: a file is missing or unreadable, its layout unknown, a row bad while data.on_bad_rows is
            stop, or nothing is left.
    """

    loaded, sampling = read(
        config, stage=stage, seed=seed, resolve=resolve
    )  # refuses bad rows before the slow part
    files = {split: [file for source in sources for file in source] for split, sources in loaded.items()}
    train_sources, validation_sources = (
        [_tokenise(source, tokenizer, config, cache) for source in loaded[split]]
        for split in ("train", "validation")
    )
    judge_files(files, on_bad_rows=config.on_bad_rows)  # now with the rows in which nothing is left to learn
    if config.validation_share > 0:
        _hold_out(train_sources, config.validation_share)
    for source in validation_sources:
        source.held_out[:] = True

    train = _select_train(train_sources, seed)
    validation = [
        (source, np.flatnonzero(source.usable & source.held_out))
        for source in train_sources + validation_sources
    ]
    held_out = [source.records[index] for source, chosen in validation for index in chosen.tolist()]
    train_set, train_report = _build(train, config, seed)
    validation_set, validation_report = _build(validation, config, seed) if held_out else (None, None)
    report = DataReport(
        stage=stage,
        max_length=config.max_length,
        files=[
            *_file_reports("train", train_sources),
            *_file_reports("validation", validation_sources),
        ],
        bad_rows=[row for members in files.values() for file in members for row in file.bad_rows],
        train=train_report,
        validation=validation_report,
        odd_rows=[row for members in files.values() for file in members for row in oddities(file.records)],
        sampling=sampling,
        **_overlap(train, held_out),
    )
    return PreparedData(train_set, validation_set, held_out, report)


def read(
    config: DataSettings, *, stage: str, seed: int, resolve: Callable[[str], str] = str
) -> tuple[dict[str, list[list[LoadedFile]]], SamplingReport | None]:
    """The part of `prepare` that needs no tokenizer.

    Returns:
        Of "train" and "validation", the files of each source; and what data.sampling did, if it is set.

    Raises:
        UserError: as `prepare`.
    """

    settings: SamplingSettings | None = config.sampling

    def load(sources: Sequence[SourceLike], column: str | None = None) -> list[list[LoadedFile]]:
        return [
            load_source(
                source,
                stage=stage,
                system=config.system,
                max_rows=config.max_rows,
                column=column,
                resolve=resolve,
            )
            for source in sources
        ]

    loaded = {
        "train": load(config.train_sources(), settings.column if settings else None),
        "validation": load(config.validation_sources()),
    }
    files = {split: [file for source in sources for file in source] for split, sources in loaded.items()}
    judge_files(files, on_bad_rows=config.on_bad_rows)
    return loaded, sample_files(files["train"], settings, seed=seed, resolve=resolve)


def _tokenise(
    files: list[LoadedFile],
    tokenizer: PreTrainedTokenizerBase,
    config: DataSettings,
    cache: TokenCache | None,
) -> TokenisedSource:
    records = [record for file in files for record in file.records]
    dataset = tokenize(records, tokenizer, max_length=config.max_length, workers=config.workers, cache=cache)
    return TokenisedSource(files, dataset, max_length=config.max_length)


def _hold_out(sources: Sequence[TokenisedSource], share: float) -> None:
    """Mark the records that go to the validation set instead of the training set."""
    digests = [
        source.records[index].digest for source in sources for index in np.flatnonzero(source.usable).tolist()
    ]
    chosen = held_out_digests(digests, share)
    if not chosen:
        raise UserError(
            "data.validation_share: nothing can be held out: the training data is a single document",
            hint="add data, name held-out data with data.validation, or remove this key",
        )
    for source in sources:
        source.held_out[:] = [record.digest in chosen for record in source.records]


def _select_train(sources: Sequence[TokenisedSource], seed: int) -> Selection:
    selection = []
    for source in sources:
        usable = np.flatnonzero(source.usable & ~source.held_out)
        selection.append((source, usable[weighted_indices(len(usable), source.weight, seed=seed)]))
    return selection


def _build(selection: Selection, config: DataSettings, seed: int) -> tuple[Dataset, SplitReport]:
    """The data set of the selected records, shuffled, packed if the recipe says so."""
    from datasets import concatenate_datasets

    offsets = np.cumsum([0, *(len(source.dataset) for source, _ in selection)])
    rows = np.concatenate(
        [start + source.rows_of(chosen) for start, (source, chosen) in zip(offsets, selection)]
    )
    order = shuffled(rows.tolist(), seed=seed)
    combined = concatenate_datasets([source.dataset for source, _ in selection])
    tokens = statistics_of(selection)
    if not config.packing:
        dataset = combined.select_columns(["input_ids", "labels"]).select(order)
        return dataset, SplitReport(len(dataset), tokens, None)
    packed = pack_documents(combined.data.table, order, config.max_length, seed=seed)
    return packed, SplitReport(len(packed), tokens, packing_statistics(packed, config.max_length))


def _file_reports(split: str, sources: Sequence[TokenisedSource]) -> list[FileReport]:
    reports = []
    seen: set[bytes] = set()
    for source in sources:
        for file in source.files:
            chosen = source.indices_of(file)
            digests = [source.records[index].digest for index in chosen.tolist()]
            before = len(seen)
            seen.update(digests)
            reports.append(
                FileReport(
                    file=file.name,
                    split=split,
                    format=file.layout.name if file.layout else None,
                    columns=file.layout.columns if file.layout else (),
                    weight=source.weight,
                    rows=file.rows,
                    kept=file.kept,
                    sampled=file.sampled,
                    bad=len(file.bad_rows),
                    duplicates=len(digests) - (len(seen) - before),
                    held_out=int(source.held_out[chosen].sum()) if split == "train" else 0,
                    tokens=source.statistics(chosen),
                )
            )
    return reports


def _overlap(train: Selection, held_out: Sequence[Record]) -> dict[str, Any]:
    """How much of the validation set the model is trained on."""
    if not held_out:
        return {}
    trained = [source.records[index] for source, chosen in train for index in np.unique(chosen).tolist()]
    contents = {record.digest for record in trained}
    prompts = {record.prompt for record in trained if record.prompt is not None}
    return {
        "leaked": sum(record.digest in contents for record in held_out),
        "shared_prompts": sum(record.prompt in prompts for record in held_out),
    }
