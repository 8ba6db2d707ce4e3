"""Stage `dpo`: direct preference optimisation of an adapter."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from finetune.check import check_training, plan_by_shapes
from finetune.files import write_json
from finetune.report.sections import write_sections
from finetune.train.runner import run_stage
from finetune.words import are, plural
from rlhf.dpo.data import PreparedPairs, prepare_pairs
from rlhf.dpo.recipe import DPORecipe
from rlhf.preferences import prepare_preferences
from rlhf.reward.metrics import RewardMetrics, evaluate
from rlhf.reward.report import print_metrics, report_section
from rlhf.session import RlhfSession, start_folder

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe
    from finetune.report.samples import Sample
    from finetune.train.adapter_training import AdapterTraining
    from rlhf.dpo.trainer import DPOAdapterTrainer, ResponseLogprobs

EVALUATION_FILE = "evaluation.json"
CURVES = (
    {"key": "rewards/margins", "title": "Implicit reward, chosen less rejected"},
    {"key": "rewards/accuracies", "title": "Pairs in the right order", "share": True},
    {"key": "rewards/chosen", "title": "Implicit reward of chosen responses"},
    {"key": "rewards/rejected", "title": "Implicit reward of rejected responses"},
    {"key": "logps/chosen", "title": "Log-probability of chosen responses, nats"},
    {"key": "logps/rejected", "title": "Log-probability of rejected responses, nats"},
    {"key": "entropy", "title": "Entropy of the policy, nats a token", "from_zero": True},
    {"key": "mean_token_accuracy", "title": "Response tokens predicted", "share": True},
    {"key": "logits/chosen", "title": "Mean logit on chosen responses"},
    {"key": "logits/rejected", "title": "Mean logit on rejected responses"},
)
"""What the lines of metrics.jsonl say, in the form of `finetune.report.sections`; the numbers are trl's."""


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train an adapter on preferences; see `finetune.train.runner.run_stage`."""
    return run_stage(recipe, resume=resume, overwrite=overwrite, session_class=DPOSession)


def check(recipe: Recipe, *, device: str | None = None) -> None:
    """Everything short of training; see `finetune.check.check_training`."""
    check_training(recipe, DPOSession, device=device)


def plan(recipe: Recipe, *, device: str) -> None:
    """Memory and time by shapes; see `finetune.check.plan_by_shapes`."""
    plan_by_shapes(recipe, DPOSession, device=device)


class DPOSession(RlhfSession):
    """Trains an adapter; measures implicit rewards and what became of the chosen responses' probability."""

    sequences = 2
    reference_passes = 1
    metrics: RewardMetrics
    logprobs: dict[str, float]

    @classmethod
    def prepare(cls, recipe: Recipe, tokenizer: Any) -> Any:
        """Preferences, checked and tokenised, as pairs."""
        settings = cast(DPORecipe, recipe)
        preferences = prepare_preferences(
            settings.data, tokenizer, stage=recipe.stage, seed=recipe.seed, resolve=recipe.resolve
        )
        return prepare_pairs(preferences, pairs_per_prompt=settings.dpo.pairs_per_prompt)

    @property
    def settings(self) -> DPORecipe:
        """The recipe as one of this stage."""
        return cast(DPORecipe, self.recipe)

    @property
    def pairs(self) -> PreparedPairs:
        """The data as pairs."""
        return cast(PreparedPairs, self.data)

    def make_trainer(self, callbacks: list[Any]) -> AdapterTraining:
        """The reference is the model with a new adapter off, or a frozen copy of the adapter to start from."""
        from finetune.adapters.build import adapter_config, check_targets
        from rlhf.dpo.trainer import DPOAdapterTrainer, dpo_arguments

        model = self.load_model()
        given: dict[str, Any] = {}
        if start_folder(self.settings) is None:
            check_targets(model, self.recipe.adapter)
            model.name_or_path = model.config.name_or_path = self.base.identity
            given["peft_config"] = adapter_config(self.recipe.adapter, self.base)
        else:
            model = self.attach(model)
        return DPOAdapterTrainer(
            model=model,
            args=dpo_arguments(self.settings, self.run, evaluates=self.pairs.validation is not None),
            run=self.run,
            keep_checkpoints=self.recipe.train.keep_checkpoints,
            train_dataset=self.pairs.train,
            eval_dataset=self.pairs.validation,
            processing_class=self.tokenizer,
            callbacks=callbacks,
            **given,
        )

    def measure(self, trainer: AdapterTraining) -> dict[str, Any]:
        """Implicit rewards of held-out responses, and their log-probabilities before and after."""
        judged = self.choose_judged(self.pairs.preferences)
        found = cast("DPOAdapterTrainer", trainer).response_logprobs(judged)
        rewards = [implicit_rewards(each, self.settings.dpo.beta) for each in found]
        self.metrics = evaluate(judged.preferences, rewards)
        self.logprobs = mean_logprobs(found)
        held_out = self.pairs.validation is not None
        if trainer.is_world_process_zero():
            content = {"held_out": held_out, **self.logprobs, **self.metrics.as_dict()}
            write_json(self.run.path / EVALUATION_FILE, content)
            section = report_section(
                self.metrics,
                judged.preferences,
                rewards,
                held_out=held_out,
                samples=self.recipe.report.samples,
                heading="Implicit rewards",
                text=self._in_words(),
            )
            write_sections(self.run.path, [section], curves=CURVES)
        return {"eval_accuracy": self.metrics.accuracy if held_out else None, **self.logprobs}

    def _in_words(self) -> str:
        values, pairs = self.logprobs, self.metrics.pairs
        before, after = (
            {name: values[f"{name}_logp_{moment}"] for name in ("chosen", "rejected")}
            for moment in ("before", "after")
        )
        return (
            f"By the implicit reward, {self.settings.dpo.beta:g} × (log-probability − the reference's), "
            f"{self.metrics.accuracy:.1%} of {plural(pairs, 'pair')} {are(pairs)} in the right order. The best "
            f"responses' log-probability a token went from {before['chosen']:.3f} to {after['chosen']:.3f}, the "
            f"worst ones' from {before['rejected']:.3f} to {after['rejected']:.3f}."
        )

    def tell(self, result: dict[str, Any], samples: list[Sample]) -> None:
        """The tables, then as every stage."""
        from rich.console import Console

        print_metrics(self.metrics, held_out=self.pairs.validation is not None, what="implicit rewards")
        values = self.logprobs
        Console().print(
            "log-probability a token  "
            f"chosen {values['chosen_logp_before']:.3f} → {values['chosen_logp_after']:.3f}, "
            f"rejected {values['rejected_logp_before']:.3f} → {values['rejected_logp_after']:.3f}",
            highlight=False,
        )
        super().tell(result, samples)


def implicit_rewards(logprobs: ResponseLogprobs, beta: float) -> list[float]:
    """beta × (log-probability − the reference's) of each response (Rafailov et al. 2023, equation 5)."""
    return [beta * (ours - theirs) for ours, theirs in zip(logprobs.policy, logprobs.reference)]


def mean_logprobs(found: list[ResponseLogprobs]) -> dict[str, float]:
    """Mean log-probability a token of the best and worst responses, by the reference and by the policy."""
    means = {}
    for name, place in (("chosen", 0), ("rejected", -1)):
        means[f"{name}_logp_before"] = fmean(each.reference[place] / each.tokens[place] for each in found)
        means[f"{name}_logp_after"] = fmean(each.policy[place] / each.tokens[place] for each in found)
    return means
