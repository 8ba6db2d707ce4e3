"""What the trainers leave of transformers' own ways: no DataParallel, and a look at every gradient's norm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from finetune.recipe.schema import Recipe
from finetune.train.adapter_training import AdapterTraining
from finetune.train.finite import FiniteGuard
from finetune.train.run_folder import RunFolder
from finetune.train.trainer import training_arguments


def test_one_process_uses_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would split batches over all, with batch_size rows for each."""

    def four_gpus(self: Any) -> torch.device:
        self._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(four_gpus))
    recipe = Recipe(
        **{"name": "x", "stage": "sft", "model": {"base": "b"}, "data": {"train": "t"}},  # type: ignore[arg-type]
        train={"batch_size": 3},  # type: ignore[arg-type]
    )
    arguments = training_arguments(recipe, RunFolder(tmp_path / "run"), evaluates=False)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 3


@pytest.mark.parametrize("norm", [float("nan"), torch.tensor(float("inf")), 1.0, torch.tensor(1.0)])
def test_a_norm_is_looked_at_whatever_it_is(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's is a float."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *_, **__: norm)
    trainer = AdapterTraining.__new__(AdapterTraining)
    trainer.args = SimpleNamespace(fp16=False, device=torch.device("cpu"))  # type: ignore[assignment]
    trainer._guard = SimpleNamespace(saw=seen.append)  # type: ignore[assignment]
    assert trainer._get_grad_norm(None) is norm
    (number,) = seen
    assert torch.isfinite(number) == torch.isfinite(torch.as_tensor(norm))


def test_an_optimiser_that_heeds_no_flag_is_not_trusted_to() -> None:
    """Loading a checkpoint's state turns a fused AdamW into the one that wrote it."""
    weights = [torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(weights, fused=True)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(fp16=False),
        accelerator=SimpleNamespace(num_processes=1),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        state=SimpleNamespace(global_step=0, epoch=0.0),
    )
    for written_by, asks in (
        (torch.optim.AdamW(weights, fused=True), False),
        (torch.optim.AdamW(weights), True),
    ):
        optimizer.load_state_dict(written_by.state_dict())
        guard = FiniteGuard(trainer)
        guard.saw(torch.tensor(float("nan")))
        weights[0].grad = torch.full((2,), float("nan"))
        goes_on = guard.before_step()
        assert goes_on != asks
        if goes_on:
            optimizer.step()
            assert not guard.all_sound()
        assert weights[0].tolist() == [1.0, 1.0]
