"""The same held-out prompts, answered before and after training: file, scores and terminal table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import write_text
from finetune.report.files import read_jsonl
from finetune.report.formatting import is_number, plain_text

if TYPE_CHECKING:
    from rich.console import Console

SAMPLES_FILE = "samples.jsonl"
_FIELDS = ("messages", "reference", "before", "after")


@dataclass
class Sample:
    """One held-out prompt.

    Attributes:
        messages: the prompt, `[{"role": ..., "content": ...}, ...]`, without the answer.
        reference: the answer in the data.
        before: what the base answers; None before it was asked.
        after: what the trained model answers; None before it was asked (an interrupted run).
        scores: `METRIC_before` and `METRIC_after`, each from 0 to 1; filled by `score_samples`.
    """

    messages: list[dict[str, str]]
    reference: str
    before: str | None = None
    after: str | None = None
    scores: dict[str, float] = field(default_factory=dict)


def score_samples(samples: list[Sample]) -> list[Sample]:
    """Fill in the scores of the answers that are there; returns the same samples.

    Each answer gets `char_f1`, `rouge_l` and `distinct_2` (see `finetune.report.metrics.score_items`).
    """
    from finetune.report.metrics import score_items

    for moment in ("before", "after"):
        answered = [sample for sample in samples if getattr(sample, moment) is not None]
        if not answered:
            continue
        scores = score_items([getattr(s, moment) for s in answered], [s.reference for s in answered])
        for sample, item in zip(answered, scores, strict=True):
            sample.scores.update({f"{metric}_{moment}": value for metric, value in item.items()})
    return samples


def mean_scores(samples: Iterable[Sample]) -> dict[str, float]:
    """The mean of each score over the samples that have it, for example `{"char_f1_before": 0.21, ...}`."""
    columns: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.scores.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


def write_samples(run_dir: Path, samples: Iterable[Sample]) -> Path:
    """Write `samples.jsonl`, whole or not at all; returns its path."""
    path = Path(run_dir) / SAMPLES_FILE
    write_text(path, "".join(json.dumps(_to_row(s), ensure_ascii=False) + "\n" for s in samples))
    return path


def read_samples(run_dir: Path) -> list[Sample]:
    """The samples of a run folder; none where it has no `samples.jsonl`.

    Raises:
        UserError: a line is no sample.
    """
    path = Path(run_dir) / SAMPLES_FILE
    if not path.is_file():
        return []
    return [_from_row(row, f"{path}:{number}") for number, row in enumerate(read_jsonl(path), start=1)]


def _to_row(sample: Sample) -> dict[str, Any]:
    return {**{name: getattr(sample, name) for name in _FIELDS}, **sample.scores}


def _from_row(row: dict[str, Any], where: str) -> Sample:
    try:
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in row["messages"]]
        reference = str(row.get("reference") or "")
    except (KeyError, TypeError) as error:
        raise UserError(f'{where}: expected {{"messages": [{{"role", "content"}}], ...}}') from error
    scores = {name: float(v) for name, v in row.items() if name not in _FIELDS and is_number(v)}
    return Sample(messages, reference, row.get("before"), row.get("after"), scores)


def _question(sample: Sample) -> str:
    """The last question, numbered where others went before it."""
    if not sample.messages:
        return ""
    turn = sum(message["role"] == "user" for message in sample.messages)
    return (f"(turn {turn}) " if turn > 1 else "") + sample.messages[-1]["content"]


def print_samples_table(
    samples: list[Sample], console: Console, *, max_characters: int = 60, max_rows: int = 5
) -> None:
    """Print prompts, answers before and after, their character F1, and the mean in the last row.

    Of a conversation that is the last question, and which turn it is.

    Args:
        samples: scored; nothing is printed for none.
        console: where to.
        max_characters: longer texts are cut, with an ellipsis.
        max_rows: samples to print, spread over all of them; the mean is of all.
    """
    from rich.table import Table
    from rich.text import Text

    if not samples:
        return

    def text(content: str | None, style: str = "") -> Text:
        # Text, not str: what a model says must not be read as rich markup.
        flat = " ".join(plain_text(content or "").split())
        return Text(flat if len(flat) <= max_characters else flat[: max_characters - 1] + "…", style=style)

    def f1(scores: dict[str, float]) -> tuple[Text, Text]:
        before, after = scores.get("char_f1_before"), scores.get("char_f1_after")
        better = before is not None and after is not None and after > before
        return (
            Text("–" if before is None else f"{before:.2f}", style="dim"),
            Text("–" if after is None else f"{after:.2f}", style="bold green" if better else "bold"),
        )

    table = Table(title="Held-out questions, before and after", title_justify="left", show_footer=False)
    # Fold: Chinese has no spaces to wrap at, and would be cut off at the end of the first line.
    table.add_column("prompt", ratio=3, overflow="fold")
    table.add_column("before", ratio=4, overflow="fold")
    table.add_column("after", ratio=4, overflow="fold")
    table.add_column("F1 before", justify="right", no_wrap=True)
    table.add_column("F1 after", justify="right", no_wrap=True)
    shown = min(max_rows, len(samples))
    for index in range(shown):
        sample = samples[(2 * index + 1) * len(samples) // (2 * shown)]
        table.add_row(
            text(_question(sample)), text(sample.before, "dim"), text(sample.after), *f1(sample.scores)
        )
    table.add_section()
    table.add_row(Text(f"mean of {len(samples)}", style="bold"), "", "", *f1(mean_scores(samples)))
    console.print(table)
    if shown < len(samples):
        console.print(
            f"{shown} of {len(samples)} answers; all are in the report", style="dim", highlight=False
        )
