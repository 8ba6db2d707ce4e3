"""From logged numbers to curves: which charts there are, and where everything lies in them.

Geometry only. A plot is a square of 1000 by 1000 units that the page stretches to whatever room it has (lines
keep their width), with labels placed by percentages, so one drawing fits a wide screen and a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finetune.report.formatting import compact, number
from finetune.report.run_folder import Points, RunFolder

SIDE = 1000
MAX_POINTS = 800
SMOOTHED_SHARE = 0.05
_TIMING = ("runtime", "per_second", "flos")
_KNOWN = {"step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
_SHOWN_ELSEWHERE = {"peak_memory_bytes", "seconds", "train_loss", "num_tokens", "num_input_tokens_seen"}
MAX_FURTHER_CHARTS = 12


@dataclass
class Line:
    """One line of a chart: its points in data units, and how they are drawn.

    Attributes:
        label: what the legend and the read-out call it.
        points: `(step, value)`, by step.
        role: `train`, `validation` or `other`; decides the colour.
        markers: draw a dot at every point.
        faint: drawn thin behind its smoothed self, and not named in the legend.
    """

    label: str
    points: Points
    role: str = "train"
    markers: bool = False
    faint: bool = False
    path: str = ""
    dots: str = ""


@dataclass
class Tick:
    """A grid line: `position` in percent from the left or the top."""

    position: float
    label: str


@dataclass
class Chart:
    """A chart ready to be drawn by the template."""

    title: str
    lines: list[Line]
    summary: str
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    readout: dict[str, object] = field(default_factory=dict)


def charts(run: RunFolder) -> list[Chart]:
    """The charts that the run's metrics allow; the loss comes first if there is one."""
    described = [each for each in run.sections.get("curves") or [] if isinstance(each, dict)]
    named = {str(each.get("key")) for each in described}
    found = [_loss_chart(run), *(_described_chart(run, each) for each in described)]
    for key, title, label in (
        ("learning_rate", "Learning rate", number),
        ("grad_norm", "Gradient norm", number),
        ("tokens_per_second", "Throughput, tokens/s", compact),
    ):
        if key not in named:
            found.append(_chart(title, [Line(title, run.series(key))], label, from_zero=True))
    found += _further_charts(run, named)
    return [chart for chart in found if chart]


def _loss_chart(run: RunFolder) -> Chart | None:
    validation = run.series("eval_loss")
    before = run.result.get("eval_loss_before")
    if isinstance(before, int | float) and math.isfinite(before) and validation and validation[0][0] > 0:
        validation = [(0, float(before)), *validation]
    lines = [*_with_smoothing("training", run.series("loss"))]
    lines.append(Line("validation", validation, role="validation", markers=True))
    return _chart("Loss", lines, number, x_count=9)


def _described_chart(run: RunFolder, described: dict[str, Any]) -> Chart | None:
    """A number that the stage has words for, see `finetune.report.sections`."""
    share = bool(described.get("share"))
    return _metric_chart(
        run,
        str(described.get("key")),
        str(described.get("title") or described.get("key")),
        _as_percent if share else number,
        from_zero=share or bool(described.get("from_zero")),
    )


def _as_percent(share: float) -> str:
    return f"{number(100 * share)} %"


def _further_charts(run: RunFolder, named: set[str]) -> list[Chart | None]:
    """A chart for each other number that was logged."""
    names = list(dict.fromkeys(key.removeprefix("eval_") for key in run.logged_keys()))
    names = [n for n in names if n not in _KNOWN | _SHOWN_ELSEWHERE | named and not n.endswith(_TIMING)]
    return [
        _metric_chart(run, name, name.replace("_", " ").replace("/", ": "), number)
        for name in names[:MAX_FURTHER_CHARTS]
    ]


