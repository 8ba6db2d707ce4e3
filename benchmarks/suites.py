"""The rows of benchmarks/README.md, their ratios and targets."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import in_fresh_process, write_result

Row = dict[str, Any]
ROUNDS = {"cpu": 2, "gpu": 1}
"""A machine that others use too slows some rows and not others: the best of each row counts."""

BUDGET = {"cpu": 3600.0, "gpu": 570.0}
"""Seconds for a suite, after which rows are left out: the GPU's fits into one command of ten minutes, its rows in
the order of the targets that need them."""
ROW_SECONDS = {"cpu": 900.0, "gpu": 150.0}

_CPU = {"shape": "cpu", "seq": 512, "batch": 4, "supervised": 0.5, "rank": 16, "steps": 4}
_7B = {
    "shape": "7b",
    "seq": 4096,
    "batch": 1,
    "supervised": 1.0,
    "rank": 16,
    "steps": 4,
}
_OURS_7B = {"who": "ours", **_7B, "checkpointing": "matmul"}
_13B = {**_7B, "shape": "13b"}
_OURS_13B = {"who": "ours", **_13B, "checkpointing": "matmul"}
_SMALL = {"method": "qlora", "seq": 2048, "batch": 1, "rank": 64, "steps": 3, "checkpointing": True}
_SMALL |= {"optimizer": "paged_adamw_8bit", "supervised": 1.0, "offload": True, "embeddings": "int8"}
_LIGER = find_spec("liger_kernel") is not None
SUITES: dict[str, dict[str, Row]] = {
    "cpu": {
        "ours, RoPE": {"who": "ours", **_CPU},
        "stock Llama, trl": {"who": "llama", **_CPU},
        "stock Llama, Trainer": {"who": "plain", **_CPU},
        "ours, ALiBi": {"who": "ours", "positions": "alibi", **_CPU},
        "original code, ALiBi": {"who": "naive", "positions": "alibi", **_CPU},
        "stock Llama, Trainer, our matmul": {"who": "plain", **_CPU, "fast-matmul": True},
        "original code, ALiBi, our matmul": {
            "who": "naive", "positions": "alibi", **_CPU, "fast-matmul": True,
        },
        "ours, all supervised": {"who": "ours", **_CPU, "supervised": 1.0},
        "ours, checkpointing": {"who": "ours", **_CPU, "checkpointing": True},
        "ours, 8 documents packed": {"who": "ours", **_CPU, "documents": 8},
        "ours, QLoRA": {"who": "ours", **_CPU, "method": "qlora"},
        "ours, 1 x 2048": {"who": "ours", **_CPU, "seq": 2048, "batch": 1},
    },
    "gpu": {
        "7B ours": _OURS_7B,
        "7B stock Llama, trl": {"who": "llama", **_7B, "checkpointing": True, "liger": _LIGER},
        "13B ours, ALiBi": _OURS_13B,
        "13B ours, RoPE": {**_OURS_13B, "positions": "rope"},
        "7B ours, QLoRA": {**_OURS_7B, "method": "qlora"},
        "7B QLoRA rank 64, 1 x 2048": {"who": "ours", "shape": "7b", **_SMALL},
        "13B QLoRA rank 64, 1 x 2048": {"who": "ours", "shape": "13b", **_SMALL},
        "7B QLoRA rank 32, 1 x 40960": {
            "who": "ours", "shape": "7b", **_SMALL, "rank": 32, "seq": 40_960, "steps": 1,
        },
        "13B original code": {"who": "naive", **_13B, "checkpointing": True},
        "7B stock Llama, trl, no checkpointing": {"who": "llama", **_7B, "liger": _LIGER},
        "7B ours, compiled": {**_OURS_7B, "compile": True},
        "7B ours, 4 documents packed": {**_OURS_7B, "documents": 4},
        "7B ours, checkpointing": {"who": "ours", **_7B, "checkpointing": True},
    },
}  # fmt: skip


def _speed(table: dict[str, Row], ours: str, *peers: str) -> float:
    """Against the fastest of the peers that ran."""
    speeds = [
        table[peer]["tokens_per_second"] for peer in peers if "tokens_per_second" in table.get(peer, {})
    ]
    if not speeds:
        raise KeyError(peers[0])
    return table[ours]["tokens_per_second"] / max(speeds)


def _memory(table: dict[str, Row], ours: str, peer: str) -> float:
    return table[ours]["peak_bytes"] / table[peer]["peak_bytes"]


def _gib(table: dict[str, Row], name: str) -> float:
    return table[name]["peak_bytes"] / GIB


def _worst_prediction(table: dict[str, Row]) -> float:
    """How far predicted peak memory is from the measured, at worst."""
    found = [row["predicted_over_measured"] for row in table.values() if "predicted_over_measured" in row]
    if not found:
        raise KeyError("predicted_over_measured")
    return max(abs(ratio - 1) for ratio in found)


GIB = 2**30
_PREDICTED = ("predicted peak memory off by, at worst", "<=", 0.1, _worst_prediction)
TARGETS: dict[str, list[tuple[str, str, float, Any]]] = {
    "cpu": [
        (
            "speed against the original code",
            ">=",
            2.0,
            lambda t: _speed(t, "ours, ALiBi", "original code, ALiBi"),
        ),
        (
            "speed against stock Llama at its best",
            ">=",
            1.2,
            lambda t: _speed(t, "ours, RoPE", "stock Llama, trl", "stock Llama, Trainer"),
        ),
        (
            "the same, the original with our matmul",
            ">=",
            2.0,
            lambda t: _speed(t, "ours, ALiBi", "original code, ALiBi, our matmul"),
        ),
        (
            "the same, stock Llama with our matmul",
            ">=",
            1.2,
            lambda t: _speed(t, "ours, RoPE", "stock Llama, Trainer, our matmul"),
        ),
        (
            "peak memory of the original code",
            "<=",
            0.5,
            lambda t: _memory(t, "ours, ALiBi", "original code, ALiBi"),
        ),
        _PREDICTED,
    ],
    "gpu": [
        ("7B LoRA, share of the matmul peak", ">=", 0.5, lambda t: t["7B ours"]["share_of_matmul_peak"]),
        (
            "7B LoRA against stock Llama at its best",
            ">=",
            1.3,
            lambda t: _speed(t, "7B ours", "7B stock Llama, trl", "7B stock Llama, trl, no checkpointing"),
        ),
        ("13B ALiBi against RoPE", ">=", 0.95, lambda t: _speed(t, "13B ours, ALiBi", "13B ours, RoPE")),
        (
            "13B against the original code",
            ">=",
            3.0,
            lambda t: _speed(t, "13B ours, ALiBi", "13B original code"),
        ),
        ("7B QLoRA against LoRA", ">=", 0.75, lambda t: _speed(t, "7B ours, QLoRA", "7B ours")),
        ("7B QLoRA peak, GiB", "<=", 6.5, lambda t: _gib(t, "7B QLoRA rank 64, 1 x 2048")),
        ("13B QLoRA peak, GiB", "<=", 10.5, lambda t: _gib(t, "13B QLoRA rank 64, 1 x 2048")),
        (
            "7B QLoRA at 40,960 tokens, GiB",
            "<=",
            24.0,
            lambda t: t["7B QLoRA rank 32, 1 x 40960"]["peak_bytes"] / GIB,
        ),
        _PREDICTED,
    ],
}


def run(suite: str, script: str) -> None:
    """Measure every row in a process of its own, print the tables, keep the JSON after each row.

    A row that fails or has no time left is a line in the table, and takes no other with it.
    """
    path = str(Path(__file__).with_name(script))
    table: dict[str, Row] = {}
    end = time.monotonic() + BUDGET[suite]
    for turn in range(ROUNDS[suite]):
        for name, settings in SUITES[suite].items():
            left = min(ROW_SECONDS[suite], end - time.monotonic())
            row: Row = {"error": "left out: no time left"}
            if left > 0:
                row = in_fresh_process(path, flags(settings), timeout=left)
            print(f"round {turn + 1}  {name}: {row.get('error') or row['seconds_per_step']}", flush=True)
            table[name] = better(table.get(name), row)
            ratios = [judge(table, *target) for target in TARGETS[suite]]
            result = {"rounds": ROUNDS[suite], "ratios": ratios, "rows": table}
            saved = write_result(f"train_step_{suite}", result)
    predictions = [
        row["predicted_over_measured"] for row in table.values() if "predicted_over_measured" in row
    ]
    print(f"\n{show(table)}\n\n{show_ratios(ratios)}")
    if predictions:
        print(f"\npredicted over measured peak memory: {min(predictions):.2f} to {max(predictions):.2f}")
    print(f"\nsaved {saved.name}")


def flags(settings: Row) -> list[str]:
    """A row's settings as command-line options."""
    found: list[str] = []
    for key, value in settings.items():
        if value is not False:
            found += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return found


