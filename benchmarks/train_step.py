"""Speed and memory of a training step, against stock Llama under trl and against what the original code does.

    python benchmarks/train_step.py --suite cpu                 the table of benchmarks/README.md
    python benchmarks/train_step.py --suite gpu                 the same at 7B and 13B, on a GPU, in ten minutes
    python benchmarks/train_step.py --shape 7b --method qlora --seq 2048 --batch 1

Weights and tokens are random. Every row of a suite is measured in a process of its own. Who is measured:

    ours    this toolkit's trainer (finetune.train), as `python -m finetune run` uses it
    llama   stock LlamaForCausalLM of the same shape under trl's SFTTrainer with peft
    plain   the same under transformers' Trainer, whole logits: where trl's fused head is the slower one
    naive   a dense ALiBi mask for every head, the head normalised at every step, float32 logits of every
            position: Baichuan 2's original code under transformers' Trainer
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from _common import peak_resident_bytes, reset_peak_resident
from trainers import BUILDERS, WARM_UP_STEPS, recipe_of


def main() -> None:
    """Measure one row, or a suite of them."""
    arguments = parse()
    if arguments.suite:
        import suites

        suites.run(arguments.suite, Path(__file__).name)
        return
    print(json.dumps(measure(arguments)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["cpu", "gpu"], help="all rows of benchmarks/README.md")
    parser.add_argument("--who", choices=["ours", "llama", "plain", "naive"], default="ours")
    parser.add_argument("--shape", choices=["nano", "cpu", "1b", "7b", "13b"], default="nano")
    parser.add_argument("--positions", choices=["rope", "alibi"], help="13b: alibi, others: rope")
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--documents", type=int, default=1, help="documents packed into each row")
    parser.add_argument(
        "--supervised", type=float, default=0.5, help="share of each document that has labels"
    )
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after two to warm up")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--optimizer", default="adamw", help="ours: as in a recipe")
    parser.add_argument(
        "--checkpointing",
        nargs="?",
        const="true",
        default="false",
        choices=["true", "false", "attention", "matmul"],
        help="recompute activations; ours: as in a recipe",
    )
    parser.add_argument("--offload", action="store_true", help="ours: train.activation_offloading")
    parser.add_argument("--compile", action="store_true", help="ours: train.compile")
    parser.add_argument("--kernels", default="auto", help="ours: as in a recipe")
    parser.add_argument("--embeddings", default="full", help="ours: as in a recipe")
    parser.add_argument("--liger", action="store_true", help="llama: Liger's layer kernels")
    parser.add_argument(
        "--fast-matmul", action="store_true", help="peers: multiply on a CPU by the library that ours takes"
    )
    arguments = parser.parse_args()
    arguments.positions = arguments.positions or ("alibi" if arguments.shape == "13b" else "rope")
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: tokens per second, peak memory, FLOP/s and their share of the measured peak."""
    import torch
    from models import config_of, make_naive, random_llama, random_model

    from finetune.baichuan.cpu_matmul import MIN_HIDDEN_SIZE, fast_matmul
    from finetune.baichuan.load import pick_device
    from finetune.quiet import quiet_libraries
    from finetune.train.speed import step_flops

    quiet_libraries()
    device = pick_device()
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    with fast_matmul(MIN_HIDDEN_SIZE, device):
        matmul_peak = measured_matmul_flops(device, dtype)
    quantization = "nf4" if arguments.method == "qlora" else "none"
    config = config_of(arguments.shape, arguments.positions, arguments.seq)
    stock = arguments.who in ("llama", "plain")
    model: Any = (random_llama if stock else random_model)(config, device, dtype, quantization)
    if arguments.who == "naive":
        model = make_naive(model)
    elif stock:
        model.set_attn_implementation("sdpa" if arguments.attention == "auto" else arguments.attention)
    else:
        from finetune.baichuan.attention_choice import choose_attention
        from finetune.baichuan.int8_rows import quantise_embeddings

        chosen = choose_attention(
            arguments.attention, device, dtype, arguments.positions, compiled=arguments.compile
        )
        model.set_attn_implementation(chosen.implementation)
        if arguments.embeddings == "int8":
            quantise_embeddings(model)

    start_memory(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer, prediction = BUILDERS[arguments.who](arguments, model, config, Path(folder))
        timer = Timer(device)
        trainer.add_callback(timer.callback())
        with fast_matmul(config.hidden_size, device) if arguments.fast_matmul else nullcontext():
            trainer.train()
    seconds = statistics.median(timer.seconds[WARM_UP_STEPS:])
    tokens = arguments.seq * arguments.batch
    needed = step_flops(
        recipe_of(arguments, Path()),
        config.to_dict(),
        tokens=tokens,
        document=arguments.seq / arguments.documents,
        supervised=arguments.supervised,
        recomputed=False,
    )
    flops = needed / seconds
    row = {
        **{key: value for key, value in vars(arguments).items() if key != "suite"},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "flops": round(flops),
        "matmul_peak_flops": round(matmul_peak),
        "share_of_matmul_peak": round(flops / matmul_peak, 4),
        "loss": round(trainer.state.log_history[0]["loss"], 4),
        **memory(device),
    }
    if prediction is not None:
        row["predicted_peak_bytes"] = prediction
        row["predicted_over_measured"] = round(prediction / row["peak_bytes"], 3)
    return row


def measured_matmul_flops(device: Any, dtype: Any) -> float:
    """FLOP/s of a large matrix product: what the machine can do at best, on a CPU by the faster library."""
    import torch

    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8 if device.type == "cuda" else 4):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10 if device.type == "cuda" else 1):
            a @ b
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / (10 if device.type == "cuda" else 1))
    return 2 * side**3 / best


def synchronize(device: Any) -> None:
    """Wait for a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def start_memory(device: Any) -> None:
    """Forget what building the model took."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_resident()


def memory(device: Any) -> dict[str, int]:
    """Peaks in bytes: allocated and reserved on a GPU, resident on a CPU."""
    import torch

    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved()
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": reserved}
    return {"peak_bytes": peak_resident_bytes()}


class Timer:
    """Seconds of each optimiser step, from the moment its batch is there."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.seconds: list[float] = []

    def callback(self) -> Any:
        """For transformers' Trainer."""
        from transformers import TrainerCallback

        timer = self

        class _Callback(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                synchronize(timer.device)
                self.start = time.perf_counter()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                synchronize(timer.device)
                timer.seconds.append(time.perf_counter() - self.start)

        return _Callback()


if __name__ == "__main__":
    main()
