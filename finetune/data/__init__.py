"""Data: files into checked, tokenised, packed examples.

from finetune.data import collator_for, prepare
data = prepare(recipe.data, tokenizer, stage=recipe.stage, seed=recipe.seed, resolve=recipe.resolve)
data.train, data.validation, data.held_out, data.report
"""

from finetune.data.collate import Collator, collator_for
from finetune.data.prepare import PreparedData, prepare
from finetune.data.records import BadRow, Location, Record
from finetune.data.report import DataReport

__all__ = [
    "BadRow",
    "Collator",
    "DataReport",
    "Location",
    "PreparedData",
    "Record",
    "collator_for",
    "prepare",
]
