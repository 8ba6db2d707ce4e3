"""The loss over 125,696 words: this toolkit's tiles against what else there is, in time, memory and precision.

    python benchmarks/loss.py            the table of benchmarks/README.md, on this machine's GPU or its CPU
    python benchmarks/loss.py --who trl --hidden 512 --tokens 2048 --supervised 0.5

A row is forward and backward of next-token cross-entropy from hidden states, the head frozen, in a process of its
own. Memory is what the computation adds at its peak; the error of loss and gradient is relative to plain float32
over the same numbers. Who is measured:

    ours    finetune.baichuan.loss.tiled_causal_lm_loss, told where the labels are as in training
    int8    the same with the head's rows in 8 bits (judged over the numbers that it holds)
    plain   all logits, in float32, as transformers has it
    trl     the fused head of trl's trainers
    liger   liger-kernel's FusedLinearCrossEntropy (a GPU)
    cce     cut-cross-entropy (a GPU)
    cce_compile   cut-cross-entropy's fallback, torch.compile of the plain loss
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from _common import in_fresh_process, peak_resident_bytes, reset_peak_resident, resident_bytes, write_result

VOCAB = 125_696
NEEDS = {"liger": "liger_kernel", "cce": "cut_cross_entropy", "cce_compile": "cut_cross_entropy"}
GPU_ONLY = ("liger", "cce")
WHO = ("ours", "int8", "plain", "trl", "liger", "cce", "cce_compile")
SUITE = {
    "cpu": [{"hidden": 512, "tokens": 2048, "supervised": share} for share in (0.5, 1.0)],
    "cuda": [{"hidden": 4096, "tokens": tokens, "supervised": 1.0} for tokens in (4096, 16_384)],
}


def main() -> None:
    """Measure one row, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--who", choices=WHO, help="measure this one only")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--supervised", type=float, default=0.5, help="share of the tokens with a label")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.who:
        print(json.dumps(measure(arguments)))
    else:
        run()


def run() -> None:
    """Every candidate that this machine has, in every setting; prints the table and keeps the JSON."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for setting in SUITE[device]:
        for who in WHO:
            if (who in NEEDS and find_spec(NEEDS[who]) is None) or (who in GPU_ONLY and device == "cpu"):
                continue
            flags = [word for key, value in setting.items() for word in (f"--{key}", str(value))]
            row = in_fresh_process(str(Path(__file__)), ["--who", who, *flags], timeout=300)
            rows.append({"who": who, **setting, **row})
            print(f"{who} {setting}: {row.get('error') or row['seconds']}", flush=True)
    print(f"\n{show(rows)}\n\nsaved {write_result(f'loss_{device}', {'rows': rows}).name}")


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| who | tokens | supervised | seconds | memory, MiB | error of the loss | error of the gradient |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        start = f"| {row['who']} | {row['tokens']:,} | {row['supervised']:.0%} "
        if "error" in row:
            lines.append(f"{start}| {row['error']} | | | |")
            continue
        lines.append(
            f"{start}| {row['seconds']:.3f} | {row['peak_bytes'] / 2**20:,.0f} "
            f"| {row['loss_error']:.1e} | {row['gradient_error']:.1e} |"
        )
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds (median; of processor time on a CPU), memory and errors of one candidate."""
    import torch
    from torch.nn.functional import normalize

    from finetune.baichuan.cpu_matmul import fast_matmul

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    # Hidden states of a trained model point somewhere: likelihoods from next to nothing to nearly one.
    weight = normalize(torch.randn(VOCAB, arguments.hidden, device=device)).to(dtype)
    labels = torch.randint(0, VOCAB, (1, arguments.tokens + 1), device=device)
    sharpness = torch.linspace(0, 20, arguments.tokens, device=device)[:, None]
    toward = weight[labels[0, 1:]].float() * sharpness
    hidden = (torch.randn(arguments.tokens, arguments.hidden, device=device) + toward).to(dtype)[None]
    hidden = torch.cat([hidden, hidden[:, :1]], 1)
    ignored = arguments.tokens - round(arguments.tokens * arguments.supervised)
    labels[0, torch.randperm(arguments.tokens, device=device)[:ignored] + 1] = -100
    compute = candidate(arguments.who, hidden, weight, labels)
    judged = weight
    if arguments.who == "int8":
        scales, integers = compute.keywords["head_scales"], compute.args[0]  # type: ignore[attr-defined]
        judged = integers * scales[:, None]

    def step() -> tuple[Any, Any]:
        leaf = hidden.detach().requires_grad_()
        with fast_matmul(arguments.hidden, device):  # for all alike
            loss = compute(leaf)
            loss.backward()
        return loss.detach(), leaf.grad

    step()  # compiles, tunes, fills caches
    # A CPU that others use too: its own time tells more than the clock's.
    clock = time.perf_counter if cuda else time.process_time
    seconds = []
    start = begin_memory(device)
    for _ in range(arguments.repeats):
        synchronize(device)
        began = clock()
        loss, grad = step()
        synchronize(device)
        seconds.append(clock() - began)
    peak = (torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()) - start
    expected_loss, expected_grad = reference(hidden, judged, labels)
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(statistics.median(seconds), 4),
        "peak_bytes": peak,
        "loss_error": abs(float(loss) / float(expected_loss) - 1),
        "gradient_error": float((grad.float() - expected_grad).norm() / expected_grad.norm()),
    }


