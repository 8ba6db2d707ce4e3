"""Stage `reward`: a reward model from ranked responses."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.check import check_training, plan_by_shapes
from finetune.files import write_json
from finetune.report.sections import write_sections
from finetune.train.runner import run_stage
from rlhf.preferences import PreparedPreferences, prepare_preferences
from rlhf.reward.adapter import RewardInfo, save_head, vocabulary_digest
from rlhf.reward.recipe import RewardRecipe
from rlhf.reward.report import CURVES, print_metrics, report_section
from rlhf.session import RlhfSession

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.recipe.schema import Recipe
    from finetune.report.samples import Sample
    from finetune.train.adapter_training import AdapterTraining
    from rlhf.reward.metrics import RewardMetrics
    from rlhf.reward.model import RewardModel
    from rlhf.reward.trainer import RewardTrainer

EVALUATION_FILE = "evaluation.json"


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train a reward model; see `finetune.train.runner.run_stage`."""
    return run_stage(recipe, resume=resume, overwrite=overwrite, session_class=RewardSession)


def check(recipe: Recipe, *, device: str | None = None) -> None:
    """Everything short of training; see `finetune.check.check_training`."""
    check_training(recipe, RewardSession, device=device)


def plan(recipe: Recipe, *, device: str) -> None:
    """Memory and time by shapes; see `finetune.check.plan_by_shapes`."""
    plan_by_shapes(recipe, RewardSession, device=device)


class RewardSession(RlhfSession):
    """Trains adapter and scalar head; measures the held-out accuracy and what scores are like."""

    sequences = 5  # as many responses as a prompt may well have
    metrics: RewardMetrics

    @classmethod
    def prepare(cls, recipe: Recipe, tokenizer: Any) -> Any:
        """Preferences, checked and tokenised."""
        settings = cast(RewardRecipe, recipe)
        return prepare_preferences(
            settings.data, tokenizer, stage=recipe.stage, seed=recipe.seed, resolve=recipe.resolve
        )

    @cached_property
    def settings(self) -> RewardRecipe:
        """The recipe as one of this stage."""
        return cast(RewardRecipe, self.recipe)

    @property
    def preferences(self) -> PreparedPreferences:
        """The data as preferences."""
        return cast(PreparedPreferences, self.data)

    def make_trainer(self, callbacks: list[Any]) -> AdapterTraining:
        """Base, adapter and a head that scores everything 0."""
        from finetune.data import collator_for
        from rlhf.reward.model import GroupCollator, RewardModel
        from rlhf.reward.trainer import RewardTrainer, reward_arguments

        data = self.preferences
        model = RewardModel(self.attach(self.load_model()))
        pack_to = max(self.settings.data.max_length, data.longest) if self.settings.data.packing else None
        return RewardTrainer(
            model=model,
            args=reward_arguments(self.settings, self.run, evaluates=data.validation is not None),
            run=self.run,
            keep_checkpoints=self.recipe.train.keep_checkpoints,
            settings=self.settings.reward,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=GroupCollator(collator_for(self.tokenizer), pack_to),
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )

    def adapter_of(self, trainer: AdapterTraining) -> PeftModel:
        """The reward model without its head."""
        return self._model(trainer).body

    def _model(self, trainer: AdapterTraining) -> RewardModel:
        return trainer.accelerator.unwrap_model(trainer.model)

    def answer(self, trainer: AdapterTraining, **kwargs: Any) -> list[Sample]:
        """None: a reward model does not talk."""
        return []

    def measure(self, trainer: AdapterTraining) -> dict[str, Any]:
        """Accuracy and scores on held-out prompts (on training prompts, where there are no others)."""
        judged = self.choose_judged(self.preferences)
        scorer = cast("RewardTrainer", trainer)
        scores = scorer.score(judged)
        self.metrics = scorer.measure_scores(judged, scores)
        if trainer.is_world_process_zero():
            held_out = self.preferences.validation is not None
            write_json(self.run.path / EVALUATION_FILE, {"held_out": held_out, **self.metrics.as_dict()})
            shown = self.recipe.report.samples
            write_sections(
                self.run.path,
                [report_section(self.metrics, judged.preferences, scores, held_out=held_out, samples=shown)],
                curves=CURVES,
            )
        return {
            "eval_accuracy": self.metrics.accuracy if self.preferences.validation else None,
            "score_mean": self.metrics.mean,
            "score_std": self.metrics.std,
        }

    def complete_adapter(self, trainer: AdapterTraining, folder: Path) -> None:
        """The head, and what scores mean."""
        info = RewardInfo(
            base=self.base.identity,
            vocabulary=vocabulary_digest(self.tokenizer),
            mean=self.metrics.mean,
            std=max(self.metrics.std, 1e-6),
            responses=self.metrics.responses,
            accuracy=self.metrics.accuracy if self.preferences.validation else None,
            max_length=self.settings.data.max_length,
        )
        save_head(folder, self._model(trainer).head, info)
        config = folder / "adapter_config.json"
        # It is no language model: peft should not load it as one.
        settings = {**json.loads(config.read_text(encoding="utf-8")), "task_type": "FEATURE_EXTRACTION"}
        write_json(config, settings)

    def tell(self, result: dict[str, Any], samples: list[Sample]) -> None:
        """The tables, then as every stage."""
        print_metrics(self.metrics, held_out=self.preferences.validation is not None)
        super().tell(result, samples)
