"""A training run from recipe to run folder: the main job, top to bottom."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.train.run_folder import RunFolder, step_of, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.baichuan.load import Base
    from finetune.data import PreparedData
    from finetune.recipe.schema import Recipe
    from finetune.report.samples import Sample
    from finetune.train.memory import MemoryPrediction
    from finetune.train.trainer import AdapterTrainer

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "evaluate")


def run_stage(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path:
    """Train an adapter as a recipe says and fill its run folder.

    Args:
        recipe: of stage sft or pretrain.
        resume: continue from the last checkpoint.
        overwrite: replace the run that the folder holds.

    Returns:
        The run folder.

    Raises:
        UserError: the recipe, the data or the machine does not allow it.
        KeyboardInterrupt: interrupted; attribute ``checkpoint`` names the saved state.
    """
    quiet_libraries()
    from accelerate import PartialState

    state = PartialState(cpu=not _has_cuda())
    console = _console(state.is_main_process)
    run = RunFolder(recipe.output_dir)
    done = run.result() if resume else {}
    if done.get("status") == "finished":
        console.print(f"{run.path}: finished already, nothing to resume", highlight=False)
        return run.path

    from finetune.baichuan.load import load_tokenizer, resolve_base
    from finetune.data import prepare
    from finetune.train.trainer import NotFinite

    # What can be refused is refused before the slow part, and before anything is written or removed.
    if state.is_main_process:
        run.examine(recipe, resume=resume, overwrite=overwrite)
    check_machine(recipe, run)
    with state.main_process_first():
        base = resolve_base(recipe.model.base, revision=recipe.model.revision, source=recipe.model.source)
        recipe = with_quantization_of(base, recipe)
        tokenizer = load_tokenizer(base.folder)
        data = prepare(recipe.data, tokenizer, stage=recipe.stage, seed=recipe.seed, resolve=recipe.resolve)
    describe_data(data, console)
    prediction, trainable, total = predict(recipe, base, data, console)
    checkpoint = _claim(run, recipe, state, resume=resume, overwrite=overwrite)
    if state.is_main_process:
        write_json(run.path / "data_report.json", data.report.as_dict())
        write_json(run.path / "environment.json", environment())
    try:
        with out_of_memory_explained(recipe, base, trainable):
            session = _Session(recipe, run, base, tokenizer, data, console, prediction, (trainable, total))
            return session.train(checkpoint)
    except NotFinite:  # its metrics say how it came to that
        raise
    except UserError:
        if state.is_main_process:
            run.abandon()
        raise


def with_quantization_of(base: Base, recipe: Recipe) -> Recipe:
    """The recipe as it is on this base: a release that is quantised already is what it is.

    Raises:
        UserError: the recipe asks for another quantisation, or for what does not go with this one.
    """
    if not base.quantized:
        return recipe
    wanted, found = recipe.model.quantization, base.quantization
    if wanted not in ("none", found):
        raise UserError(
            f"model.quantization: found {wanted}, but the weights of {base.name} are {found} already",
            hint=f"set model.quantization to {found}, or take the 16-bit release",
        )
    from finetune.recipe.combinations import find

    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": found})})
    problems = find(recipe)
    if problems:
        listed = "; ".join(f"{key}: {reason}" for key, reason in problems)
        raise UserError(f"with {base.name}, which is {found} already: {listed}")
    return recipe


def check_machine(recipe: Recipe, run: RunFolder) -> None:
    """Refuse settings that this machine cannot serve.

    Raises:
        UserError: naming the setting.
    """
    from finetune.adapters.build import check_device
    from finetune.baichuan.load import choose_attention, pick_device
    from finetune.train.trainer import training_arguments

    check_device(recipe.adapter)
    choose_attention(recipe.model.attention, pick_device())
    training_arguments(recipe, run, evaluates=False)


def _claim(run: RunFolder, recipe: Recipe, state: Any, *, resume: bool, overwrite: bool) -> Path | None:
    """The main process claims the folder; the others learn the checkpoint to resume from."""
    if state.is_main_process:
        run.claim(recipe, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    return run.last_checkpoint() if resume else None


@dataclass
class _Session:
    """What one run works with."""

    recipe: Recipe
    run: RunFolder
    base: Base
    tokenizer: Any
    data: PreparedData
    console: Console
    prediction: MemoryPrediction
    parameters: tuple[int, int]

    def train(self, checkpoint: Path | None) -> Path:
        from finetune.train.callbacks import (
            AlreadyTrained,
            BaselineCallback,
            FiniteCallback,
            InterruptCallback,
            MetricsCallback,
            ProgressCallback,
            peak_memory_bytes,
        )
        from finetune.train.trainer import NotFinite

        start = time.monotonic()
        interrupt = InterruptCallback()
        metrics = MetricsCallback(self.run, resumed_step=step_of(checkpoint) if checkpoint else 0)
        progress, finite = ProgressCallback(metrics), FiniteCallback()
        baseline = BaselineCallback(lambda: self._evaluate_base(trainer, resumed=checkpoint is not None))
        trainer = self._trainer([baseline, metrics, progress, finite, interrupt])
        metrics.trainer = finite.trainer = trainer
        main = trainer.is_world_process_zero()
        samples: list[Sample] = []
        try:
            with interrupt:
                samples = self._answer(trainer, moment="before", resumed=checkpoint is not None)
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
        if best and best != trainer.state.global_step and not trainer.sharded:  # there, the last is kept
            trainer.load_trainable(self.run.checkpoints / f"step-{best}")
        if samples:
            samples = self._answer(trainer, moment="after", samples=samples)
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
            "train_seconds": round(time.monotonic() - start, 1),
            "tokens": int(metrics.tokens),
            "predicted_peak_memory_bytes": self.prediction.total,
            "measured_peak_memory_bytes": peak_memory_bytes(),
        }
        self._save(trainer, result, samples)
        if main:
            self._tell(result, samples)
        return self.run.path

    def _trainer(self, callbacks: list[Any]) -> AdapterTrainer:
        from finetune.adapters.build import attach_adapter, changes_base, save_adapter
        from finetune.baichuan.load import load_model
        from finetune.data import collator_for
        from finetune.train.trainer import AdapterTrainer, training_arguments

        recipe = self.recipe
        arguments = training_arguments(recipe, self.run, evaluates=self.data.validation is not None)
        model = load_model(recipe.model, self.base)
        model.config.z_loss_weight = recipe.train.z_loss_weight
        model.config.use_cache = False
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
            data_collator=collator_for(self.tokenizer),
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )
        keeps_initial = changes_base(recipe.adapter) and trainer.is_world_process_zero()
        if keeps_initial and not self.run.initial_adapter.is_dir():
            save_adapter(peft_model, self.run.initial_adapter)
        return trainer

    def _base_alone(self, trainer: AdapterTrainer) -> Any:
        """The model without its adapter. A new LoRA changes nothing; prompt vectors are random at first."""
        if self.recipe.adapter.method == "lora":
            return contextlib.nullcontext()
        return trainer.accelerator.unwrap_model(trainer.model).disable_adapter()

    def _evaluate_base(self, trainer: AdapterTrainer, *, resumed: bool) -> float | None:
        if self.data.validation is None:
            return None
        if resumed:
            for line in self.run.metrics.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if record["step"] == 0 and "eval_loss" in record:
                    return record["eval_loss"]
        with self._base_alone(trainer):
            return trainer.evaluate()["eval_loss"]

    def _answer(
        self,
        trainer: AdapterTrainer,
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
                self.console.print(f"answering {len(samples)} held-out prompts ({moment} training)")
                with alone:
                    model = trainer.accelerator.unwrap_model(trainer.model)
                    answers = answer(
                        model, self.tokenizer, samples, max_new_tokens=self.recipe.report.max_new_tokens
                    )
                for sample, text in zip(samples, answers):
                    setattr(sample, moment, text)
                write_samples(self.run.path, score_samples(samples))
        trainer.accelerator.wait_for_everyone()
        return samples

    def _close_interrupted(self, trainer: AdapterTrainer) -> None:
        if trainer.is_world_process_zero():
            result = {
                "status": "interrupted",
                "base": self.base.identity,
                "steps": trainer.state.global_step,
                "trainable_parameters": self.parameters[0],
                "total_parameters": self.parameters[1],
            }
            write_json(self.run.path / "result.json", result)

    def _save(self, trainer: AdapterTrainer, result: dict[str, Any], samples: list[Sample]) -> None:
        """The adapter with its card, result.json and the report; the adapter appears whole."""
        import yaml

        from finetune.adapters.build import changes_base, save_adapter
        from finetune.adapters.merge import staging
        from finetune.report import build_report
        from finetune.report.model_card import write_model_card
        from finetune.report.samples import mean_scores

        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.sharded:  # every process takes part in gathering the adapter
            trainer.save_model(str(self.run.adapter))
        if not trainer.is_world_process_zero():
            return
        if not trainer.sharded:
            import shutil

            shutil.rmtree(self.run.adapter, ignore_errors=True)
            initial = self.run.initial_adapter if changes_base(self.recipe.adapter) else None
            with staging(self.run.adapter) as folder:
                save_adapter(model, folder, initial=initial)
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
        write_model_card(self.run.adapter, info)
        write_json(self.run.path / "result.json", result)
        build_report(self.run.path)

    def _tell(self, result: dict[str, Any], samples: list[Sample]) -> None:
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


def predict(
    recipe: Recipe, base: Base, data: PreparedData, console: Console
) -> tuple[MemoryPrediction, int, int]:
    """Count parameters, predict memory, say both.

    Raises:
        UserError: if the frozen weights alone exceed the GPU's memory.
    """
    import torch

    from finetune.train.memory import GIB, MemoryPrediction, count_parameters, predict_memory

    config = base.config
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    trainable, total = count_parameters(recipe, config)
    longest = max((len(ids) for ids in data.train["input_ids"]), default=0)
    prediction = predict_memory(recipe, config, trainable, device_type=device_type, longest=longest)
    processes = _processes_that_share_the_base()
    if processes > 1:
        weights = prediction.parts["weights"] // processes
        prediction = MemoryPrediction({**prediction.parts, "weights": weights}, device_type)
    share = trainable / total
    console.print(
        f"trainable parameters: {trainable:,} of {total:,} ({share:.2%})\npredicted peak memory: {prediction}",
        highlight=False,
    )
    if device_type == "cuda":
        card = torch.cuda.get_device_properties(0).total_memory
        if prediction.parts["weights"] > card:
            raise UserError(
                f"not enough memory: the weights of {base.name} take "
                f"{prediction.parts['weights'] / GIB:.1f} GiB, the GPU has {card / GIB:.1f} GiB",
                hint=_advice(recipe, config, trainable, card, longest),
            )
        if prediction.total > card:
            console.print(f"this may not fit the GPU's {card / GIB:.1f} GiB", style="yellow", highlight=False)
    return prediction, trainable, total


def _processes_that_share_the_base() -> int:
    """Over how many GPUs FSDP or ZeRO-3 cut the weights; 1 if each holds them whole."""
    from finetune.baichuan.load import base_is_sharded

    return int(os.environ.get("WORLD_SIZE", "1")) if base_is_sharded() else 1


def _advice(recipe: Recipe, config: dict[str, Any], trainable: int, budget: int, longest: int | None) -> str:
    from finetune.train.memory import suggestions

    found = suggestions(recipe, config, trainable, budget, longest=longest)
    return "try " + ", or ".join(found) if found else "use a smaller base or a GPU with more memory"


@contextlib.contextmanager
def out_of_memory_explained(recipe: Recipe, base: Base, trainable: int) -> Iterator[None]:
    """Turn a GPU that is out of memory into a message that says what to lower."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        from finetune.train.memory import GIB, predict_memory

        card = torch.cuda.get_device_properties(0).total_memory
        prediction = predict_memory(recipe, base.config, trainable, device_type="cuda")
        gc.collect()
        raise UserError(
            f"the GPU ({card / GIB:.1f} GiB) is out of memory; the run was predicted to take {prediction}",
            hint=_advice(recipe, base.config, trainable, card, None),
        ) from error


def describe_data(data: PreparedData, console: Console) -> None:
    """What was found in the data, in a few lines."""
    for file in data.report.files:
        kept = f"{file.kept:,} of {file.rows:,} rows" if file.bad else f"{file.rows:,} rows"
        console.print(
            f"{file.split}: {file.file}: {kept}, layout {file.format}", highlight=False, soft_wrap=True
        )
    for row in data.report.bad_rows[:10]:
        console.print(f"  left out: {row}", highlight=False, markup=False, soft_wrap=True)
    if len(data.report.bad_rows) > 10:
        console.print(f"  and {len(data.report.bad_rows) - 10} more, all listed in data_report.json")
    for warning in data.report.warnings:
        console.print(f"note: {warning}", style="yellow", highlight=False, markup=False)


def environment() -> dict[str, Any]:
    """Versions, devices and the command line, for environment.json."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from finetune import __version__

    versions = {"baichuan2-finetune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": versions,
    }


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _console(main: bool) -> Console:
    from rich.console import Console

    return Console(stderr=True, quiet=not main, soft_wrap=True)


def quiet_libraries() -> None:
    """Leave the terminal to our own messages."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"torch|peft|trl|transformers|bitsandbytes")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "trl", "peft", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
