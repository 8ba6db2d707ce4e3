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
from pathlib import Path
from typing import Any

from _common import peak_resident_bytes, reset_peak_resident

WARM_UP_STEPS = 2
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
TARGETS["plain"] = TARGETS["llama"]
OURS = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    arguments = parser.parse_args()
    arguments.positions = arguments.positions or ("alibi" if arguments.shape == "13b" else "rope")
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: tokens per second, peak memory, FLOP/s and their share of the measured peak."""
    import torch
    from models import config_of, make_naive, random_llama, random_model

    from finetune.quiet import quiet_libraries
    from finetune.train.speed import step_flops

    quiet_libraries()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
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
        build = {"ours": build_ours, "naive": build_naive, "llama": build_trl, "plain": build_plain}
        trainer, prediction = build[arguments.who](arguments, model, config, Path(folder))
        timer = Timer(device)
        trainer.add_callback(timer.callback())
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
    """FLOP/s of a large matrix product: what the machine can do at best."""
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


def rows(arguments: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Random rows: of each document the first part is ignored, the rest learned."""
    import torch

    generator = torch.Generator().manual_seed(0)
    document = arguments.seq // arguments.documents
    ignored = document - round(document * arguments.supervised)
    lengths = [document] * (arguments.documents - 1)
    lengths.append(arguments.seq - sum(lengths))
    made = []
    for _ in range(arguments.batch):
        ids = torch.randint(1100, 100_000, (arguments.seq,), generator=generator).tolist()
        labels: list[int] = []
        for length in lengths:
            start = len(labels)
            labels += [-100] * ignored + ids[start + ignored : start + length]
        made.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    return made * (arguments.steps + WARM_UP_STEPS)


def recipe_of(arguments: argparse.Namespace, folder: Path) -> Any:
    """The row as a recipe of the toolkit."""
    from finetune.recipe.schema import Recipe

    return Recipe.model_validate(
        {
            "name": "benchmark",
            "stage": "sft",
            "model": {
                "base": "random",
                "quantization": "nf4" if arguments.method == "qlora" else "none",
                "attention": arguments.attention,
                "embeddings": arguments.embeddings,
            },
            "adapter": {"rank": arguments.rank, "alpha": 16, "dropout": 0.0},
            "data": {"train": "random", "max_length": arguments.seq, "packing": arguments.documents > 1},
            "train": {
                "max_steps": arguments.steps + WARM_UP_STEPS,
                "batch_size": arguments.batch,
                "gradient_accumulation": 1,
                "gradient_checkpointing": {"true": True, "false": False}.get(
                    arguments.checkpointing, arguments.checkpointing
                ),
                "activation_offloading": arguments.offload,
                "compile": arguments.compile,
                "kernels": arguments.kernels,
                "optimizer": arguments.optimizer,
                "log_every": 100,
                "save_every": 10_000,
            },
            "output_dir": str(folder / "run"),
        }
    )


def build_ours(
    arguments: argparse.Namespace, model: Any, config: Any, folder: Path
) -> tuple[Any, int | None]:
    """The toolkit's own trainer, from a recipe, and the memory it predicts."""
    from datasets import Dataset

    from finetune.adapters.build import attach_adapter
    from finetune.baichuan.load import Base
    from finetune.data.collate import Collator
    from finetune.train.base import prepare_base
    from finetune.train.memory import CONTEXT_BYTES, count_parameters, predict_memory
    from finetune.train.run_folder import RunFolder
    from finetune.train.trainer import AdapterTrainer, training_arguments

    recipe = recipe_of(arguments, folder)
    run = RunFolder(recipe.output_dir)
    run.claim(recipe, resume=False, overwrite=False)
    settings = training_arguments(recipe, run, evaluates=False)
    prepare_base(recipe, model)
    settings.save_strategy = "no"
    data = Dataset.from_list(rows(arguments))
    if arguments.documents == 1:
        data = data.remove_columns("seq_lengths")
    trainer = AdapterTrainer(
        model=attach_adapter(model, recipe.adapter, Base("random", folder, "random")),
        args=settings,
        run=run,
        keep_checkpoints=1,
        train_dataset=data,
        eval_dataset=None,
        data_collator=Collator(pad_token_id=0, places=True),
        processing_class=tokenizer(),
    )
    shape = config.to_dict()
    trainable, _ = count_parameters(recipe, shape)
    prediction = predict_memory(
        recipe, shape, trainable, device_type=model.device.type, longest=arguments.seq
    )
    total = prediction.total
    if model.device.type == "cuda":  # torch counts its own tensors only
        total -= CONTEXT_BYTES["cuda"]
    return trainer, total


def build_trl(arguments: argparse.Namespace, model: Any, config: Any, folder: Path) -> tuple[Any, int | None]:
    """trl's SFTTrainer with peft, as its documentation sets it up."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        **common(arguments, folder), max_length=None, use_liger_kernel=arguments.liger, packing=False
    )
    columns = [{key: row[key] for key in ("input_ids", "labels")} for row in rows(arguments)]
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer(),
        peft_config=lora(arguments),
    ), None


def build_plain(
    arguments: argparse.Namespace, model: Any, config: Any, folder: Path
) -> tuple[Any, int | None]:
    """transformers' Trainer on a peft model: logits of every position at once."""
    return trainer_of_transformers(arguments, model, folder), None


def build_naive(
    arguments: argparse.Namespace, model: Any, config: Any, folder: Path
) -> tuple[Any, int | None]:
    """The original code's step: float32 logits, shifted copies, cross-entropy over every position."""
    from torch.nn.functional import cross_entropy

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits.float()
        shifted = logits[..., :-1, :].contiguous()
        return cross_entropy(shifted.view(-1, config.vocab_size), labels[..., 1:].contiguous().view(-1))

    return trainer_of_transformers(arguments, model, folder, compute_loss_func=loss), None


def trainer_of_transformers(arguments: argparse.Namespace, model: Any, folder: Path, **extra: Any) -> Any:
    """transformers' Trainer with peft and the default collator."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments, default_data_collator

    columns = [{key: row[key] for key in ("input_ids", "labels")} for row in rows(arguments)]
    model.config.use_cache = False
    return Trainer(
        model=get_peft_model(model, lora(arguments)),
        args=TrainingArguments(**common(arguments, folder), remove_unused_columns=False),
        train_dataset=Dataset.from_list(columns),
        data_collator=default_data_collator,
        **extra,
    )


def common(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What all trainers are told alike."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "run"),
        "max_steps": arguments.steps + WARM_UP_STEPS,
        "per_device_train_batch_size": arguments.batch,
        "learning_rate": 2e-4,
        "max_grad_norm": 1.0,
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": arguments.checkpointing != "false",
        "logging_steps": 100,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
        "seed": 42,
    }


def lora(arguments: argparse.Namespace) -> Any:
    """The peers' LoRA: every matrix of the layers, as ours."""
    from peft import LoraConfig

    targets = TARGETS.get(arguments.who, OURS)
    return LoraConfig(
        r=arguments.rank, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )


def tokenizer() -> Any:
    """trl asks for one; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<unk>",
        eos_token="</s>",
    )


if __name__ == "__main__":
    main()
