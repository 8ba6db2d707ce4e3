"""The attention product of one layer under every implementation that the machine offers.

    python benchmarks/attention.py                 the table of benchmarks/README.md, on the GPU if there is one

Implementation x encoding x (one document | documents of 256 tokens packed) x length: time of forward and
backward together, peak memory beside the inputs, and the error of outputs and gradients against float64. Heads
are 128 wide, one row a batch; float32 on a CPU, bfloat16 on a GPU. All of it through `finetune.baichuan.attend`
and the masks that the model makes, whose making is not counted: a model makes one for all its layers.

    eager                  plain tensor operations, a float mask
    sdpa, mask             torch's fused attention, given a mask: how packed and padded rows used to be computed
    sdpa, one by one       a causal call a document, no mask: `sdpa` on a CPU, its last resort on a GPU
    sdpa                   one call for all documents (torch.nn.attention.varlen)
    flash_attention_2, -3  where installed; ALiBi by alibi_slopes (2), folded into the head dimension (3)
    flex_attention         compiled, a mask by blocks, ALiBi as score_mod
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from _common import (
    peak_resident_bytes,
    release_free_memory,
    reset_peak_resident,
    resident_bytes,
    write_result,
)

DOCUMENT = 256
HEAD_DIM = 128
MIB = 2**20
LENGTHS = {"cpu": (512, 2048), "cuda": (1024, 4096, 16_384)}
HEADS = {"cpu": 4, "cuda": 32}
LARGEST_SCORES = 2**31
"""Heads x length² above which a whole matrix of scores is not asked for."""


def main() -> None:
    """Measure, print the table, save the JSON."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--repeat", type=int, default=9, help="the best counts: others may use the machine")
    arguments = parser.parse_args()
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    heads = arguments.heads or HEADS[name]
    offered = implementations(device)
    rows = []
    for length in arguments.lengths or LENGTHS[name]:
        for encoding in ("rope", "alibi"):
            for packed in (False, True):
                case = Case(device, encoding, packed, length, heads)
                for implementation in offered:
                    row = case.measure(implementation, arguments.repeat)
                    rows.append(row)
                    print(line(row), flush=True)
    print("\n" + table(rows))
    settings = {
        "heads": heads,
        "head_dim": HEAD_DIM,
        "document": DOCUMENT,
        "threads": torch.get_num_threads(),
    }
    saved = write_result(f"attention_{'gpu' if name == 'cuda' else 'cpu'}", {**settings, "rows": rows})
    print(f"\nsaved {saved.name}")


def implementations(device: Any) -> list[str]:
    """Those that this machine can train with."""
    import torch

    from finetune.baichuan.attention_choice import check_attention
    from finetune.errors import UserError

    found = ["eager", "sdpa, mask", "sdpa, one by one"]
    if device.type == "cuda":
        found.append("sdpa")
    for name in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        try:
            check_attention(name, device, torch.bfloat16)
        except UserError as error:
            print(f"left out: {str(error).splitlines()[0]}")
        else:
            found.append(name)
    return found


