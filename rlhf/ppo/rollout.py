"""Responses sampled from the actor, and what the models say about each of their tokens.

Sampling and learning see the same tokens in different layouts. Generation pads prompts on the left and lives on
a key/value cache. Everything that is learned from goes through the training path instead: whole sequences,
padded on the right, no cache. The log-probabilities of sampling are not kept, since kernels differ between the
two paths and the ratio of an unchanged policy has to be 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.ppo.logprobs import tiled_logprobs
from rlhf.ppo.models import ScalarHead, SharedBase

Ids = Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. The policy that is trained is the one with this temperature.

    Attributes:
        max_new_tokens: longest response, its EOS included.
        temperature: divides the logits, in sampling and in training.
        top_k, top_p: 0 and 1 sample from the whole vocabulary. Anything else samples from another distribution
            than the one that log-probabilities are computed of, so that the KL estimate is no longer unbiased.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class Rollout:
    """b prompts and the responses to them, of at most t tokens.

    Attributes:
        prompts: token ids, from `finetune.baichuan.chat.build_prompt`.
        responses: (b, t), ids, 0 after the end.
        mask: (b, t), bool, 1 up to and including the first EOS.
        ended: (b,), bool, whether there is an EOS.
    """

    prompts: list[Ids]
    responses: torch.Tensor
    mask: torch.Tensor
    ended: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """(b,), tokens of each response, EOS included."""
        return self.mask.sum(-1)

    def response_ids(self, row: int) -> list[int]:
        """The response without its EOS."""
        return self.responses[row, self.mask[row]].tolist()[: -1 if self.ended[row] else None]


@dataclass(frozen=True)
class Rows:
    """Some rows of a rollout as the training path wants them.

    Attributes:
        index: (r,), which rows of the rollout.
        input_ids, attention_mask: (r, length), prompt and response, padded on the right.
        mask: (r, t), which response tokens count; t is that of the rollout.
        places: (n, 2), for each counted token the row, and the position that predicts it.
        targets: (n,), its id.
    """

    index: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """(n,) numbers of counted tokens → (r, t), 0 elsewhere; differentiable."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


# --- sampling -----------------------------------------------------------------------------------------------


def generate(
    models: SharedBase,
    adapter: str | None,
    prompts: Sequence[Ids],
    sampling: Sampling,
    *,
    eos_token_id: int,
    batch_size: int,
    greedy: bool = False,
) -> Rollout:
    """One response to each prompt.

    Prompts of like length go together, so that little is padded, and each batch stops when all of its responses
    have ended. The cache of a batch is gone when this returns.

    Args:
        models: the shared base.
        adapter: who answers.
        prompts: token ids.
        sampling: how.
        eos_token_id: ends a response.
        batch_size: prompts at once.
        greedy: the most likely token instead of a sampled one.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    rows: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad(), models.using(adapter):
        was_training = models.lm.training
        models.lm.eval()  # under gradient checkpointing, a model that trains has no cache
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[row] for row in chosen]
            answers = _generate_batch(models, batch, sampling, eos_token_id, greedy=greedy)
            for row, ids in zip(chosen, answers):
                end = ids.index(eos_token_id) + 1 if eos_token_id in ids else len(ids)
                rows[row] = ids[:end]
        models.lm.train(was_training)
    if models.device.type == "cuda":
        torch.cuda.empty_cache()  # what the caches took is needed in other sizes now
    return as_rollout(prompts, rows, eos_token_id=eos_token_id, device=models.device)


def _generate_batch(
    models: SharedBase, prompts: Sequence[Ids], sampling: Sampling, eos_token_id: int, *, greedy: bool
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=models.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=models.device)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if not greedy:
        how = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    # The official generation config penalises repetition, which no log-probability here knows of.
    output = models.lm.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=sampling.max_new_tokens,
        use_cache=True,
        eos_token_id=eos_token_id,
        pad_token_id=0,
        repetition_penalty=1.0,
        **how,
    )
    return output[:, width:].tolist()


def as_rollout(
    prompts: Sequence[Ids], responses: Sequence[Ids], *, eos_token_id: int, device: torch.device
) -> Rollout:
    """A rollout of given responses, each with its EOS where it ended."""
    width = max((len(ids) for ids in responses), default=0)
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in responses], dtype=torch.long)
    lengths = torch.tensor([len(ids) for ids in responses])
    ended = torch.tensor([bool(ids) and ids[-1] == eos_token_id for ids in responses])
    mask = torch.arange(width) < lengths[:, None]
    return Rollout(list(prompts), padded.to(device), mask.to(device), ended.to(device))


# --- the training path --------------------------------------------------------------------------------------


def select(rollout: Rollout, index: Sequence[int] | torch.Tensor) -> Rows:
    """Rows of a rollout, as batch for the training path."""
    chosen = torch.as_tensor(index, dtype=torch.long)
    device = rollout.responses.device
    sequences = [
        [*rollout.prompts[row], *rollout.responses[row, rollout.mask[row]].tolist()]
        for row in chosen.tolist()
    ]
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=device)
    real = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    starts = torch.tensor([len(rollout.prompts[row]) for row in chosen.tolist()], device=device)
    chosen = chosen.to(device)
    mask = rollout.mask[chosen]
    row, step = mask.nonzero(as_tuple=True)
    places = torch.stack([row, starts[row] + step - 1], dim=-1)  # the token before predicts it
    return Rows(chosen, ids, real, mask, places, rollout.responses[chosen][mask])


def batches_by_length(rollout: Rollout, batch_size: int) -> Iterator[torch.Tensor]:
    """Indices of all rows, ``batch_size`` at a time, those of like length together."""
    lengths = torch.tensor([len(prompt) for prompt in rollout.prompts]) + rollout.lengths.cpu()
    return iter(lengths.argsort(stable=True).split(batch_size))


def policy(
    models: SharedBase, adapter: str | None, rows: Rows, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (r, t) of the sampled tokens under an adapter, and entropies (r, t) without gradient.

    Both float32, in nats, 0 where nothing counts. Logits exist for counted response positions only, a tile at
    a time.
    """
    with models.using(adapter):
        hidden = models.hidden(rows.input_ids, rows.attention_mask)
    predicting = hidden[rows.places[:, 0], rows.places[:, 1]]
    logprobs, entropy = tiled_logprobs(predicting, models.head_weight, rows.targets, temperature=temperature)
    return rows.spread(logprobs), rows.spread(entropy)


def values(models: SharedBase, adapter: str, head: ScalarHead, rows: Rows) -> torch.Tensor:
    """The critic's value (r, t), float32, of the state before each counted response token."""
    with models.using(adapter):
        hidden = models.hidden(rows.input_ids, rows.attention_mask)
    return rows.spread(head(hidden[rows.places[:, 0], rows.places[:, 1]]))


def last_hidden(models: SharedBase, adapter: str, sequences: Sequence[Ids]) -> torch.Tensor:
    """Hidden state (r, hidden_size) at the last token of each sequence, for reward models."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=models.device)
    real = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=models.device)
    with models.using(adapter):
        hidden = models.hidden(ids, real)
    ends = torch.tensor([len(s) - 1 for s in sequences], device=models.device)
    return hidden[torch.arange(len(sequences), device=models.device), ends]
