"""What the trainers leave of transformers' own ways: no DataParallel, and a look at every gradient's norm."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from tiny_run import write_recipe
from transformers import Trainer, TrainingArguments

from finetune.baichuan import cpu_matmul
from finetune.recipe import load_recipe
from finetune.recipe.schema import Recipe
from finetune.train.adapter_training import AdapterTraining, NotFinite
from finetune.train.finite import FiniteGuard
from finetune.train.run_folder import RunFolder
from finetune.train.runner import run_stage
from finetune.train.trainer import AdapterTrainer, training_arguments


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


def test_training_and_evaluation_multiply_by_the_faster_library(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_matmul, "onednn_is_better", lambda: True)
    monkeypatch.setattr(cpu_matmul, "MIN_HIDDEN_SIZE", 1)
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    compute_loss = AdapterTrainer.compute_loss

    def look(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen[self.model.training].add(torch.backends.mkldnn.matmul.fp32_precision)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", look)
    recipe: Any = load_recipe(
        write_recipe(tmp_path, tiny_base), ["train.max_steps=2", "data.validation_share=0.25"]
    )
    run_stage(recipe, resume=False, overwrite=False)
    assert seen == {True: {"bf16"}, False: {"bf16"}}
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.parametrize("norm", [float("nan"), torch.tensor(float("inf")), -1.0, 1.0, torch.tensor(1.0)])
def test_a_norm_is_looked_at_whatever_it_is(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's is a float, and -1 where it is not finite."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *_, **__: norm)
    trainer = AdapterTraining.__new__(AdapterTraining)
    trainer.args = SimpleNamespace(fp16=False, device=torch.device("cpu"))  # type: ignore[assignment]
    trainer._guard = SimpleNamespace(saw=seen.append)  # type: ignore[assignment]
    trainer.is_deepspeed_enabled = False
    assert trainer._get_grad_norm(None) is norm
    (number,) = seen
    assert torch.isfinite(number) == (torch.as_tensor(norm) == 1)


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


class Engine:
    """As much of DeepSpeed's as accelerate calls: its step is a part of the backward pass."""

    def __init__(self, weight: torch.nn.Parameter, told: float) -> None:
        self.weight, self.optimizer = weight, torch.optim.SGD([weight], lr=1.0)
        self.norm, self.told = 0.0, told

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        assert is_boundary

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        assert self.weight.grad is not None
        norm = float(self.weight.grad.norm())
        self.norm = norm if math.isfinite(norm) else self.told
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> float:
        return self.norm


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize(
    ("bad", "told"), [("loss", -1.0), ("gradient", -1.0), ("gradient", 1.0), ("gradient", math.inf)]
)
def test_deepspeed_has_stepped_when_we_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, told: float, checkpoint: bool
) -> None:
    """So nothing is saved of a step that is not sound, and the message names what was saved before it."""
    weight = torch.nn.Parameter(torch.ones(2))
    engine = Engine(weight, told)
    wrapped = DeepSpeedEngineWrapper(engine)
    run = RunFolder(tmp_path / "run")
    last = run.checkpoints / "step-2"
    trainer: Any = AdapterTraining.__new__(AdapterTraining)
    saved: list[int] = []
    trainer.__dict__ |= {
        "args": SimpleNamespace(fp16=False, device=torch.device("cpu")),
        "accelerator": SimpleNamespace(num_processes=1),
        "is_fsdp_enabled": False,
        "is_deepspeed_enabled": True,
        "optimizer": SimpleNamespace(optimizer=engine.optimizer, zero_grad=lambda **_: None),
        "state": SimpleNamespace(global_step=3),
        "model": None,
        "run": run,
        "_save_checkpoint": lambda *_: saved.append(3),
        "_trainable": lambda: [("weight", weight)],
    }
    trainer._guard = FiniteGuard(trainer)
    monkeypatch.setattr(RunFolder, "last_checkpoint", lambda _: last if checkpoint else None)

    def training_step(self: Any, factor: torch.Tensor) -> torch.Tensor:
        loss = (weight * factor).sum()
        # A loss may be fine where its gradient is not: the root of nought.
        loss = loss + (weight[0] * 0).sqrt() if bad == "gradient" and factor > 1 else loss
        wrapped.backward(loss)
        return loss.detach()

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *_, **__: wrapped.get_global_grad_norm())
    trainer.training_step(torch.tensor(0.5))
    trainer._get_grad_norm(None)
    trainer.before_optimizer_step()  # sound
    assert weight.isfinite().all()
    trainer.training_step(torch.tensor(float("nan") if bad == "loss" else 2.0))
    trainer._get_grad_norm(None)
    assert not weight.isfinite().all()
    remains = last if checkpoint else "none"
    with pytest.raises(NotFinite, match=rf"of step 4 is not a number.* before it is {remains}\n"):
        trainer.before_optimizer_step()
    assert not saved
