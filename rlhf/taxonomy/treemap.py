"""A squarified treemap (Bruls, Huizing and van Wijk, 2000): areas in proportion, as square as they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rect:
    """A rectangle; x and y are its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    def inset(self, margin: float, top: float = 0.0) -> Rect:
        """The rectangle without a margin all round, and a strip more at the top; never negative."""
        return Rect(
            self.x + margin,
            self.y + margin + top,
            max(0.0, self.width - 2 * margin),
            max(0.0, self.height - 2 * margin - top),
        )


def squarify(values: Sequence[float], area: Rect) -> list[Rect]:
    """One rectangle for each value, in the order of the values; together they fill the area.

    Args:
        values: positive, largest first for the best shapes.
    """
    total = sum(values)
    rects: list[Rect] = []
    rest, left = area, list(values)
    while left:
        scale = rest.width * rest.height / sum(left) if total else 0.0
        side = min(rest.width, rest.height)
        count = 1
        while count < len(left) and _worst(left[: count + 1], side, scale) <= _worst(
            left[:count], side, scale
        ):
            count += 1
        row, left = left[:count], left[count:]
        placed, rest = _place(row, rest, scale)
        rects += placed
    return rects


def _worst(row: Sequence[float], side: float, scale: float) -> float:
    """The largest ratio of sides in a row laid along `side`."""
    depth = sum(row) * scale / side if side else 0.0
    if not depth:
        return float("inf")
    lengths = [value * scale / depth for value in row]
    return max(max(depth / length, length / depth) if length else float("inf") for length in lengths)


def _place(row: Sequence[float], area: Rect, scale: float) -> tuple[list[Rect], Rect]:
    """A row along the shorter side, and the area that is left."""
    upright = area.width >= area.height  # the row is a column at the left
    side = area.height if upright else area.width
    depth = sum(row) * scale / side if side else 0.0
    rects, at = [], area.y if upright else area.x
    for value in row:
        length = value * scale / depth if depth else 0.0
        rects.append(Rect(area.x, at, depth, length) if upright else Rect(at, area.y, length, depth))
        at += length
    if upright:
        return rects, Rect(area.x + depth, area.y, max(0.0, area.width - depth), area.height)
    return rects, Rect(area.x, area.y + depth, area.width, max(0.0, area.height - depth))
