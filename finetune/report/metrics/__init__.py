"""Metrics of generated Chinese text: `evaluate` modules that ship with the project and load from its folder.

Each module is a folder `NAME/NAME.py`, so other software can use it too::

    import evaluate
    from finetune.report.metrics import metric_path

    evaluate.load(str(metric_path("char_f1"))).compute(predictions=["头痛"], references=["头疼"])

A module found by path is copied into the cache of `evaluate` and imported from there; nothing is looked up on
a network, and for the same reason a module imports nothing from this package.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

METRICS = ("char_f1", "rouge_l", "distinct")


def metric_path(name: str) -> Path:
    """Folder of the module called `name`, to be given to `evaluate.load`.

    Raises:
        KeyError: there is no such metric.
    """
    if name not in METRICS:
        raise KeyError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    return Path(__file__).resolve().parent / name


@cache
def load_metric(name: str) -> Any:
    """The `evaluate` module called `name`; its inputs stay in memory, so computing leaves no files behind."""
    import evaluate

    return evaluate.load(str(metric_path(name)), keep_in_memory=True)


def score(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Scores of all answers together.

    Args:
        predictions: what the model said, one text an item.
        references: what it should have said, one text an item.

    Returns:
        `char_f1` and `rouge_l` (means over the items), `distinct_1` and `distinct_2` (over all predictions
        together); each from 0 to 1.

    Raises:
        ValueError: no items, or not one reference for each prediction.
    """
    _check(predictions, references)
    pairs = {"predictions": predictions, "references": references}
    return {
        **load_metric("char_f1").compute(**pairs),
        **load_metric("rouge_l").compute(**pairs),
        **load_metric("distinct").compute(predictions=predictions),
    }


def score_items(predictions: list[str], references: list[str]) -> list[dict[str, float]]:
    """Scores of each answer: `char_f1`, `rouge_l` and `distinct_2` (variety within the one answer).

    Raises:
        ValueError: as `score`.
    """
    _check(predictions, references)
    pairs = {"predictions": predictions, "references": references, "per_item": True}
    columns = {
        "char_f1": load_metric("char_f1").compute(**pairs)["char_f1_items"],
        "rouge_l": load_metric("rouge_l").compute(**pairs)["rouge_l_items"],
        "distinct_2": load_metric("distinct").compute(predictions=predictions, per_item=True)[
            "distinct_2_items"
        ],
    }
    return [{name: column[i] for name, column in columns.items()} for i in range(len(predictions))]


def _check(predictions: list[str], references: list[str]) -> None:
    if not predictions:
        raise ValueError("no predictions to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references")