def candidate(who: str, hidden: Any, weight: Any, labels: Any) -> Callable[[Any], Any]:
    """A function of the hidden states (1, tokens + 1, hidden_size) that gives the mean loss."""
    from finetune.baichuan.int8_rows import quantise_rows
    from finetune.baichuan.loss import causal_lm_loss, tiled_causal_lm_loss
    from finetune.data.collate import supervised_positions

    targets = labels[0, 1:]
    if who == "ours":
        places = supervised_positions(labels)
        return lambda states: tiled_causal_lm_loss(states, weight, labels, supervised=places)
    if who == "int8":
        integers, scales = quantise_rows(weight)
        places = supervised_positions(labels)

        def with_int8(kept: Any, states: Any, *, head_scales: Any) -> Any:
            return tiled_causal_lm_loss(states, kept, labels, head_scales=head_scales, supervised=places)

        return partial(with_int8, integers, head_scales=scales)
    if who == "plain":
        return lambda states: causal_lm_loss(states @ weight.T, labels)
    if who == "trl":
        model = head_alone(weight)
        return lambda states: model(inputs_embeds=states, labels=labels, fused_lm_head=True).loss
    if who == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        return lambda states: fused(weight, states[0, :-1], targets)
    from cut_cross_entropy import linear_cross_entropy

    kind = "cce" if who == "cce" else "torch_compile"
    return lambda states: linear_cross_entropy(states[0, :-1], weight, targets, impl=kind)


def head_alone(weight: Any) -> Any:
    """A model that is nothing but a head, with trl's fused one."""
    from torch import nn
    from transformers import LlamaConfig
    from trl.trainer.utils import add_fused_lm_head

    class HeadAlone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = LlamaConfig(vocab_size=weight.shape[0], hidden_size=weight.shape[1])
            self.head = nn.Linear(1, 1, bias=False)
            self.head.weight = nn.Parameter(weight, requires_grad=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def base_model(self, *, inputs_embeds: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(
                last_hidden_state=inputs_embeds, past_key_values=None, hidden_states=None, attentions=None
            )

        def forward(self) -> None:
            raise NotImplementedError

    model = HeadAlone()
    add_fused_lm_head(model)  # type: ignore[arg-type]
    return model


def reference(hidden: Any, weight: Any, labels: Any) -> tuple[Any, Any]:
    """Loss and gradient in float32 arithmetic over the same numbers, some positions at a time."""
    import torch
    from torch.nn.functional import cross_entropy

    head, leaf = weight.float(), hidden.float().requires_grad_()
    total = (labels[0, 1:] != -100).sum()
    loss = torch.zeros((), device=hidden.device)
    for start in range(0, leaf.shape[1] - 1, 256):
        end = min(start + 256, leaf.shape[1] - 1)
        part = (
            cross_entropy(leaf[0, start:end] @ head.T, labels[0, start + 1 : end + 1], reduction="sum")
            / total
        )
        part.backward()
        loss += part.detach()
    return loss, leaf.grad


def begin_memory(device: Any) -> int:
    """Forget past peaks; what is in use now, in bytes."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    reset_peak_resident()
    return resident_bytes()


def synchronize(device: Any) -> None:
    """Wait for a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
