"""oneDNN against MKL: float32 products of a training step on a CPU, by hidden size.

    python benchmarks/matmul.py            # two minutes

For each hidden size: GFLOP/s of one large product with either library; and how much faster oneDNN is in the
forward and backward pass of a chain of LoRA layers, over rows that are all of one length, and of ever new lengths,
for each of which it makes kernels first. What `finetune.baichuan.cpu_matmul.MIN_HIDDEN_SIZE` is chosen by.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from _common import write_result
from torch import nn

from finetune.baichuan.cpu_matmul import matmul_error

SIZES = (256, 512, 1024, 2048)
LAYERS, RANK, STEPS = 4, 16, 6
SETTINGS = {"MKL": "none", "oneDNN": "bf16"}
"""By library, torch.backends.mkldnn.matmul.fp32_precision."""


def main() -> None:
    """Measure, print a table, keep the JSON."""
    rows = [measure(size) for size in SIZES]
    print(
        "| hidden size | MKL, GFLOP/s | oneDNN, GFLOP/s | product | layers, one length | layers, new lengths |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['hidden_size']:,} | {row['gflops']['MKL']:.0f} | {row['gflops']['oneDNN']:.0f} "
            f"| {row['product']:.2f} | {row['one_length']:.2f} | {row['new_lengths']:.2f} |"
        )
    errors = {name: multiplied_by(name, matmul_error) for name in SETTINGS}
    print(", ".join(f"{name} is off by {error:.1e}" for name, error in errors.items()))
    result = {"threads": torch.get_num_threads(), "rows": rows, "relative_error": errors}
    print(f"saved {write_result('matmul_cpu', result).name}")


def measure(hidden_size: int) -> dict[str, Any]:
    """Speed of oneDNN as a multiple of MKL's, the libraries taking turns."""
    torch.manual_seed(0)
    a, b = torch.randn(2048, hidden_size), torch.randn(hidden_size, 4 * hidden_size)
    layers = [Layer(hidden_size) for _ in range(LAYERS)]
    lengths = random.Random(0).sample(range(600, 1400), 2 * STEPS * 3)
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in SETTINGS} for kind in ("product", "one_length", "new_lengths")
    }
    for turn in range(3):
        for at, name in enumerate(SETTINGS):
            fresh = lengths[(2 * turn + at) * STEPS :][:STEPS]
            seconds["product"][name].append(multiplied_by(name, lambda: timed(lambda: a @ b, 5)))
            for kind, chosen in (("one_length", [1000] * STEPS), ("new_lengths", fresh)):
                seconds[kind][name].append(multiplied_by(name, lambda chosen=chosen: steps(layers, chosen)))
    best = {kind: {name: min(found) for name, found in each.items()} for kind, each in seconds.items()}
    flops = 2 * a.shape[0] * b.numel()
    return {
        "hidden_size": hidden_size,
        "gflops": {name: round(flops / found / 1e9, 1) for name, found in best["product"].items()},
        **{kind: round(found["MKL"] / found["oneDNN"], 3) for kind, found in best.items()},
    }


class Layer(nn.Module):
    """A frozen matrix with LoRA beside it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.base = nn.Linear(hidden_size, hidden_size, bias=False).requires_grad_(False)
        self.down = nn.Linear(hidden_size, RANK, bias=False)
        self.up = nn.Linear(RANK, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def steps(layers: Sequence[Layer], lengths: Sequence[int]) -> float:
    """Seconds of a token, forward and backward over rows of these lengths."""

    def run() -> None:
        for length in lengths:
            hidden = torch.ones(length, layers[0].base.in_features)
            for layer in layers:
                hidden = layer(hidden)
            hidden.sum().backward()

    return timed(run, 1) / sum(lengths)


def timed(work: Any, times: int) -> float:
    """Seconds of the fastest of several runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def multiplied_by(library: str, work: Any) -> Any:
    """What the work returns, its matrices multiplied by a library."""
    torch.backends.mkldnn.matmul.fp32_precision = SETTINGS[library]
    try:
        return work()
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


if __name__ == "__main__":
    main()