def better(before: Row | None, row: Row) -> Row:
    """The faster of two measurements of a row; the higher peak of memory."""
    if before is None or "error" in before:
        return row
    if "error" in row:
        return before
    faster = min(before, row, key=lambda each: each["seconds_per_step"])
    peak = max(before["peak_bytes"], row["peak_bytes"])
    merged = faster | {"peak_bytes": peak}
    if "predicted_peak_bytes" in merged:
        merged["predicted_over_measured"] = round(merged["predicted_peak_bytes"] / peak, 3)
    return merged


def judge(table: Any, what: str, sign: str, wanted: float, value: Any) -> Row:
    """A target, what was measured, and whether it is met; None where a row failed."""
    try:
        found = value(table)
    except KeyError:
        return {"what": what, "target": f"{sign} {wanted}", "found": None, "met": False}
    met = found >= wanted if sign == ">=" else found <= wanted
    return {"what": what, "target": f"{sign} {wanted}", "found": round(found, 3), "met": bool(met)}


def show(table: dict[str, Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| row | s/step | tokens/s | share of matmul peak | peak GiB | predicted/measured |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in table.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | |")
            continue
        ratio = f"{row['predicted_over_measured']:.2f}" if "predicted_over_measured" in row else ""
        lines.append(
            f"| {name} | {row['seconds_per_step']:.3f} | {row['tokens_per_second']:,.0f} "
            f"| {row['share_of_matmul_peak']:.0%} | {row['peak_bytes'] / GIB:.2f} | {ratio} |"
        )
    return "\n".join(lines)


def show_ratios(ratios: list[Row]) -> str:
    """The targets as Markdown."""
    lines = ["| ratio | target | measured | met |", "|---|---:|---:|---|"]
    for ratio in ratios:
        found = "–" if ratio["found"] is None else ratio["found"]
        met = "yes" if ratio["met"] else "no"
        lines.append(f"| {ratio['what']} | {ratio['target']} | {found} | {met} |")
    return "\n".join(lines)
