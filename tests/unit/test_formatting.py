"""Numbers, sizes, times and text as reports show them."""

from __future__ import annotations

import pytest

from finetune.report.formatting import compact, duration, number, percent, plain_text, step_time
from finetune.sizes import byte_size


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(2e-4), "2e−4"),
        (number(1234567), "1,234,567"),
        (number(3.14159), "3.142"),
        (number(0.05), "0.05"),
        (number(-2), "−2"),
        (number(0), "0"),
        (compact(7_505_973_248), "7.51 B"),
        (compact(1234), "1,234"),
        (byte_size(1_610_612_736), "1.50 GiB"),
        (byte_size(12), "12 B"),
        (duration(4.2), "4.2 s"),
        (step_time(0.8123), "0.81 s"),
        (step_time(9.949), "9.9 s"),
        (step_time(9.97), "10.0 s"),
        (step_time(125), "2 min 5 s"),
        (duration(59.7), "60 s"),
        (duration(75), "1 min 15 s"),
        (duration(7384), "2 h 3 min"),
        (duration(200_000), "2 d 7 h"),
        (percent(-0.556, signed=True), "−55.6 %"),
        (plain_text("好\n\t\x1b[2J\x00"), "好\n\t\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected
