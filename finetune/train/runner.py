"""A training run from recipe to run folder: the main job, top to bottom."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.errors import UserError
from finetune.files import write_json
from finetune.quiet import quiet_libraries
from finetune.train.environment import environment, note_training, record_environment
from finetune.train.preflight import (
    announce_attention,
    check_machine,
    decide_batch_size,
    describe_data,
    out_of_memory_explained,
    predict,
    with_quantization_of,
)
from finetune.train.run_folder import RunFolder, step_of
from finetune.words import plural

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console

    from finetune.baichuan.load import Base
    from finetune.data import PreparedData
    from finetune.recipe.schema import Recipe
    from finetune.report.samples import Sample
    from finetune.train.adapter_training import AdapterTraining
    from finetune.train.memory import MemoryPrediction


def run_stage(
    recipe: Recipe, *, resume: bool, overwrite: bool, session_class: type[Session] | None = None
) -> Path:
    """Train an adapter as a recipe says and fill its run folder.

    Args:
        recipe: of stage sft or pretrain, or of one that brings its own session.
        resume: continue from the last checkpoint.
        overwrite: replace the run that the folder holds.
        session_class: what differs between stages; None is `Session`, supervised training.

    Returns:
        The run folder.

    Raises:
        UserError: the recipe, the data or the machine does not allow it.
        KeyboardInterrupt: interrupted; attribute ``checkpoint`` names the saved state.
    """
    main = os.environ.get("RANK", "0") == "0"
    console = _console(main)
    run = RunFolder(recipe.output_dir)
    if main:  # before anything slow, even an import
        run.refuse_taken(resume=resume, overwrite=overwrite)
    quiet_libraries()
    from accelerate import PartialState

    state = PartialState(cpu=not _has_cuda())

    from finetune.baichuan.load import load_tokenizer, resolve_base
    from finetune.train.trainer import NotFinite

    kind = session_class or Session

    # What can be refused is refused before anything is written or removed.
    check_machine(recipe, run)
    with state.main_process_first():
        base = resolve_base(recipe.model.base, revision=recipe.model.revision, source=recipe.model.source)
        recipe = kind.settle(recipe, base)
        recipe = decide_batch_size(recipe, base.config, run, resume=resume, sequences=kind.sequences)
        if main:
            run.examine(recipe, resume=resume, overwrite=overwrite)
        if resume and run.is_finished(recipe):
            console.print(f"{run.path}: finished already, nothing to resume", highlight=False)
            return run.path
        tokenizer = load_tokenizer(base.folder)
        data = kind.prepare(recipe, tokenizer)
    describe_data(data, console)
    attention = announce_attention(recipe, base, console)
    prediction, trainable, total = predict(recipe, base, data, console)
    checkpoint = _claim(run, recipe, state, resume=resume, overwrite=overwrite)
    if resume:
        where = (
            f"after step {step_of(checkpoint)}" if checkpoint else "from the beginning, with no checkpoint"
        )
        console.print(f"{run.path}: going on {where}", highlight=False)
    if main:
        write_json(run.path / "data_report.json", data.report.as_dict())
        record_environment(run.path, attention=attention)
    try:
        with out_of_memory_explained(recipe, base, trainable, data):
            session = kind(recipe, run, base, tokenizer, data, console, prediction, (trainable, total))
            return session.train(checkpoint)
    except NotFinite:  # its metrics say how it came to that
        raise
    except UserError:
        if main:
            run.abandon()
        raise


def _claim(run: RunFolder, recipe: Recipe, state: Any, *, resume: bool, overwrite: bool) -> Path | None:
    """The main process claims the folder; the others learn the checkpoint to resume from."""
    if state.is_main_process:
        run.claim(recipe, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    return run.last_checkpoint() if resume else None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _console(main: bool) -> Console:
    from rich.console import Console

    return Console(stderr=True, quiet=not main, soft_wrap=True)


@dataclass
class Session:
    """What one run works with, and what it does: the steps that a stage may do in its own way are methods.

    Attributes:
        recipe: as settled on the base.
        run: its folder.
        base: what is trained on.
        tokenizer: the base's.
        data: from `prepare`.
        console: for progress, on stderr.
        prediction: of peak memory.
        parameters: trainable ones, and all.
    """

    recipe: Recipe
    run: RunFolder
    base: Base
    tokenizer: Any
    data: PreparedData
    console: Console
    prediction: MemoryPrediction
    parameters: tuple[int, int]

    sequences: ClassVar[int] = 1
    """Rows that go through the model for each one that train.batch_size counts, before the data is known."""
    reference_passes: ClassVar[int] = 0
    """Forward passes of a reference beside a step."""

    @classmethod
    def settle(cls, recipe: Recipe, base: Base) -> Recipe:
        """The recipe with everything that the base decides."""
        return with_quantization_of(base, recipe)

    @classmethod
    def prepare(cls, recipe: Recipe, tokenizer: Any) -> PreparedData:
        """Files into what is learned from."""
        from finetune.data import prepare

        return prepare(recipe.data, tokenizer, stage=recipe.stage, seed=recipe.seed, resolve=recipe.resolve)

    def train(self, checkpoint: Path | None) -> Path:
        from finetune.train.callbacks import (
            AlreadyTrained,
            BaselineCallback,
            FiniteCallback,
            InterruptCallback,
            MetricsCallback,
            ProgressCallback,
        )
        from finetune.train.peak import peak_memory_bytes
        from finetune.train.speed import seconds_on_this_machine
        from finetune.train.trainer import NotFinite

        predicted_seconds = None
        if os.environ.get("RANK", "0") == "0":  # one process has the machine to itself, and memory still
            predicted_seconds = seconds_on_this_machine(self.recipe, self.base.config, self.data)
        interrupt = InterruptCallback()
        metrics = MetricsCallback(self.run, resumed_step=step_of(checkpoint) if checkpoint else 0)
        progress, finite = ProgressCallback(metrics), FiniteCallback()
        baseline = BaselineCallback(lambda: self._evaluate_base(trainer, resumed=checkpoint is not None))
        trainer = self.make_trainer([baseline, metrics, progress, finite, interrupt])
        metrics.trainer = finite.trainer = trainer
        main = trainer.is_world_process_zero()
        samples: list[Sample] = []
        try:
            with interrupt:
                samples = self.answer(trainer, moment="before", resumed=checkpoint is not None)
                with contextlib.suppress(AlreadyTrained):
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (NotFinite, KeyboardInterrupt):
            self._close_interrupted(trainer)
            raise
        finally:
            progress.stop()
            metrics.close()
        if interrupt.requested and trainer.state.global_step < trainer.state.max_steps:
            self._close_interrupted(trainer)
            interruption = KeyboardInterrupt()
            interruption.checkpoint = self.run.checkpoints / f"step-{trainer.state.global_step}"  # type: ignore[attr-defined]
            raise interruption

        before, best = baseline.loss, trainer.state.best_global_step
        if best and best != trainer.state.global_step and not trainer.sharded:
            trainer.load_trainable(self.run.checkpoints / f"step-{best}")
        if samples:
            samples = self.answer(trainer, moment="after", samples=samples)
        measured = self.measure(trainer)
        result = {
            "status": "finished",
            "base": self.base.identity,
            "adapter": "adapter",
            "steps": trainer.state.global_step,
            "best_step": best,
            "eval_loss_before": before,
            "eval_loss_after": trainer.state.best_metric,
            "trainable_parameters": self.parameters[0],
            "total_parameters": self.parameters[1],
            "train_seconds": round(metrics.seconds, 1),
            "seconds_per_step": metrics.seconds_per_step,
            "predicted_seconds_per_step": predicted_seconds,
            "tokens": int(metrics.tokens),
            "predicted_peak_memory_bytes": self.prediction.total,
            "measured_peak_memory_bytes": peak_memory_bytes(),
            **measured,
        }
        self._save(trainer, result, samples)
        if main:
            self.tell(result, samples)
        return self.run.path

    def make_trainer(self, callbacks: list[Any]) -> AdapterTraining:
        """Model and trainer; nothing is trained yet."""
        from finetune.adapters.build import attach_adapter, changes_base, save_adapter
        from finetune.data import collator_for
        from finetune.train.base import load_base
        from finetune.train.trainer import AdapterTrainer, training_arguments

        recipe = self.recipe
        arguments = training_arguments(recipe, self.run, evaluates=self.data.validation is not None)
        model = load_base(recipe, self.base)
        from transformers import set_seed

        set_seed(recipe.seed)
        peft_model = attach_adapter(model, recipe.adapter, self.base)
        trainer = AdapterTrainer(
            model=peft_model,
            args=arguments,
            run=self.run,
            keep_checkpoints=recipe.train.keep_checkpoints,
            train_dataset=self.data.train,
            eval_dataset=self.data.validation,
            # P-Tuning lengthens the labels by its vectors, and a row's first token is predicted there.
            data_collator=collator_for(self.tokenizer, places=recipe.adapter.method != "ptuning"),
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )
        keeps_initial = changes_base(recipe.adapter) and trainer.is_world_process_zero()
        if keeps_initial and not self.run.initial_adapter.is_dir():
            save_adapter(peft_model, self.run.initial_adapter)
        return trainer

    def adapter_of(self, trainer: AdapterTraining) -> PeftModel:
        """The model that carries the adapter."""
        return trainer.accelerator.unwrap_model(trainer.model)

    def measure(self, trainer: AdapterTraining) -> dict[str, Any]:
        """What is measured once training is over, on the best weights; goes into result.json."""
        return {}

    def complete_adapter(self, trainer: AdapterTraining, folder: Path) -> None:
        """Add what the stage keeps beside the adapter's weights, in the main process."""

    def _base_alone(self, trainer: AdapterTraining) -> Any:
        """The model without its adapter. A new LoRA changes nothing; prompt vectors are random at first."""
        if self.recipe.adapter.method == "lora":
            return contextlib.nullcontext()
        return self.adapter_of(trainer).disable_adapter()

    def _evaluate_base(self, trainer: AdapterTraining, *, resumed: bool) -> float | None:
        if self.data.validation is None:
            return None
        if resumed:
            for line in self.run.metrics.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if record["step"] == 0 and "eval_loss" in record:
                    return record["eval_loss"]
        with self._base_alone(trainer):
            return trainer.evaluate()["eval_loss"]

    def answer(
        self,
        trainer: AdapterTraining,
        *,
        moment: str,
        samples: list[Sample] | None = None,
        resumed: bool = False,
    ) -> list[Sample]:
        """Answer the chosen held-out prompts and write samples.jsonl; main process only."""
        from finetune.report.samples import read_samples, score_samples, write_samples
        from finetune.train.samples import answer, choose_samples

        if samples is None:
            samples = choose_samples(self.data.held_out, self.recipe.report.samples)
        if not samples or trainer.sharded:
            return []
        if trainer.is_world_process_zero():
            known = read_samples(self.run.path) if resumed else []
            if resumed and [s.messages for s in known] == [s.messages for s in samples]:
                samples = known
            else:
                alone = self._base_alone(trainer) if moment == "before" else contextlib.nullcontext()
                self.console.print(f"answering {plural(len(samples), 'held-out prompt')} ({moment} training)")
                with alone:
                    answers = answer(
                        self.adapter_of(trainer),
                        self.tokenizer,
                        samples,
                        max_new_tokens=self.recipe.report.max_new_tokens,
                    )
                for sample, text in zip(samples, answers):
                    setattr(sample, moment, text)
                write_samples(self.run.path, score_samples(samples))
        trainer.accelerator.wait_for_everyone()
        return samples

    def _close_interrupted(self, trainer: AdapterTraining) -> None:
        if trainer.is_world_process_zero():
            result = {
                "status": "interrupted",
                "base": self.base.identity,
                "steps": trainer.state.global_step,
                "trainable_parameters": self.parameters[0],
                "total_parameters": self.parameters[1],
            }
            write_json(self.run.path / "result.json", result)

    def _save(self, trainer: AdapterTraining, result: dict[str, Any], samples: list[Sample]) -> None:
        """The adapter with its card, result.json and the report; the adapter appears whole."""
        import yaml

        from finetune.adapters.build import changes_base, save_adapter
        from finetune.baichuan.shards import staging
        from finetune.report import build_report
        from finetune.report.model_card import write_model_card
        from finetune.report.samples import mean_scores

        gathered = self.run.path / ".adapter"
        if trainer.sharded:  # every process takes part
            trainer.gather_adapter(gathered, best=result["best_step"])
        if not trainer.is_world_process_zero():
            return
        shutil.rmtree(self.run.adapter, ignore_errors=True)
        recipe = yaml.safe_load(self.recipe.dump())
        info = {
            "recipe": recipe,
            "result": result,
            "scores": mean_scores(samples),
            "sample_count": len(samples),
            "environment": environment(),
            "base_model": self.base.identity,
            "medical": "medical" in json.dumps(recipe["data"], ensure_ascii=False),
        }
        with staging(self.run.adapter) as folder:
            if trainer.sharded:
                for path in gathered.iterdir():
                    path.rename(folder / path.name)
                gathered.rmdir()
            else:
                initial = self.run.initial_adapter if changes_base(self.recipe.adapter) else None
                save_adapter(self.adapter_of(trainer), folder, initial=initial)
                self.complete_adapter(trainer, folder)
            note_training(self.recipe, self.base, folder)
            write_model_card(folder, info)
        write_json(self.run.path / "result.json", result)
        build_report(self.run.path)

    def tell(self, result: dict[str, Any], samples: list[Sample]) -> None:
        """The outcome, on the terminal."""
        from rich.console import Console

        from finetune.report.samples import print_samples_table

        out = Console()
        if samples:
            print_samples_table(samples, out)
        before, after = result["eval_loss_before"], result["eval_loss_after"]
        if before and after:
            out.print(
                f"validation loss  {before:.4f} → {after:.4f}  ({(after - before) / before:+.0%})",
                highlight=False,
            )
        out.print(f"adapter  {self.run.adapter}", highlight=False, soft_wrap=True)
        out.print(f"report   {self.run.path / 'report.html'}", highlight=False, soft_wrap=True)
