"""What a run leaves for people: the report, the samples before and after, the adapter's model card."""

from finetune.report.html import build_report
from finetune.report.samples import (
    Sample,
    mean_scores,
    print_samples_table,
    read_samples,
    score_samples,
    write_samples,
)

__all__ = [
    "Sample",
    "build_report",
    "mean_scores",
    "print_samples_table",
    "read_samples",
    "score_samples",
    "write_samples",
]
