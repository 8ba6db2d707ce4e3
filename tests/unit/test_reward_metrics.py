"""What is said about scores, against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.preferences import Preference, Response
from rlhf.reward.functional import ranking_loss
from rlhf.reward.metrics import Share, evaluate
from rlhf.reward.report import report_section


def preference(levels: list[float], *, category: str | None = None, graded: bool = True) -> Preference:
    responses = tuple(Response(f"回答{i}", level) for i, level in enumerate(levels))
    return Preference([{"role": "user", "content": "问"}], responses, graded, category)


PREFERENCES = [
    preference([5, 4, 2], category="2.01"),
    preference([7, 1], category="2.03.002"),
    preference([3, 3, 1], category="1.01"),
    preference([1, 0], graded=False),
]
SCORES = [[1.0, 2.0, 0.0], [0.5, -0.5], [0.0, 0.3, 0.3], [1.0, 1.0]]


def test_counts_by_hand() -> None:
    metrics = evaluate(PREFERENCES, SCORES)
    # right: (5,2) (4,2) (7,1); wrong: (5,4) (first 3,1); equal scores: (second 3,1) and the ungraded pair
    assert metrics.pairs == 7
    assert metrics.accuracy == pytest.approx((3 + 2 * 0.5) / 7)
    assert metrics.by_gap == {
        "1": Share(0.0, 1),
        "2": Share(pytest.approx(1.5 / 3), 3),
        "3": Share(1.0, 1),
        "5": Share(1.0, 1),  # a gap of 6
    }
    assert metrics.by_first_tier == {"1": Share(0.25, 2), "2": Share(0.75, 4)}
    assert list(metrics.by_second_tier) == ["1.01", "2.01", "2.03"]
    flat = torch.tensor([score for scores in SCORES for score in scores], dtype=torch.float64)
    assert metrics.responses == 10
    assert metrics.mean == pytest.approx(flat.mean().item())
    assert metrics.std == pytest.approx(flat.std(correction=0).item())
    assert (metrics.best_scores, metrics.worst_scores) == ([1.0, 0.5, 0.0, 1.0], [0.0, -0.5, 0.3, 1.0])


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_loss_is_that_of_training(margin: float) -> None:
    scores = torch.tensor([1.0, 2.0, 0.0, 0.5, -0.5], dtype=torch.float64)
    gaps = torch.tensor([1.0, 3.0, 2.0, 6.0])
    expected = ranking_loss(scores, [3, 2], margins=margin * gaps).item()
    assert evaluate(PREFERENCES[:2], SCORES[:2], margin=margin).loss == pytest.approx(expected)


def test_calibration() -> None:
    sure, unsure = math.log(9), math.log(1.5)  # confidence 0.9 and 0.6
    pairs = [preference([2, 1])] * 15
    scores = [[sure, 0.0]] * 9 + [[0.0, sure]] + [[unsure, 0.0]] * 2 + [[0.0, unsure]] * 3
    metrics = evaluate(pairs, scores)
    unsure_bin, sure_bin = metrics.calibration
    assert (sure_bin.confidence, sure_bin.accuracy, sure_bin.pairs) == (pytest.approx(0.9), 0.9, 10)
    assert (unsure_bin.confidence, unsure_bin.accuracy, unsure_bin.pairs) == (pytest.approx(0.6), 0.4, 5)
    assert metrics.calibration_error == pytest.approx((0 * 10 + 0.2 * 5) / 15)


def test_section_holds_what_was_measured() -> None:
    section = report_section(evaluate(PREFERENCES, SCORES), PREFERENCES, SCORES, held_out=True, samples=2)
    tables = {table["title"]: table["rows"] for table in section["tables"]}
    assert tables["By annotated gap"][1] == ["2", "3", "50.0%", "61.1%"]
    assert [row[0] for row in tables["By first-tier category"]] == ["1", "2"]
    assert len(tables["Responses, best first as annotated"]) == 4
    histogram = next(chart for chart in section["charts"] if chart["x"] == "score")
    for line in histogram["lines"]:
        assert sum(share for _, share in line["points"]) == pytest.approx(1.0)
