"""UnitRowHead under everything that libraries do to a head, and the loss in closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import HIDDEN, VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM

from finetune.baichuan import loss as loss_module
from finetune.baichuan.head import UnitRowHead
from finetune.baichuan.loss import causal_lm_loss, tiled_causal_lm_loss
from finetune.data.collate import supervised_positions

IDS = torch.arange(1200, 1224).view(2, 12)


def unit_rows(weight: torch.Tensor) -> bool:
    return torch.allclose(weight.norm(dim=-1), torch.ones(weight.shape[0]), atol=1e-5)


# --- UnitRowHead ---------------------------------------------------------------------------------------------


def test_head_is_stored_raw_and_read_normalised() -> None:
    head = UnitRowHead(8, 5)
    stored = head.stored_weight
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert torch.equal(head.state_dict()["weight"], stored)
    assert not unit_rows(stored)
    assert unit_rows(head.weight)
    hidden = torch.randn(3, 8)
    expected = hidden @ (stored / stored.norm(dim=-1, keepdim=True)).T
    torch.testing.assert_close(head(hidden), expected)


def test_gradient_flows_through_the_normalisation() -> None:
    head = UnitRowHead(8, 5)
    head(torch.randn(3, 8)).square().sum().backward()
    gradient = head.stored_weight.grad
    assert gradient is not None
    # A row's length does not matter, so the gradient has no part along the row.
    along = (gradient * head.stored_weight).sum(-1)
    torch.testing.assert_close(along, torch.zeros(5), atol=1e-4, rtol=0)
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalising_in_place_changes_nothing_the_second_time(dtype: torch.dtype) -> None:
    head = UnitRowHead(64, 100).to(dtype)
    before = head.weight.detach().float()
    head.normalize_()
    once = head.stored_weight.detach().clone()
    torch.testing.assert_close(once.float(), before, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    head.normalize_()
    assert torch.equal(head.stored_weight, once)
    fresh = UnitRowHead(64, 100).to(dtype)  # what a saved normalised head loads into
    fresh.load_state_dict(head.state_dict())
    torch.testing.assert_close(fresh.weight.float(), once.float(), atol=4e-3, rtol=0)


def test_names_survive_saving_resizing_and_deep_copies(tmp_path: Path) -> None:
    import copy

    model = tiny_model()
    names = list(model.state_dict())
    assert names[-1] == "lm_head.weight"
    model.resize_token_embeddings(VOCAB_SIZE + 8)
    assert list(model.state_dict()) == names
    assert isinstance(model.lm_head, UnitRowHead)
    assert model.lm_head.stored_weight.shape == (VOCAB_SIZE + 8, HIDDEN)
    assert copy.deepcopy(model).lm_head.weight.shape == (VOCAB_SIZE + 8, HIDDEN)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert again.config.vocab_size == VOCAB_SIZE + 8
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    assert unit_rows(again.lm_head.weight)


@pytest.mark.parametrize("frozen", [False, True])
def test_resizing_keeps_the_old_rows_and_normalises_the_new_ones(frozen: bool) -> None:
    model = tiny_model()
    if frozen:
        model.freeze_head()
    before = model(IDS).logits
    model.resize_token_embeddings(VOCAB_SIZE + 8)
    torch.testing.assert_close(model(IDS).logits[..., :VOCAB_SIZE], before)
    assert unit_rows(model.lm_head.weight)
    assert model.lm_head.normalized == frozen
    assert model.lm_head.stored_weight.requires_grad != frozen


@pytest.mark.parametrize("frozen", [False, True])
def test_fused_head_of_trl_gives_the_loss_of_the_model(frozen: bool) -> None:
    """trl multiplies by ``lm_head.weight`` itself, past our forward."""
    from trl.trainer.utils import add_fused_lm_head

    model = tiny_model().train()
    if frozen:
        model.freeze_head()
    expected = model(IDS, labels=IDS).loss
    add_fused_lm_head(model)
    fused = model(IDS, labels=IDS, fused_lm_head=True).loss
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=0)
    if not frozen:
        fused.backward()
        through_trl = model.lm_head.stored_weight.grad.clone()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        torch.testing.assert_close(model.lm_head.stored_weight.grad, through_trl, atol=1e-6, rtol=1e-4)


def test_freezing_gives_a_head_that_others_can_multiply_by() -> None:
    model = tiny_model()
    with torch.no_grad():
        before = model(IDS).logits
        model.freeze_head()
        torch.testing.assert_close(model(IDS).logits, before)
    assert not model.lm_head.stored_weight.requires_grad
    assert unit_rows(model.state_dict()["lm_head.weight"])


# --- the loss -----------------------------------------------------------------------------------------------


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    loss = causal_lm_loss(torch.zeros(2, 5, 100), torch.randint(0, 100, (2, 5)))
    assert float(loss) == pytest.approx(math.log(100), abs=1e-5)


def test_each_position_predicts_the_next_token() -> None:
    logits = torch.full((1, 4, 10), -50.0)
    labels = torch.tensor([[7, 1, 2, 3]])
    for position, token in enumerate([1, 2, 3]):
        logits[0, position, token] = 50.0
    assert float(causal_lm_loss(logits, labels)) < 1e-6


def test_ignored_labels_do_not_count() -> None:
    logits = torch.randn(2, 6, 20)
    labels = torch.randint(0, 20, (2, 6))
    labels[0, 2:] = -100
    labels[1, :5] = -100
    kept = [(0, 0, labels[0, 1]), (1, 4, labels[1, 5])]
    expected = -sum(logits[row, at].log_softmax(-1)[token] for row, at, token in kept) / 2
    torch.testing.assert_close(causal_lm_loss(logits, labels), expected)


def test_z_loss_by_hand() -> None:
    """Largest logits 3 and 1 at the two shifted positions, the last one not counted; one label ignored."""
    logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    labels = torch.tensor([[0, 0, -100]])
    plain = causal_lm_loss(logits, labels)
    with_z = causal_lm_loss(logits, labels, z_loss_weight=0.5)
    assert float(with_z - plain) == pytest.approx(0.5 * (3**2 + 1**2) / 2)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_parts_of_a_step_add_up_to_the_whole(z_loss_weight: float) -> None:
    """Micro-batches divided by the step's token count sum to the loss over all of it."""
    logits = torch.randn(4, 8, 30)
    labels = torch.randint(0, 30, (4, 8))
    whole = causal_lm_loss(logits, labels, z_loss_weight=z_loss_weight)
    parts = [
        causal_lm_loss(
            logits[rows], labels[rows], z_loss_weight=z_loss_weight, num_items_in_batch=torch.tensor(28)
        )
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_uneven_parts_weigh_by_their_tokens() -> None:
    logits = torch.randn(2, 9, 30)
    labels = torch.randint(0, 30, (2, 9))
    labels[0, 2:] = -100
    total = (labels[:, 1:] != -100).sum()
    whole = causal_lm_loss(logits, labels)
    parts = [causal_lm_loss(logits[i : i + 1], labels[i : i + 1], num_items_in_batch=total) for i in (0, 1)]
    torch.testing.assert_close(sum(parts), whole)


def test_nothing_supervised_is_zero_with_a_gradient() -> None:
    logits = torch.randn(1, 4, 10, requires_grad=True)
    loss = causal_lm_loss(logits, torch.full((1, 4), -100))
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(1, 512, 200, dtype=torch.bfloat16)
    labels = torch.randint(0, 200, (1, 512))
    loss = causal_lm_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, causal_lm_loss(logits.float(), labels), atol=1e-6, rtol=0)


