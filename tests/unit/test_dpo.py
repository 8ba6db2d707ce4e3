"""DPO on trl's trainer: pairs, the reference, log-probabilities through the normalised head, losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_model import tiny_model

from finetune.adapters.build import adapter_config, attach_adapter, load_adapter, save_adapter
from finetune.baichuan.load import Base, load_tokenizer
from finetune.recipe.schema import Adapter
from finetune.train.run_folder import RunFolder
from rlhf.dpo.data import PreparedPairs, choose_pairs, pairs_of
from rlhf.dpo.recipe import DPORecipe
from rlhf.dpo.stage import implicit_rewards, mean_logprobs
from rlhf.dpo.trainer import DPOAdapterTrainer, ResponseLogprobs, dpo_arguments
from rlhf.preferences import Preference, PreferenceSet, Response
from rlhf.preferences.fitting import Tokens

BASE = Base("tiny", Path(), "tiny")
ASK = [{"role": "user", "content": "问"}]
PROMPT = [195, 300, 301, 196]
RESPONSES = [[400, 401, 402, 2], [500, 2], [600, 601, 2]]
PAIRS = [(0, 1), (0, 2), (1, 2)]


def preferences() -> PreferenceSet:
    preference = Preference(ASK, tuple(Response(str(level), level) for level in (5.0, 4.0, 1.0)), graded=True)
    tokens = Tokens([PROMPT + ids for ids in RESPONSES], len(PROMPT), [9, 9, 9], False)
    return PreferenceSet([(preference, tokens)])


def trainer(tiny: Path, folder: Path, *, start: Path | None = None, **dpo: Any) -> DPOAdapterTrainer:
    recipe = DPORecipe.model_validate(
        {
            "name": "x",
            "stage": "dpo",
            "model": {"base": "tiny"},
            "data": {"train": "x"},
            "dpo": dpo,
            "train": {"gradient_checkpointing": False},
        }
    )
    base = tiny_model()
    base.name_or_path = base.config.name_or_path = BASE.identity
    base.requires_grad_(False)
    base.freeze_head()
    model = base if start is None else load_adapter(base, start, trainable=True)
    return DPOAdapterTrainer(
        model=model,
        args=dpo_arguments(recipe, RunFolder(folder), evaluates=False),
        run=RunFolder(folder),
        keep_checkpoints=1,
        train_dataset=pairs_of(preferences(), None),
        processing_class=load_tokenizer(tiny),
        **({"peft_config": adapter_config(Adapter(rank=4, dropout=0.0), BASE)} if start is None else {}),
    )


def disturb(model: Any, scale: float = 0.05) -> None:
    """Move the trainable adapter, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def by_hand(model: Any, response: list[int]) -> float:
    """Sum of log-probabilities with the head normalised in float64."""
    ids = torch.tensor([PROMPT + response])
    hidden = model.get_base_model().model(input_ids=ids).last_hidden_state[0].double()
    weight = F.normalize(tiny_model().lm_head.weight.double())
    logprobs = (hidden @ weight.T).log_softmax(-1)
    places = range(len(PROMPT) - 1, len(PROMPT) + len(response) - 1)
    return sum(logprobs[place, ids[0, place + 1]].item() for place in places)


def test_pairs_of_ranked_responses() -> None:
    preference = preferences().preferences[0]
    assert choose_pairs(preference, None) == [(0, 2), (1, 2), (0, 1)]
    assert choose_pairs(preference, 1) == [(0, 2)]
    row = pairs_of(preferences(), 1)[0]
    assert row == {"prompt_ids": PROMPT, "chosen_ids": RESPONSES[0], "rejected_ids": RESPONSES[2]}


def test_tokens_of_a_pair_are_those_of_both_rows() -> None:
    """Pairs of ranked responses have some of these more than once, and the prompt in each row."""
    prepared = PreparedPairs(pairs_of(preferences(), None), None, None)  # type: ignore[arg-type]
    rows = [len(PROMPT + RESPONSES[better]) + len(PROMPT + RESPONSES[worse]) for better, worse in PAIRS]
    assert prepared.row_tokens == sum(rows) / 3


