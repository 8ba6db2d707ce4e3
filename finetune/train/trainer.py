"""trl's SFT trainer with what Baichuan adapters need: exact averages, whole checkpoints, no bad numbers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer

from finetune.errors import UserError
from finetune.train.run_folder import TRAINABLE_FILE, RunFolder, step_of

if TYPE_CHECKING:
    from datasets import Dataset

    from finetune.recipe.schema import Recipe

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


class NotFinite(UserError):
    """The loss or the gradient is NaN or infinite; the state before it has been saved."""


def training_arguments(recipe: Recipe, run: RunFolder, *, evaluates: bool) -> SFTConfig:
    """transformers' and trl's arguments for a recipe.

    Args:
        recipe: whose train section is translated.
        run: checkpoints go into its checkpoints/ folder.
        evaluates: whether there is held-out data.

    Raises:
        UserError: if the optimiser needs a GPU and there is none.
    """
    train = recipe.train
    cuda = torch.cuda.is_available()
    if train.optimizer != "adamw" and not cuda:
        raise UserError(
            f"train.optimizer: {train.optimizer} needs a GPU, and this machine has none",
            hint="use train.optimizer=adamw",
        )
    warmup = train.warmup_ratio if train.schedule != "constant" else 0
    every_epoch = train.eval_every is None
    save_epoch = train.save_every is None
    return SFTConfig(
        output_dir=str(run.checkpoints),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.eval_batch_size or train.batch_size,
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
        gradient_checkpointing=train.gradient_checkpointing,
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
        average_tokens_across_devices=True,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )


class AdapterTrainer(SFTTrainer):
    """SFT trainer for a frozen Baichuan base with a PEFT adapter.

    - The loss is averaged over supervised tokens, globally: over accumulated batches, over processes, and in
      evaluation over all batches.
    - Adapter parameters stay float32 (trl turns them to bfloat16 on a quantised base, where AdamW's small
      updates round away).
    - A checkpoint is written beside its place and renamed: complete or absent. It holds every trainable
      parameter, which a saved adapter does not (P-Tuning saves the vectors, not the encoder).
    - The optimiser never steps on a gradient that is NaN or infinite.
    """

    def __init__(
        self, *, args: SFTConfig, run: RunFolder, keep_checkpoints: int, eval_dataset: Any, **kwargs: Any
    ) -> None:
        if eval_dataset is not None and args.world_size > 1:
            eval_dataset = _evenly_shared(eval_dataset, args.world_size * args.per_device_eval_batch_size)
        super().__init__(args=args, eval_dataset=eval_dataset, **kwargs)
        self.remove_callback(PrinterCallback)  # our own callbacks speak
        self.run = run
        self.keep_checkpoints = keep_checkpoints
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.tokens_seen: Any = 0  # a tensor on the device once training runs, so that counting needs no sync
        self._eval_sums: list[torch.Tensor] = []
        self._finite: torch.Tensor | None = None

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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; remembers whether every loss so far was a number."""
        loss = super().training_step(*args, **kwargs)
        finite = torch.isfinite(loss)
        self._finite = finite if self._finite is None else self._finite & finite
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the norm tells whether the gradient is one (float16's loss scaling aside)."""
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and not self.args.fp16 and self._finite is not None:
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor under FSDP2
            self._finite = self._finite & torch.isfinite(torch.as_tensor(whole, device=self._finite.device))
        return norm

    def require_finite(self) -> None:
        """Stop before an optimiser step that would spoil the weights.

        Raises:
            NotFinite: after saving the state that the last good step left.
        """
        finite, self._finite = self._finite, None
        if finite is None:
            return
        if self.accelerator.num_processes > 1:  # all stop together
            finite = self.accelerator.reduce((~finite).float(), "sum") == 0
        if bool(finite):
            return
        step = self.state.global_step
        self.optimizer.zero_grad(set_to_none=True)
        if step and not (self.run.checkpoints / f"step-{step}").is_dir():
            self._save_checkpoint(self.model, None)
        saved = f"; the state before it is in {self.run.checkpoints / f'step-{step}'}" if step else ""
        raise NotFinite(
            f"training stopped: the loss or gradient of step {step + 1} is not a number (NaN or infinite){saved}",
            hint="lower train.learning_rate, use model.dtype=bfloat16 instead of float16, and look at the data "
            "of that step; then start again with --overwrite",
        )

    # ---- evaluation, averaged over tokens ----

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        self._eval_sums.append(torch.stack([loss.detach().double() * tokens, tokens.double()]))
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_sums = []
        output = super().evaluation_loop(*args, **kwargs)
        sums = self.accelerator.gather(torch.stack(self._eval_sums).sum(0)[None].float()).sum(0)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = float(sums[0] / sums[1].clamp(min=1))
        return output

    # ---- checkpoints ----

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        if best:
            self.control.should_save = True
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        final = self.run.checkpoints / f"step-{step}"
        staging = self.run.checkpoints / ".writing"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        output_dir, self.args.output_dir = self.args.output_dir, str(staging)
        try:
            Trainer._save_checkpoint(self, model, trial)
        finally:
            self.args.output_dir = output_dir
        written = staging / f"checkpoint-{step}"
        if self.args.should_save and not self.sharded:
            state = {name: p.detach().cpu().contiguous() for name, p in self._trainable()}
            save_file(state, written / TRAINABLE_FILE)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _sync_folder(written)
            shutil.rmtree(final, ignore_errors=True)
            written.rename(final)
            shutil.rmtree(staging, ignore_errors=True)
            self._remove_old_checkpoints()
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        # Under FSDP every process comes here, and only the main one's state_dict is not empty.
        model.save_pretrained(
            output_dir,
            state_dict=state_dict,
            save_embedding_layers=False,
            is_main_process=self.args.should_save,
        )

    def _remove_old_checkpoints(self) -> None:
        folders = sorted(self.run.checkpoints.glob("step-*"), key=step_of)
        best = self.state.best_global_step
        for folder in folders[: -self.keep_checkpoints]:
            if step_of(folder) != best:
                shutil.rmtree(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.load_trainable(Path(resume_from_checkpoint))

    @torch.no_grad()
    def load_trainable(self, checkpoint: Path) -> None:
        """Put a checkpoint's trainable parameters back.

        Raises:
            UserError: if they are not those of this model.
        """
        path = checkpoint / TRAINABLE_FILE
        saved = load_file(path)
        current = dict(self._trainable())
        if saved.keys() != current.keys() or any(saved[k].shape != p.shape for k, p in current.items()):
            raise UserError(
                f"{path}: holds other parameters than this recipe trains",
                hint="the recipe's model or adapter section was changed; start again with --overwrite",
            )
        for name, parameter in current.items():
            parameter.copy_(saved[name])

    def _trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        model = self.accelerator.unwrap_model(self.model)
        return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    @property
    def sharded(self) -> bool:
        """Whether no single process holds every trainable parameter."""
        return self.is_fsdp_enabled or (
            self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        )


def _evenly_shared(dataset: Dataset, multiple: int) -> Dataset:
    """Lengthened with rows in which nothing counts.

    Processes get equally many batches; accelerate fills up with rows from the front, which would count twice.
    """
    from datasets import Dataset, concatenate_datasets

    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    filler = {**dataset[0], "labels": [-100] * len(dataset[0]["labels"])}
    return concatenate_datasets([dataset, Dataset.from_list([filler] * missing, features=dataset.features)])


def _sync_folder(folder: Path) -> None:
    """Have the disk hold the files before the rename says that they are complete."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
