"""Sampling, and the training path that reads what was sampled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_model import tiny_model

from rlhf.ppo.models import ScalarHead, SharedBase
from rlhf.ppo.rollout import (
    Rollout,
    Sampling,
    as_rollout,
    batches_by_length,
    generate,
    last_hidden,
    policy,
    select,
    values,
)

EOS = 2
PROMPTS = [[195, 1400, 1500, 196], [195, 1450, 196], [195, 1401, 1402, 1403, 1404, 196], [195, 1700, 196]]
RESPONSES = [[1600, 1601, EOS], [EOS], [1650, 1651, 1652, 1653], [1500, EOS]]


@pytest.fixture(params=["rope", "alibi"])
def models(request: pytest.FixtureRequest) -> SharedBase:
    shared = SharedBase(tiny_model(request.param))
    from test_ppo_models import config, randomise

    for seed, name in enumerate(("actor", "critic")):
        shared.add_new(name, config())
        randomise(shared, name, seed)
    return shared


@pytest.fixture
def rollout() -> Rollout:
    return as_rollout(PROMPTS, RESPONSES, eos_token_id=EOS, device=torch.device("cpu"))


def test_a_rollout_counts_up_to_its_eos(rollout: Rollout) -> None:
    assert rollout.lengths.tolist() == [3, 1, 4, 2]
    assert rollout.ended.tolist() == [True, True, False, True]
    assert [rollout.response_ids(row) for row in range(4)] == [[1600, 1601], [], RESPONSES[2], [1500]]
    assert rollout.mask.tolist() == [
        [True, True, True, False],
        [True, False, False, False],
        [True] * 4,
        [True, True, False, False],
    ]


@pytest.mark.parametrize("name", ["actor", None])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_policy_against_whole_logits(
    models: SharedBase, rollout: Rollout, name: str | None, temperature: float
) -> None:
    """Each row alone, without padding, with the logits of every position."""
    rows = select(rollout, [3, 0, 2, 1])
    with torch.no_grad():
        logprobs, entropy = policy(models, name, rows, temperature=temperature)
    for place, row in enumerate([3, 0, 2, 1]):
        ids = torch.tensor([PROMPTS[row] + RESPONSES[row]])
        with torch.no_grad(), models.using(name):
            logits = models.lm(input_ids=ids).logits[0].double() / temperature
        every = logits.log_softmax(-1)
        for step, token in enumerate(RESPONSES[row]):
            position = len(PROMPTS[row]) + step - 1
            assert logprobs[place, step].item() == pytest.approx(every[position, token].item(), abs=1e-4)
            expected = -(every[position].exp() * every[position]).sum().item()
            assert entropy[place, step].item() == pytest.approx(expected, abs=1e-4)
        assert not logprobs[place, len(RESPONSES[row]) :].any()


def test_values_are_of_the_state_before_each_token(models: SharedBase, rollout: Rollout) -> None:
    head = ScalarHead(64)
    rows = select(rollout, range(4))
    found = values(models, "critic", head, rows)
    for row in range(4):
        ids = torch.tensor([PROMPTS[row] + RESPONSES[row]])
        with models.using("critic"):
            hidden = models.hidden(ids, torch.ones_like(ids))[0]
        start = len(PROMPTS[row]) - 1
        expected = head(hidden[start : start + len(RESPONSES[row])])
        torch.testing.assert_close(found[row, rows.mask[row]], expected, rtol=1e-4, atol=1e-5)
        assert not found[row, ~rows.mask[row]].any()
    scores = head(last_hidden(models, "critic", [p + r for p, r in zip(PROMPTS, RESPONSES)]))
    longest = torch.tensor([PROMPTS[2] + RESPONSES[2]])
    with models.using("critic"):
        torch.testing.assert_close(scores[2], head(models.hidden(longest, torch.ones_like(longest))[0, -1]))


def test_gradient_reaches_the_actor_through_counted_tokens_only(models: SharedBase, rollout: Rollout) -> None:
    logprobs, _ = policy(models, "actor", select(rollout, range(4)), temperature=1.0)
    logprobs.sum().backward()
    whole = {key: p.grad.clone() for key, p in models.named_parameters("actor") if p.grad is not None}
    models.lm.zero_grad()
    for rows in batches_by_length(rollout, 1):
        policy(models, "actor", select(rollout, rows), temperature=1.0)[0].sum().backward()
    for key, parameter in models.named_parameters("actor"):
        torch.testing.assert_close(parameter.grad, whole[key], rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for _, p in models.named_parameters("critic"))


def test_generation_in_padded_batches_is_generation_alone(models: SharedBase) -> None:
    sampling = Sampling(12)
    together = generate(models, "actor", PROMPTS, sampling, eos_token_id=EOS, batch_size=3, greedy=True)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad(), models.using("actor"):
                ids.append(int(models.lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        assert together.responses[row, together.mask[row]].tolist() == ids[len(prompt) :]
        assert together.ended[row] == (ids[-1] == EOS)
    assert models.lm.training is False


def test_sampling_draws_from_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """First tokens, many times: their frequencies are the probabilities at the temperature."""
    models = SharedBase(tiny_model("rope", initializer_range=0.4))
    models.lm.generation_config.update(repetition_penalty=1.9, top_k=5, temperature=0.3)  # must not count
    torch.manual_seed(0)
    rollout = generate(
        models, None, [PROMPTS[0]] * 4000, Sampling(1, temperature=0.25), eos_token_id=EOS, batch_size=2000
    )
    frequency = Counter(rollout.responses[:, 0].tolist())
    with torch.no_grad():
        logits = models.lm(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.25
    likely = logits.softmax(-1).topk(5)
    for probability, token in zip(likely.values.tolist(), likely.indices.tolist()):
        assert frequency[token] / 4000 == pytest.approx(probability, abs=4 * (probability / 4000) ** 0.5)
    assert len(frequency) > 5


def test_batches_by_length_cover_every_row_once(rollout: Rollout) -> None:
    batches = [batch.tolist() for batch in batches_by_length(rollout, 3)]
    assert sorted(row for batch in batches for row in batch) == [0, 1, 2, 3]
    assert batches[0] == [1, 3, 0]


def test_training_mode_is_given_back(models: SharedBase) -> None:
    seen: list[Any] = []
    models.lm.train()
    models.lm.register_forward_hook(lambda module, *_: seen.append(module.training))
    generate(models, "actor", PROMPTS, Sampling(2), eos_token_id=EOS, batch_size=4)
    assert not any(seen)
    assert models.lm.training
