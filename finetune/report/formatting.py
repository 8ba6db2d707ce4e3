"""Numbers as people read them."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

MINUS = "\N{MINUS SIGN}"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is a number that can be drawn or shown: not bool, NaN or infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float, digits: int = 4) -> str:
    """Up to `digits` significant digits: 1234567 → 1,234,567; 0.0002 → 2e−4; 3.14159 → 3.142; 0.05 → 0.05."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e9:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{places}f}"
    else:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{_without_zeros(mantissa)}e{int(exponent)}"
    return (text if "e" in text else _without_zeros(text)).replace("-", MINUS)


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def compact(value: float) -> str:
    """Large counts in short: 1234 → 1,234; 1234567 → 1.23 M; 7.5e9 → 7.50 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def step_time(seconds: float) -> str:
    """Of one step: two digits below ten seconds, 0.8123 → 0.81 s; from there on as `duration`."""
    return f"{seconds:.2g} s" if seconds < 9.95 else duration(seconds)


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 75 → 1 min 15 s; 7384 → 2 h 3 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def percent(share: float, digits: int = 1, signed: bool = False) -> str:
    """A share as a percentage: 0.0183 → 1.8 %; signed: −0.556 → −55.6 %."""
    return f"{100 * share:{'+' if signed else ''}.{digits}f} %".replace("-", MINUS)


def plain_text(text: str) -> str:
    """Text without the control characters that a model may emit and a terminal would obey."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