def _metric_chart(
    run: RunFolder, key: str, title: str, label: Callable[[float], str], *, from_zero: bool = False
) -> Chart | None:
    """One number over the steps, evaluation beside training."""
    lines = [
        Line("training", run.series(key)),
        Line("validation", run.series(f"eval_{key}"), role="validation", markers=True),
    ]
    return _chart(title, lines, label, from_zero=from_zero)


def _with_smoothing(label: str, points: Points) -> list[Line]:
    if len(points) < 30:
        return [Line(label, points)]
    return [Line(label, points, faint=True), Line(f"{label}, smoothed", smooth(points))]


def plain_chart(title: str, lines: list[Line], *, x_name: str) -> Chart | None:
    """A chart over something else than steps; None if no line has two points."""
    return _chart(title, lines, number, x_name=x_name)


def _chart(
    title: str,
    lines: list[Line],
    label: Callable[[float], str],
    *,
    from_zero: bool = False,
    x_count: int = 4,
    x_name: str = "step",
) -> Chart | None:
    lines = [line for line in lines if line.points]
    if max((len(line.points) for line in lines), default=0) < 2:
        return None
    for line in lines:
        line.points = thin(line.points)
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    by_step = x_name == "step"
    left, right = min(steps), max(steps)
    if right <= left:
        right = left + 1
    left = 0 if by_step and 0 < left <= right / 10 else left
    y_values = nice_ticks(min(0.0, *values) if from_zero else min(values), max(values))
    bottom, top = y_values[0], y_values[-1]

    def x(step: float) -> float:
        return (step - left) / (right - left)

    def y(value: float) -> float:
        return (top - value) / (top - bottom)

    for line in lines:
        corners = [f"{SIDE * x(step):.1f} {SIDE * y(value):.1f}" for step, value in line.points]
        line.path = "M" + "L".join(corners)
        line.dots = "".join(f"M{corner}h0" for corner in corners) if line.markers else ""
    step_ticks = [s for s in nice_ticks(left, right, count=x_count, whole=by_step) if left <= s <= right]
    return Chart(
        title=title,
        lines=lines,
        summary=f"{title} by {x_name}. "
        + " ".join(_in_words(line, label, x_name) for line in lines if not line.faint),
        x_ticks=[Tick(100 * x(s), compact(s) if by_step else number(s)) for s in step_ticks],
        y_ticks=[Tick(100 * y(value), label(value)) for value in y_values],
        readout=_readout(lines, (left, right, bottom, top), label, x_name),
    )


def _in_words(line: Line, label: Callable[[float], str], x_name: str) -> str:
    (_, first), (last_step, last) = line.points[0], line.points[-1]
    return f"{line.label}: from {label(first)} to {label(last)} at {x_name} {last_step:.10g}."


def _readout(
    lines: list[Line],
    bounds: tuple[float, float, float, float],
    label: Callable[[float], str],
    x_name: str,
) -> dict[str, object]:
    """What the page's script needs to name the values under the pointer."""
    return {
        "bounds": bounds,
        "x_name": x_name,
        "lines": [
            {
                "label": line.label,
                "role": line.role,
                "points": [(step, float(f"{value:.6g}"), label(value)) for step, value in line.points],
            }
            for line in lines
        ],
    }


def smooth(points: Points, share: float = SMOOTHED_SHARE) -> Points:
    """Mean over the neighbours on both sides, `share` of all points each way, fewer towards the ends.

    Unlike a running average it does not lag behind, which would put training above validation loss.
    """
    reach = max(1, round(share * len(points)))
    smoothed = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = [value for _, value in points[i - near : i + near + 1]]
        smoothed.append((step, sum(window) / len(window)))
    return smoothed


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most about `limit` points: lowest and highest of each stretch, so spikes stay, and both ends."""
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept |= {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
    return sorted(kept)


def nice_ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose `low` to `high`; about `count`.

    Where nothing is below 0, no tick is.
    """
    if high <= low:
        padding = abs(low) / 2 or 0.5
        low, high = low - padding if low else 0.0, high + padding
    rough = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