def test_model_loss_has_the_z_term_of_its_config() -> None:
    model = tiny_model(z_loss_weight=0.01)
    with torch.no_grad():
        out = model(IDS, labels=IDS)
    z_term = out.logits[:, :-1].amax(-1).square().mean()
    expected = causal_lm_loss(out.logits, IDS) + 0.01 * z_term
    torch.testing.assert_close(out.loss, expected)


# --- the loss in tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.05])
@pytest.mark.parametrize("num_items", [None, 40])
@pytest.mark.parametrize("tile", [16, 2**26 // 300])
def test_tiles_give_the_loss_and_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, z_loss_weight: float, num_items: int | None, tile: int
) -> None:
    monkeypatch.setitem(loss_module.TILE_ELEMENTS, "cpu", tile * 300)
    labels = torch.randint(0, 300, (3, 30))
    labels[0, :20] = -100
    labels[2] = -100
    options = {"z_loss_weight": z_loss_weight, "num_items_in_batch": num_items}

    def gradients(tiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        hidden = torch.randn(3, 30, 16, requires_grad=True)
        weight = torch.randn(300, 16, requires_grad=True)
        if tiled:
            loss = tiled_causal_lm_loss(hidden, weight, labels, **options)
        else:
            loss = causal_lm_loss(hidden @ weight.T, labels, **options)
        (2 * loss).backward()
        return [loss.detach(), hidden.grad, weight.grad]

    for tiled, whole in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(tiled, whole, atol=1e-6, rtol=1e-4)


def test_places_of_labels_need_not_be_asked_for() -> None:
    """The first token of a row is never predicted."""
    labels = torch.randint(0, 300, (3, 30))
    labels[0, :20] = -100
    labels[1, 5:] = -100
    labels[2] = -100
    places = supervised_positions(labels)
    assert places.tolist() == [*range(19, 29), *range(30, 34)]
    weight, found = torch.randn(300, 16), []
    for known in (None, places):
        torch.manual_seed(0)
        hidden = torch.randn(3, 30, 16, requires_grad=True)
        loss = tiled_causal_lm_loss(hidden, weight, labels, supervised=known)
        loss.backward()
        found.append([loss.detach(), hidden.grad])
    assert all(torch.equal(*pair) for pair in zip(*found))


def test_tiles_are_exact_for_a_target_that_was_all_but_impossible() -> None:
    """Its probability, e^-200, is 0 in float32; the loss is not infinite."""
    hidden, weight = torch.tensor([[[100.0], [100.0]]]), torch.tensor([[1.0], [-1.0], [0.5]])
    labels = torch.tensor([[-100, 1]])
    whole = causal_lm_loss(hidden @ weight.T, labels)
    torch.testing.assert_close(tiled_causal_lm_loss(hidden, weight, labels), whole)
    assert whole.item() == pytest.approx(200)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.05])