class Case:
    """One encoding, layout and length: inputs, what float64 makes of them, and the measuring."""

    def __init__(self, device: Any, encoding: str, packed: bool, length: int, heads: int) -> None:
        import torch

        self.device, self.encoding, self.packed, self.length, self.heads = (
            device,
            encoding,
            packed,
            length,
            heads,
        )
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.documents = [DOCUMENT] * (length // DOCUMENT) if packed else [length]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(4, 1, length, heads, HEAD_DIM, generator=generator).to(device, self.dtype)
        *self.inputs, self.weights = drawn.unbind(0)  # in the order in which a projection leaves them
        self.judged = sorted({0, heads // 2, heads - 1})
        self.expected = self.reference()

    def reference(self) -> list[Any]:
        """Output and gradients of some heads in float64, with the bias of the paper, document by document."""
        import torch

        from finetune.baichuan.attention import alibi_slopes

        inputs = [x[0][:, self.judged].double().requires_grad_() for x in self.inputs]
        slopes = alibi_slopes(self.heads).double().to(self.device)[self.judged]
        parts = []
        for q, k, v in zip(*(x.split(self.documents) for x in inputs), strict=True):
            steps = torch.arange(len(q), device=self.device)
            scores = torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5
            if self.encoding == "alibi":
                scores = scores + slopes[:, None, None] * (steps[None] - steps[:, None])
            scores = scores.masked_fill(steps[None] > steps[:, None], float("-inf"))
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        output = torch.cat(parts)
        gradients = torch.autograd.grad(output, inputs, self.weights[0][:, self.judged].double())
        return [output.detach(), *gradients]

    def measure(self, implementation: str, repeat: int) -> dict[str, Any]:
        """Time, memory and errors of an implementation, or why there are none."""
        row = {
            "implementation": implementation,
            "encoding": self.encoding,
            "packed": self.packed,
            "length": self.length,
        }
        if implementation == "eager" and self.heads * self.length**2 > LARGEST_SCORES:
            return {**row, "error": "scores too large"}
        try:
            with variant(implementation) as name:
                return row | self._measure(name, with_mask=implementation.endswith("mask"), repeat=repeat)
        except Exception as error:  # a kernel that fails is a row of the table
            return {**row, "error": (str(error).strip() or type(error).__name__).splitlines()[0][:120]}

    def _measure(self, name: str, *, with_mask: bool, repeat: int) -> dict[str, Any]:
        import torch

        step = self.prepare(name, with_mask=with_mask)
        found = step()
        errors = self.errors(found)
        del found
        seconds = []
        for _ in range(repeat):
            synchronize(self.device)
            start = time.perf_counter()
            step()
            synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            release_free_memory()
            reset_peak_resident()
            before = resident_bytes()
            step()
            peak = peak_resident_bytes() - before
        return {
            "milliseconds": round(min(seconds) * 1e3, 3),
            "peak_mib": round(peak / MIB, 1),
            "output_error": errors[0],
            "gradient_error": max(errors[1:]),
        }

    def prepare(self, name: str, *, with_mask: bool) -> Any:
        """A function that computes output and gradients, the mask or the documents being there already."""
        import torch
        from transformers.masking_utils import create_causal_mask

        from finetune.baichuan import BaichuanConfig
        from finetune.baichuan.attend import attend
        from finetune.baichuan.modeling import BaichuanModel

        config = BaichuanConfig(
            vocab_size=8,
            hidden_size=self.heads * HEAD_DIM,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=self.heads,
            position_embedding=self.encoding,
        )
        model = BaichuanModel(config).to(self.device, self.dtype)
        model.set_attn_implementation(name)
        embeds = torch.empty(1, self.length, 1, device=self.device, dtype=self.dtype)
        positions = torch.cat([torch.arange(n) for n in self.documents])[None].to(self.device)
        mask, documents = model._who_attends(embeds, None, positions, None)
        if with_mask:
            documents = None
            mask = create_causal_mask(
                config=config,
                inputs_embeds=embeds,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
                and_mask_function=lambda *indices: (
                    indices[2] >= 0
                ),  # so that one is made for a whole row, too
            )
        slopes = model.alibi() if self.encoding == "alibi" else None
        layer = model.layers[0].self_attn

        def step() -> list[Any]:
            inputs = [x.detach().requires_grad_() for x in self.inputs]
            output, _ = attend(
                layer,
                *(x.transpose(1, 2) for x in inputs),
                mask,
                scaling=HEAD_DIM**-0.5,
                slopes=slopes,
                key_positions=None if documents is None else positions,
                documents=documents,
            )
            return [output.detach(), *torch.autograd.grad(output, inputs, self.weights)]

        return step

    def errors(self, found: list[Any]) -> list[float]:
        """Relative errors of output and gradients, root mean square."""
        errors = []
        for one, expected in zip(found, self.expected, strict=True):
            difference = one[0][:, self.judged].double() - expected
            relative = float(difference.square().mean().sqrt() / expected.square().mean().sqrt())
            errors.append(float(f"{relative:.2e}"))
        return errors


@contextmanager
def variant(implementation: str) -> Iterator[str]:
    """What transformers calls an implementation; within, SDPA takes documents one by one if that is the row's."""
    from finetune.baichuan import attend

    if implementation != "sdpa, one by one":
        yield implementation.partition(",")[0]
        return
    before = attend.varlen_works
    attend.varlen_works = lambda *_: False  # type: ignore[assignment]
    try:
        yield "sdpa"
    finally:
        attend.varlen_works = before  # type: ignore[assignment]


def synchronize(device: Any) -> None:
    """Wait for a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


HEADER = "| length | encoding | documents | implementation | ms | peak MiB | output error | gradient error |"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    return "\n".join([HEADER, "|---:|---|---|---|---:|---:|---:|---:|", *map(line, rows)])


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    layout = f"packed, {DOCUMENT}" if row["packed"] else "one"
    start = f"| {row['length']:,} | {row['encoding']} | {layout} | {row['implementation']} "
    if "error" in row:
        return f"{start}| {row['error']} | | | |"
    return (
        f"{start}| {row['milliseconds']:,.1f} | {row['peak_mib']:,.0f} "
        f"| {row['output_error']:.0e} | {row['gradient_error']:.0e} |"
    )


if __name__ == "__main__":
    main()
