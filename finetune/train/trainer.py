"""trl's SFT trainer with what Baichuan adapters need, and a recipe as the arguments of a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from finetune.baichuan.chat import IGNORE_INDEX
from finetune.train.adapter_training import AdapterTraining, NotFinite
from finetune.train.base import check_gpu_settings
from finetune.train.run_folder import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset

    from finetune.recipe.schema import Recipe

__all__ = ["AdapterTrainer", "NotFinite", "arguments_for", "training_arguments"]

Arguments = TypeVar("Arguments", bound=TrainingArguments)

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",  # takes a flag on the device: finetune/train/finite.py
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def training_arguments(recipe: Recipe, run: RunFolder, *, evaluates: bool) -> SFTConfig:
    """trl's arguments of supervised training for a recipe; see `arguments_for`."""
    return arguments_for(
        SFTConfig,
        recipe,
        run,
        evaluates=evaluates,
        average_tokens_across_devices=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )


def arguments_for(
    kind: type[Arguments], recipe: Recipe, run: RunFolder, *, evaluates: bool, **more: Any
) -> Arguments:
    """transformers' arguments for a recipe, whatever the trainer.

    Args:
        kind: transformers' TrainingArguments, or one of trl's that add to them.
        recipe: whose train section is translated.
        run: checkpoints go into its checkpoints/ folder.
        evaluates: whether there is held-out data.
        more: arguments that only this kind has.

    Raises:
        UserError: if the recipe needs a GPU and there is none.
    """
    train = recipe.train
    cuda = torch.cuda.is_available()
    check_gpu_settings(train)
    warmup = train.warmup_ratio if train.schedule != "constant" else 0
    every_epoch = train.eval_every is None
    save_epoch = train.save_every is None
    arguments = kind(
        output_dir=str(run.checkpoints),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=max(1, train.batch_size),  # auto is decided later
        per_device_eval_batch_size=train.eval_batch_size or max(1, train.batch_size),
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        # Below 1 it is a share of all steps, from 1 on a number of steps.
        warmup_steps=min(warmup, 0.9999),
        optim=OPTIMIZERS[train.optimizer],
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=bool(
            train.gradient_checkpointing
        ),  # what is kept: the model's `checkpointing`
        bf16=cuda and recipe.model.dtype == "bfloat16",
        fp16=cuda and recipe.model.dtype == "float16",
        use_cpu=not cuda,
        eval_strategy=("epoch" if every_epoch else "steps") if evaluates else "no",
        eval_steps=train.eval_every,
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False,
        save_strategy="epoch" if save_epoch else "steps",
        save_steps=train.save_every or 500,
        logging_strategy="steps",
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        accelerator_config={"non_blocking": cuda},  # a batch goes to the device while that is at work
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    # Without a launcher transformers splits a batch over all GPUs (DataParallel), places of labels and all.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class AdapterTrainer(AdapterTraining, SFTTrainer):
    """SFT trainer for a frozen Baichuan base with a PEFT adapter.

    The loss is averaged over supervised tokens, globally: over accumulated batches, over processes, and in
    evaluation over all batches.
    """

    def __init__(self, *, args: SFTConfig, eval_dataset: Any, **kwargs: Any) -> None:
        if eval_dataset is not None and args.world_size > 1:
            eval_dataset = _evenly_shared(eval_dataset, args.world_size * args.per_device_eval_batch_size)
        super().__init__(args=args, eval_dataset=eval_dataset, **kwargs)
        self._eval_sums: list[torch.Tensor] = []

    # ---- loss ----

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of supervised tokens (max-z added if the recipe wants it), logits in tiles."""
        # A sharded head is whole only within its own forward, where the tiled loss cannot read it.
        inputs = {**inputs, "use_cache": False, "skip_logits": not self.sharded}
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.model.training:
            real = inputs["labels"].numel()
            if inputs.get("attention_mask") is not None:
                real = inputs["attention_mask"].sum()
            self.tokens_seen = self.tokens_seen + real
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation, averaged over tokens ----

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        self._eval_sums.append(torch.stack([loss.detach().double() * tokens, tokens.double()]))
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_sums = []
        output = super().evaluation_loop(*args, **kwargs)
        sums = self.accelerator.gather(torch.stack(self._eval_sums).sum(0)[None].float()).sum(0)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = float(sums[0] / sums[1].clamp(min=1))
        return output


def _evenly_shared(dataset: Dataset, multiple: int) -> Dataset:
    """Lengthened with rows in which nothing counts.

    Processes get equally many batches; accelerate fills up with rows from the front, which would count twice.
    """
    from datasets import Dataset, concatenate_datasets

    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    filler = {**dataset[0], "labels": [IGNORE_INDEX] * len(dataset[0]["labels"])}
    return concatenate_datasets([dataset, Dataset.from_list([filler] * missing, features=dataset.features)])
