"""trl's DPO trainer on a frozen Baichuan base: pre-tokenised pairs, whole checkpoints, held-out log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trl import DPOConfig, DPOTrainer

from finetune.data.collate import IGNORE_INDEX
from finetune.train.adapter_training import AdapterTraining
from finetune.train.trainer import arguments_for

if TYPE_CHECKING:
    from finetune.train.run_folder import RunFolder
    from rlhf.dpo.recipe import DPORecipe
    from rlhf.preferences import PreferenceSet


def dpo_arguments(recipe: DPORecipe, run: RunFolder, *, evaluates: bool) -> DPOConfig:
    """trl's arguments for a recipe of stage dpo."""
    settings = recipe.dpo
    losses: dict[str, float] = {settings.loss: 1.0}
    if settings.sft_weight:
        losses["sft"] = settings.sft_weight
    return arguments_for(
        DPOConfig,
        recipe,
        run,
        evaluates=evaluates,
        beta=settings.beta,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        label_smoothing=settings.label_smoothing,
        max_length=None,  # cut already
    )


@dataclass(frozen=True)
class ResponseLogprobs:
    """Log-probabilities of the responses to one prompt, summed over their tokens, best response first.

    Attributes:
        policy: by the trained model.
        reference: by the reference.
        tokens: how many tokens were summed.
    """

    policy: list[float]
    reference: list[float]
    tokens: list[int]


class DPOAdapterTrainer(AdapterTraining, DPOTrainer):
    """Trains an adapter against the same model without it, or with the adapter that it started as.

    trl multiplies hidden states by `lm_head.weight` itself. That is exact here: the head is frozen, and its
    weight reads as normalised (`finetune.baichuan.head`).
    """

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As it is: tokenised in the official chat format, where content cannot forge a role."""
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """trl's; counts tokens."""
        if self.model.training:
            self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def response_logprobs(self, preferences: PreferenceSet) -> list[ResponseLogprobs]:
        """Log-probabilities of every response to every prompt, the same in every process."""
        from accelerate.utils import gather_object

        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        size = max(1, self.args.eval_batch_size // 2)
        place, processes = self.accelerator.process_index, self.accelerator.num_processes
        order = sorted(
            range(len(preferences)), key=lambda at: -max(map(len, preferences.tokens[at].input_ids))
        )
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        found: list[tuple[int, ResponseLogprobs]] = []
        for batch in batches[place::processes]:
            found += zip(batch, self._logprobs_of([preferences[at] for at in batch], model))
        model.train(training)
        by_place = dict(gather_object(found))
        return [by_place[at] for at in range(len(preferences))]

    def _logprobs_of(self, items: list[dict[str, Any]], model: Any) -> list[ResponseLogprobs]:
        rows = [(ids, item["prompt_length"]) for item in items for ids in item["input_ids"]]
        inputs = self._prepare_inputs(_padded(rows, self.processing_class.pad_token_id))
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        with self.compute_loss_context_manager():
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                fused_lm_head=True,
                use_cache=False,
            )
        policy = outputs.log_probs.sum(dim=1).tolist()
        reference = torch.cat(self.compute_ref_log_probs(model, inputs)).tolist()
        tokens = [len(ids) - start for ids, start in rows]
        result, at = [], 0
        for item in items:
            end = at + len(item["input_ids"])
            result.append(ResponseLogprobs(policy[at:end], reference[at:end], tokens[at:end]))
            at = end
        return result


def _padded(rows: list[tuple[list[int], int]], pad: int) -> dict[str, torch.Tensor]:
    """Whole conversations and the place where their responses begin, as trl's collator lays them out."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "completion_mask": torch.tensor(
            [[0] * start + [1] * (len(ids) - start) + [0] * (width - len(ids)) for ids, start in rows]
        ),
    }
