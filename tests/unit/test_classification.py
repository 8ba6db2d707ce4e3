"""Sequence classification: one score for each row, read at its last real token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import HIDDEN, padded, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from finetune.baichuan import BaichuanForSequenceClassification

LONG, SHORT = list(range(1200, 1212)), list(range(1300, 1305))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.fixture(params=["rope", "alibi"])
def classifier(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return BaichuanForSequenceClassification(tiny_config(request.param)).eval()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_score_is_read_at_the_last_real_token(classifier: Any, side: str) -> None:
    """Pad id 0 inside the text is text where a mask says so."""
    texts = [LONG, [*SHORT[:2], 0, *SHORT[2:], 0]]
    if side == "none":
        texts = [LONG[:6], texts[1]]
    ids, mask = padded(texts, "right" if side == "none" else side)
    scores = classifier(ids, attention_mask=mask).logits
    assert scores.shape == (2, 1)
    for row, text in enumerate(texts):
        hidden = classifier.model(torch.tensor([text])).last_hidden_state[0, -1]
        close(scores[row], classifier.score(hidden))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_mask_padding_is_told_by_its_id(classifier: Any, side: str) -> None:
    texts = [LONG, [*SHORT[:2], 0, *SHORT[2:]]]
    ids, mask = padded(texts, side)
    hidden = classifier.model(ids).last_hidden_state
    last = [LONG.index(LONG[-1]), ids.shape[1] - 1 if side == "left" else len(texts[1]) - 1]
    expected = classifier.score(torch.stack([hidden[0, last[0]], hidden[1, last[1]]]))
    close(classifier(ids).logits, expected)
    embedded = classifier.model.embed_tokens(ids)  # no ids to look at: the mask tells, or all is text
    close(
        classifier(inputs_embeds=embedded, attention_mask=mask).logits,
        classifier(ids, attention_mask=mask).logits,
    )
    close(classifier(inputs_embeds=embedded).logits, classifier.score(hidden[:, -1]))


def test_classifier_loads_on_a_language_model_and_round_trips(tiny_base: Path, tmp_path: Path) -> None:
    """A reward model begins as one: the decoder's weights are taken, the score is new and scalar."""
    model, info = AutoModelForSequenceClassification.from_pretrained(tiny_base, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert model.score.weight.shape == (1, HIDDEN)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor([LONG])
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    three = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    assert three(ids).logits.shape == (1, 3)


def test_classifier_learns_from_scores_and_from_classes(classifier: Any) -> None:
    ids = torch.tensor([LONG])
    loss = classifier(ids, labels=torch.tensor([0.5])).loss  # one label: regression
    close(loss, (classifier(ids).logits[0, 0] - 0.5).square())
    loss.backward()
    assert classifier.score.weight.grad.any()
