"""One run of stage `ppo`: the loop around the algorithm, and what remains of it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from transformers import set_seed

from finetune.baichuan.shards import staging
from finetune.files import write_json
from finetune.report import build_report
from finetune.report.model_card import write_model_card
from finetune.report.samples import Sample, read_samples, write_samples
from finetune.report.sections import write_sections
from finetune.train.callbacks import InterruptCallback
from finetune.train.environment import environment, note_training
from finetune.train.peak import peak_memory_bytes
from finetune.train.run_folder import RunFolder, step_of
from rlhf.ppo.build import ACTOR, build_models
from rlhf.ppo.checkpoint import load_checkpoint, save_checkpoint
from rlhf.ppo.engines import make_engine
from rlhf.ppo.errors import RunStopped
from rlhf.ppo.inputs import inputs_of
from rlhf.ppo.monitor import ROLLOUTS_FILE, Monitor
from rlhf.ppo.prompts import spread
from rlhf.ppo.report import curves, rollout_section
from rlhf.ppo.trainer import PPOTrainer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.baichuan.load import Base
    from rlhf.ppo.prompts import Prompt, Prompts
    from rlhf.ppo.recipe import PPORecipe


class Session:
    """What one run works with."""

    def __init__(
        self,
        recipe: PPORecipe,
        folder: RunFolder,
        base: Base,
        tokenizer: Any,
        prompts: Prompts,
        accelerator: Accelerator,
        console: Console,
    ) -> None:
        self.recipe, self.folder, self.base, self.tokenizer = recipe, folder, base, tokenizer
        self.accelerator, self.console = accelerator, console
        self.prompts = prompts
        self.main = accelerator.is_main_process

    def train(self, checkpoint: Path | None) -> Path:
        """From the beginning, or from a checkpoint, to the end; returns the run folder."""
        recipe, ppo = self.recipe, self.recipe.ppo
        models, head, rewards = build_models(
            recipe, self.base, self.tokenizer, batch_size=recipe.train.batch_size
        )
        engine = make_engine(recipe, models, self.base, eos_token_id=self.tokenizer.eos_token_id)
        trainer = PPOTrainer(
            recipe, models, head, rewards, self.tokenizer, self.prompts.train, self.accelerator, engine
        )
        trainer.inputs = inputs_of(recipe, self.prompts.train)
        set_seed((recipe.seed + self.accelerator.process_index) % 2**32)  # each samples something else
        shown = spread(self.prompts.held_out or self.prompts.train, recipe.report.samples)
        samples = self._answer(trainer, shown, "before", resumed=checkpoint is not None)
        if checkpoint is not None:
            load_checkpoint(trainer, checkpoint)
        done = step_of(checkpoint) if checkpoint else 0
        monitor = Monitor(self.folder, recipe, self.console, main=self.main, iteration=done)

        def save() -> Path:
            return save_checkpoint(trainer, self.folder, keep=recipe.train.keep_checkpoints)

        try:
            with InterruptCallback() as interrupt:
                while trainer.iteration < ppo.iterations:
                    numbers, experience = trainer.step()
                    monitor.record(trainer.iteration, trainer.tokens, numbers, experience)
                    last = trainer.iteration == ppo.iterations
                    stop = trainer.processes.any(interrupt.requested) and not last
                    if stop or last or trainer.iteration % (recipe.train.save_every or ppo.iterations) == 0:
                        saved = save()
                    if stop:
                        self._close(trainer, monitor)
                        interruption = KeyboardInterrupt()
                        interruption.checkpoint = saved  # type: ignore[attr-defined]
                        raise interruption
        except RunStopped as error:
            whole = trainer.iteration and not trainer.changed  # between two iterations
            if whole and not (self.folder.checkpoints / f"step-{trainer.iteration}").is_dir():
                save()
            self._close(trainer, monitor)
            kept = max(self.folder.checkpoints.glob("step-*"), key=step_of, default=None)
            where = f"; the last state before it is in {kept}" if kept else ""
            raise type(error)(f"{error.args[0]}{where}", hint=error.hint) from error
        finally:
            monitor.close()
        self._finish(trainer, monitor, shown, samples)
        return self.folder.path

    # ---- what remains ----

    def _answer(
        self,
        trainer: PPOTrainer,
        shown: list[Prompt],
        moment: str,
        samples: list[Sample] | None = None,
        *,
        resumed: bool = False,
    ) -> list[Sample]:
        """The same prompts answered before and after, greedily, with their scores; main process only."""
        if not self.main or not shown:
            return []
        known = read_samples(self.folder.path) if resumed else []
        if known and [each.messages for each in known] == [prompt.messages for prompt in shown]:
            return known
        samples = samples or [Sample(prompt.messages, "") for prompt in shown]
        rollout = trainer.answer(shown, greedy=True)
        answered = [
            trainer.as_answered(prompt, rollout.response_ids(row)) for row, prompt in enumerate(shown)
        ]
        with self.accelerator.autocast():
            scores, _ = trainer.rewards(answered)
        for sample, each, score in zip(samples, answered, scores.tolist()):
            setattr(sample, moment, each.messages[-1]["content"])
            sample.scores[f"reward_{moment}"] = round(score, 4)
        write_samples(self.folder.path, samples)
        return samples

    def _result(self, trainer: PPOTrainer, monitor: Monitor, status: str) -> dict[str, Any]:
        trainable = sum(p.numel() for each in trainer.parameters.values() for p in each.values())
        frozen = sum(p.numel() for p in trainer.models.lm.parameters() if not p.requires_grad)
        window = max(1, min(5, len(monitor.history) // 4))  # one iteration alone is noisy
        outcome: dict[str, Any] = {
            "status": status,
            "base": self.base.identity,
            "steps": trainer.iteration,
            "trainable_parameters": trainable,
            "total_parameters": trainable + frozen,
            "train_seconds": round(monitor.metrics.seconds, 1),
            "tokens": trainer.tokens,
            "measured_peak_memory_bytes": peak_memory_bytes(),
            "warnings": monitor.warnings,
        }
        for key in ("reward", "kl", "response_length") if monitor.history else ():
            for moment, rows in (("first", monitor.history[:window]), ("last", monitor.history[-window:])):
                outcome[f"{key}_{moment}"] = sum(row[key] for row in rows) / len(rows)
        if monitor.history:
            outcome["reward_std_first"] = monitor.history[0]["reward_std"]
        return outcome

    def _close(self, trainer: PPOTrainer, monitor: Monitor) -> None:
        if self.main:
            self._report(self._result(trainer, monitor, "interrupted"))

    def _report(self, result: dict[str, Any]) -> Path:
        """result.json, and the report that it is a part of."""
        write_json(self.folder.path / "result.json", result)
        names = [str(part.name) for part in self.recipe.reward_parts()]
        section = rollout_section(self.folder.path / ROLLOUTS_FILE)
        write_sections(self.folder.path, section, curves=curves(names))
        return build_report(self.folder.path)

    def _finish(
        self, trainer: PPOTrainer, monitor: Monitor, shown: list[Prompt], samples: list[Sample]
    ) -> None:
        """The adapter with its card, result.json, the report, and a few lines."""
        trainer.use_average()
        if self.main:
            self._answer(trainer, shown, "after", samples)
            result = {**self._result(trainer, monitor, "finished"), "adapter": "adapter"}
            shutil.rmtree(self.folder.adapter, ignore_errors=True)
            with staging(self.folder.adapter) as folder:
                trainer.models.save(ACTOR, folder)
                note_training(self.recipe, self.base, folder)
            write_model_card(
                self.folder.adapter,
                {
                    "recipe": yaml.safe_load(self.recipe.dump()),
                    "result": result,
                    "sample_count": len(samples),
                    "environment": environment(),
                    "base_model": self.base.identity,
                },
            )
            self._tell(result, self._report(result))
        self.accelerator.wait_for_everyone()

    def _tell(self, result: dict[str, Any], report: Path) -> None:
        out = Console(highlight=False, soft_wrap=True)
        gain = result["reward_last"] - result["reward_first"]
        spread = result["reward_std_first"]
        deviations = f", {gain / spread:+.1f} deviations of the first rewards" if spread else ""
        out.print(f"reward   {result['reward_first']:.4f} → {result['reward_last']:.4f}{deviations}")
        out.print(f"KL       {result['kl_last']:.2f} nats a response to the reference")
        out.print(
            f"length   {result['response_length_first']:.0f} → {result['response_length_last']:.0f} tokens"
        )
        out.print(f"time     {time.strftime('%H:%M:%S', time.gmtime(result['train_seconds']))}")
        out.print(f"adapter  {self.folder.adapter}")
        out.print(f"report   {report}")
