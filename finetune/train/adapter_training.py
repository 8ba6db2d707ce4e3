"""What every trainer of an adapter has, whatever its loss: whole checkpoints, and no bad numbers."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer

from finetune.baichuan.cpu_matmul import fast_matmul
from finetune.errors import UserError
from finetune.files import give_usual_modes
from finetune.train.finite import FiniteGuard
from finetune.train.run_folder import TRAINABLE_FILE, RunFolder, step_of


class NotFinite(UserError):
    """The loss or the gradient is NaN or infinite; the state before it has been saved, where it still was there."""


class AdapterTraining(Trainer):
    """To be put before a transformers or trl trainer among the bases of a class.

    - Adapter parameters stay float32 (trl turns them to bfloat16 on a quantised base, where AdamW's small
      updates round away).
    - A checkpoint is written beside its place and renamed: complete or absent. It holds every trainable
      parameter, which a saved adapter does not (P-Tuning saves the vectors, not the encoder).
    - The optimiser never steps on a gradient that is NaN or infinite; where DeepSpeed's may have, nothing is saved.

    Attributes:
        tokens_seen: tokens trained on in this process, counted by `compute_loss`.
    """

    def __init__(self, *, run: RunFolder, keep_checkpoints: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)  # our own callbacks speak
        self.run = run
        self.keep_checkpoints = keep_checkpoints
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.tokens_seen: Any = 0  # a tensor on the device once training runs, so that counting needs no sync
        self._guard = FiniteGuard(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, products by the faster library of a CPU."""
        with self._fast_matmul():
            return super().train(*args, **kwargs)

    def compute_loss_context_manager(self) -> Any:
        """As in transformers; evaluation outside of training multiplies as within it."""
        contexts = contextlib.ExitStack()
        contexts.enter_context(self._fast_matmul())
        contexts.enter_context(super().compute_loss_context_manager())
        return contexts

    def _fast_matmul(self) -> contextlib.AbstractContextManager[None]:
        config = self.accelerator.unwrap_model(self.model).config
        width = config["hidden_size"] if isinstance(config, dict) else config.hidden_size
        return fast_matmul(width, self.args.device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; remembers whether every loss so far was a number."""
        loss = super().training_step(*args, **kwargs)
        self._guard.saw(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the norm tells whether the gradient is a number (float16's loss scaling aside)."""
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and not self.args.fp16:
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's is a DTensor
            number = torch.as_tensor(whole, device=self.args.device)
            # DeepSpeed's is a float, and -1 where the gradient is not a number.
            self._guard.saw(number.masked_fill(number < 0, torch.nan))
        if self.is_deepspeed_enabled:  # some versions name a norm all the same, and have stepped by now
            for _, parameter in self._trainable():
                self._guard.saw(getattr(parameter, "ds_tensor", parameter).sum())
        return norm

    def before_optimizer_step(self) -> None:
        """Have the optimiser not step on bad numbers.

        Raises:
            NotFinite: see `require_finite`.
        """
        if not self._guard.before_step():
            self._stop_at_bad_numbers()

    def require_finite(self) -> None:
        """Stop if there was a step that would have spoiled the weights; waits for the device.

        Raises:
            NotFinite: after saving the state that the last good step left, unless DeepSpeed has changed it.
        """
        if not self._guard.all_sound():
            self._stop_at_bad_numbers()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate:
            self.require_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _stop_at_bad_numbers(self) -> NoReturn:
        step = self.state.global_step
        self.optimizer.zero_grad(set_to_none=True)
        if self.is_deepspeed_enabled:  # its engine steps at the end of accelerate's backward pass
            last = self.run.last_checkpoint()
            saved = (
                f"; DeepSpeed may have taken it by then, the last checkpoint before it is {last or 'none'}"
            )
        elif step:
            state = self.run.checkpoints / f"step-{step}"
            if not state.is_dir():
                self._save_checkpoint(self.model, None)
            saved = f"; the state before it is in {state}"
        else:
            saved = ""
        raise NotFinite(
            f"training stopped: the loss or gradient of step {step + 1} is not a number (NaN or infinite){saved}",
            hint="lower train.learning_rate, use model.dtype=bfloat16 instead of float16, and look at the data "
            "of that step; then start again with --overwrite",
        )

    # ---- checkpoints ----

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        if best:
            self.control.should_save = True
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Parameters twice, as the adapter and as all that is trained, and two moments of each.
        needed = 4 * sum(p.nbytes for _, p in self._trainable())
        with self.run.writing(needed) as staging:
            self._write_checkpoint(model, trial, staging)

    def _write_checkpoint(self, model: Any, trial: Any, staging: Path) -> None:
        step = self.state.global_step
        final = self.run.checkpoints / f"step-{step}"
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
            selected_adapters=["default"],
            is_main_process=self.args.should_save,
        )
        if self.args.should_save and output_dir is not None:
            give_usual_modes(Path(output_dir))

    def gather_adapter(self, folder: Path, *, best: int | None) -> None:
        """Write the adapter where no process holds all of it: that of the best step, or the last one.

        Args:
            folder: where to.
            best: step of the lowest validation loss; None where nothing was validated.
        """
        if not best or best == self.state.global_step:
            self.save_model(str(folder))
        elif self.args.should_save:  # its checkpoint was gathered when it was saved
            folder.mkdir(exist_ok=True)
            for path in (self.run.checkpoints / f"step-{best}").glob("adapter_*"):
                shutil.copyfile(path, folder / path.name)

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


def _sync_folder(folder: Path) -> None:
    """Have the disk hold the files before the rename says that they are complete."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