def test_logprobs_go_through_the_normalised_head(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """trl multiplies by `lm_head.weight` itself: with the raw weight these would be far off."""
    dpo = trainer(tiny_bases["rope"], tmp_path)
    disturb(dpo.model)
    found = dpo.response_logprobs(preferences())[0]
    assert found.tokens == [4, 2, 3]
    expected = [by_hand(dpo.model, response) for response in RESPONSES]
    assert found.policy == pytest.approx(expected, rel=1e-4)
    with dpo.model.disable_adapter():
        reference = [by_hand(dpo.model, response) for response in RESPONSES]
    assert found.reference == pytest.approx(reference, rel=1e-4)
    assert found.policy != pytest.approx(found.reference, rel=1e-3)


def test_a_new_adapter_has_no_copy_and_starts_at_the_reference(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    dpo = trainer(tiny_bases["rope"], tmp_path)
    assert set(dpo.model.peft_config) == {"default"}
    assert dpo.ref_model is None
    found = dpo.response_logprobs(preferences())[0]
    assert found.policy == pytest.approx(found.reference, rel=1e-5)


def test_the_reference_of_a_started_adapter_is_that_adapter(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    started = attach_adapter(tiny_model(), Adapter(rank=4, dropout=0.0), BASE)
    disturb(started)
    save_adapter(started, tmp_path / "start")
    dpo = trainer(tiny_bases["rope"], tmp_path, start=tmp_path / "start")
    started.get_base_model().freeze_head()
    expected = [by_hand(started, response) for response in RESPONSES]
    assert dpo.response_logprobs(preferences())[0].reference == pytest.approx(expected, rel=1e-4)
    disturb(dpo.model)
    found = dpo.response_logprobs(preferences())[0]
    assert found.reference == pytest.approx(expected, rel=1e-4)
    assert found.policy != pytest.approx(expected, rel=1e-3)
    assert all(".ref." not in name for name, _ in dpo._trainable())
    save_adapter(dpo.model, tmp_path / "saved")
    assert not (tmp_path / "saved" / "ref").exists()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "robust"])
def test_losses_are_those_of_the_papers(tiny_bases: dict[str, Path], tmp_path: Path, loss: str) -> None:
    smoothing = 0.1 if loss == "robust" else 0.0
    dpo = trainer(tiny_bases["rope"], tmp_path, loss=loss, beta=0.5, label_smoothing=smoothing)
    disturb(dpo.model)
    found = dpo.response_logprobs(preferences())[0]
    ratios = [ours - theirs for ours, theirs in zip(found.policy, found.reference)]
    batch = dpo.data_collator([dpo.train_dataset[0]])  # responses 0 and 2
    dpo.model.eval()
    value = dpo.compute_loss(dpo.model, batch).item()
    delta = ratios[0] - ratios[2]

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    expected = {
        "sigmoid": softplus(-0.5 * delta),
        "ipo": (ratios[0] / found.tokens[0] - ratios[2] / found.tokens[2] - 1 / (2 * 0.5)) ** 2,
        "robust": (0.9 * softplus(-0.5 * delta) - 0.1 * softplus(0.5 * delta)) / 0.8,
    }
    assert value == pytest.approx(expected[loss], rel=1e-3)


def test_sft_weight_adds_the_chosen_cross_entropy(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    plain, weighted = (trainer(tiny_bases["rope"], tmp_path, sft_weight=weight) for weight in (0.0, 0.3))
    values = []
    for dpo in (plain, weighted):
        disturb(dpo.model)
        dpo.model.eval()
        values.append(dpo.compute_loss(dpo.model, dpo.data_collator([dpo.train_dataset[0]])).item())
    chosen = plain.response_logprobs(preferences())[0].policy[0]
    different_starts = weighted.response_logprobs(preferences())[0].policy[0]
    assert chosen == pytest.approx(different_starts, rel=1e-4)
    assert values[1] - values[0] == pytest.approx(-0.3 * chosen / 4, rel=1e-3)


def test_implicit_rewards_and_means() -> None:
    one = ResponseLogprobs([-4.0, -6.0], [-5.0, -4.0], [2, 4])
    assert implicit_rewards(one, 0.5) == [0.5, -1.0]
    assert mean_logprobs([one, one]) == {
        "chosen_logp_before": -2.5,
        "chosen_logp_after": -2.0,
        "rejected_logp_before": -1.0,
        "rejected_logp_after": -1.5,
    }
