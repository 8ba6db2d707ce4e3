"""Trainers of `benchmarks/train_step.py`: the toolkit's, trl's, transformers', the original code's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 2
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
TARGETS["plain"] = TARGETS["llama"]
OURS = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    from finetune.train.callbacks import FiniteCallback
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
    finite = FiniteCallback()
    trainer = finite.trainer = AdapterTrainer(
        model=attach_adapter(model, recipe.adapter, Base("random", folder, "random")),
        args=settings,
        run=run,
        keep_checkpoints=1,
        train_dataset=data,
        eval_dataset=None,
        data_collator=Collator(pad_token_id=0, places=True),
        processing_class=tokenizer(),
        callbacks=[finite],
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

    settings = settings_of(
        SFTConfig, arguments, folder, max_length=None, use_liger_kernel=arguments.liger, packing=False
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
        args=settings_of(TrainingArguments, arguments, folder, remove_unused_columns=False),
        train_dataset=Dataset.from_list(columns),
        data_collator=default_data_collator,
        **extra,
    )


def settings_of(kind: Any, arguments: argparse.Namespace, folder: Path, **more: Any) -> Any:
    """What the peers' trainers are told alike, and what one of them is told beside it."""
    import torch

    cuda = torch.cuda.is_available()
    settings = kind(
        output_dir=str(folder / "run"),
        max_steps=arguments.steps + WARM_UP_STEPS,
        per_device_train_batch_size=arguments.batch,
        learning_rate=2e-4,
        max_grad_norm=1.0,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=arguments.checkpointing != "false",
        logging_steps=100,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        seed=42,
        **more,
    )
    settings._n_gpu = min(1, settings.n_gpu)  # as ours: transformers would split a batch over all GPUs
    return settings


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


BUILDERS = {"ours": build_ours, "naive": build_naive, "llama": build_trl, "plain": build_plain}
"""By ``--who``: (arguments, model, config, folder) → trainer and, for ours, the memory it predicts."""