def test_tiles_in_bfloat16_are_as_good_as_the_whole(z_loss_weight: float) -> None:
    """Judged by float32 over the same numbers."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 20, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    labels = torch.randint(0, 500, (2, 20))

    def gradient(compute: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = hidden.to(dtype).requires_grad_()
        loss = compute(leaf, weight.to(dtype))
        loss.backward()
        return loss.detach().float(), leaf.grad.float()

    def whole(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return causal_lm_loss(states @ head.T, labels, z_loss_weight=z_loss_weight)

    def tiled(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return tiled_causal_lm_loss(states, head, labels, z_loss_weight=z_loss_weight)

    exact = gradient(whole, torch.float32)
    errors = [
        [
            float((got - right).norm() / right.norm())
            for got, right in zip(gradient(how, torch.bfloat16), exact)
        ]
        for how in (tiled, whole)
    ]
    assert errors[0][0] < 1e-3
    assert errors[0][1] < max(1.5 * errors[1][1], 5e-3)


def test_tiles_without_a_label_cost_nothing_and_backpropagate() -> None:
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    loss = tiled_causal_lm_loss(hidden, torch.randn(20, 8), torch.full((1, 5), -100))
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_model_without_logits_gives_the_same_loss(frozen: bool) -> None:
    model = tiny_model(z_loss_weight=0.01).train()
    if frozen:
        model.freeze_head()
    whole = model(IDS, labels=IDS)
    whole.loss.backward()
    expected = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    tiled = model(IDS, labels=IDS, skip_logits=True)
    assert tiled.logits is None
    tiled.loss.backward()
    torch.testing.assert_close(tiled.loss, whole.loss)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, expected, atol=1e-6, rtol=1e-4)
    assert (model.lm_head.stored_weight.grad is None) == frozen
