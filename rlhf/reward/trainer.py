"""The trainer of reward models: the ranking loss over whole steps, and scores of held-out responses.

trl's RewardTrainer takes pairs: with K responses to a prompt it would send each through the model K - 1 times.
This one stands on the same Trainer of transformers and sends each through once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from finetune.train.adapter_training import AdapterTraining
from finetune.train.trainer import arguments_for
from rlhf.reward.functional import pair_indices, ranking_loss
from rlhf.reward.metrics import RewardMetrics, evaluate

if TYPE_CHECKING:
    from finetune.train.run_folder import RunFolder
    from rlhf.preferences import PreferenceSet
    from rlhf.reward.recipe import Reward, RewardRecipe


def reward_arguments(recipe: RewardRecipe, run: RunFolder, *, evaluates: bool) -> TrainingArguments:
    """transformers' arguments for a recipe of stage reward."""
    return arguments_for(
        TrainingArguments, recipe, run, evaluates=evaluates, average_tokens_across_devices=True
    )


class RewardTrainer(AdapterTraining):
    """Trains a `RewardModel` on batches of `GroupCollator`.

    The loss is averaged over the prompts of a whole step, over accumulated batches and processes alike.

    Attributes:
        settings: the recipe's section reward.
    """

    def __init__(self, *, settings: Reward, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = settings
        self._sums = torch.zeros(
            3
        )  # pairs in the right order, pairs, sum of scores: since the last logged step
        self._responses = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The ranking loss of a batch, its share of the whole step's if `num_items_in_batch` counts that."""
        keys = ("input_ids", "ends", "attention_mask", "position_ids")
        scores = model(**{key: inputs[key] for key in keys if key in inputs})
        sizes, levels = inputs["group_sizes"], inputs["levels"]
        better, worse, group = pair_indices(sizes, scores.device)
        gaps = levels[better] - levels[worse]
        # Where only the order is known the gap counts as one step.
        steps = torch.where(inputs["graded"][group], gaps, torch.ones_like(gaps))
        loss = ranking_loss(
            scores,
            sizes,
            margins=self.settings.margin * steps if self.settings.margin else None,
            pair_mask=gaps > 0,
            mean_score_coef=self.settings.mean_score_coef,
            num_groups=num_items_in_batch,
        )
        if self.model.training:
            mask = inputs.get("attention_mask")
            self.tokens_seen = self.tokens_seen + (
                inputs["input_ids"].numel() if mask is None else mask.sum()
            )
            with torch.no_grad():
                right = ((scores[better] > scores[worse]) & (gaps > 0)).sum()
                sums = torch.stack([right, (gaps > 0).sum(), scores.detach().sum()]).float()
                self._sums = self._sums.to(sums.device) + sums
                self._responses += len(scores)
            if num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
        return (loss, scores) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the training accuracy and the mean score since the last logged step."""
        if "loss" in logs and self._responses:
            right, pairs, total = self._sums.tolist()
            logs = {**logs, "accuracy": right / max(pairs, 1), "mean_score": total / self._responses}
            self._sums, self._responses = torch.zeros(3), 0
        super().log(logs, *args, **kwargs)

    # ---- held-out responses ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, accuracy and scores of the held-out set."""
        start = time.monotonic()
        measured = self.measure(self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {
            f"{metric_key_prefix}_loss": measured.loss,
            f"{metric_key_prefix}_accuracy": measured.accuracy,
            f"{metric_key_prefix}_mean_score": measured.mean,
            f"{metric_key_prefix}_score_std": measured.std,
            f"{metric_key_prefix}_runtime": time.monotonic() - start,
        }
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, preferences: PreferenceSet) -> RewardMetrics:
        """Everything that is measured on a set of preferences."""
        return self.measure_scores(preferences, self.score(preferences))

    def measure_scores(self, preferences: PreferenceSet, scores: list[list[float]]) -> RewardMetrics:
        """The same of scores that are known already."""
        return evaluate(preferences.preferences, scores, margin=self.settings.margin)

    @torch.no_grad()
    def score(self, preferences: PreferenceSet) -> list[list[float]]:
        """The score of every response of every prompt, in order; the same in every process."""
        from accelerate.utils import gather_object

        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        size = self.args.eval_batch_size
        place, processes = self.accelerator.process_index, self.accelerator.num_processes
        found: list[tuple[int, list[float]]] = []
        # Responses of like length together: little padding.
        order = sorted(
            range(len(preferences)), key=lambda at: -max(map(len, preferences.tokens[at].input_ids))
        )
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        for batch in batches[place::processes]:
            inputs = self._prepare_inputs(self.data_collator([preferences[at] for at in batch]))
            keys = ("input_ids", "ends", "attention_mask", "position_ids")
            with self.compute_loss_context_manager():
                scores = model(**{key: inputs[key] for key in keys if key in inputs})
            groups = scores.float().cpu().split(inputs["group_sizes"])
            found += [(at, group.tolist()) for at, group in zip(batch, groups)]
        model.train(training)
        by_place = dict(gather_object(found))
        return [by_place[at] for at in range(len(preferences))]
