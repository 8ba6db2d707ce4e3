"""All that a PPO run needs to go on as if it had never stopped, in a folder that is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune.errors import UserError
from finetune.files import write_text
from finetune.train.run_folder import TRAINABLE_FILE, RunFolder, step_of
from finetune.words import plural
from rlhf.ppo.inputs import check_inputs
from rlhf.ppo.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer

STATE_FILE = "trainer_state.json"


def save_checkpoint(trainer: PPOTrainer, run: RunFolder, *, keep: int) -> Path:
    """Write ``checkpoints/step-N`` for the N iterations done, by all processes together.

    Args:
        keep: so many checkpoints remain.

    Returns:
        The folder.

    Raises:
        UserError: the disk is full.
    """
    # Parameters, perhaps their average, and two moments of each.
    needed = 4 * sum(p.nbytes for _, p, _ in _parameters(trainer))
    with run.writing(needed) as staging:
        return _write(trainer, run, staging, keep=keep)


def _write(trainer: PPOTrainer, run: RunFolder, staging: Path, *, keep: int) -> Path:
    accelerator = trainer.accelerator
    final = run.checkpoints / f"step-{trainer.iteration}"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save(trainer.random_state or random_state(), staging / _random_file(trainer))
    if accelerator.is_main_process:
        _write_state(trainer, staging)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for (
            path
        ) in staging.iterdir():  # the disk holds the files before the rename says that they are complete
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        for folder in sorted(run.checkpoints.glob("step-*"), key=step_of)[:-keep]:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    return final


def _write_state(trainer: PPOTrainer, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}:{key}": p.detach() for name, p, key in _parameters(trainer)}
    tensors |= {f"average:{key}": average for key, average in trainer.average.items()}
    save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, folder / TRAINABLE_FILE)
    torch.save({k: o.state_dict() for k, o in trainer.optimizers.items()}, folder / "optimizer.pt")
    torch.save({k: s.state_dict() for k, s in trainer.schedulers.items()}, folder / "scheduler.pt")
    state = {
        "iteration": trainer.iteration,
        "kl_coef": trainer.kl_coef,
        "tokens": trainer.tokens,
        "combination": trainer.rewards.combine.state_dict(),
        "processes": trainer.accelerator.num_processes,
        "inputs": trainer.inputs,
    }
    write_text(folder / STATE_FILE, json.dumps(state, indent=2) + "\n")


def load_checkpoint(trainer: PPOTrainer, folder: Path) -> None:
    """Put a trainer into the state of a checkpoint.

    Raises:
        UserError: it is of another shape, of another number of processes, or of other inputs.
    """
    from safetensors.torch import load_file

    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    processes = trainer.accelerator.num_processes
    if (wrote := state["processes"]) != processes:
        raise UserError(
            f"{folder}: written by {plural(wrote, 'process', 'processes')}, and this run has {processes}",
            hint=f"resume with --processes {wrote}, since each has random numbers of its own",
        )
    check_inputs(trainer.inputs, state["inputs"], checkpoint=folder)
    saved = load_file(folder / TRAINABLE_FILE)
    wanted = {f"{name}:{key}": p for name, p, key in _parameters(trainer)}
    wanted |= {f"average:{key}": average for key, average in trainer.average.items()}
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in wanted.items()}:
        raise UserError(
            f"{folder}: its adapters are not those of this recipe",
            hint="restore the recipe, or start again with --overwrite",
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(saved[key])
    for part, file in ((trainer.optimizers, "optimizer.pt"), (trainer.schedulers, "scheduler.pt")):
        states = torch.load(folder / file, map_location="cpu", weights_only=True)
        for name, each in part.items():
            each.load_state_dict(states[name])
    trainer.iteration, trainer.tokens = state["iteration"], state["tokens"]
    trainer.kl_coef = state["kl_coef"]
    trainer.engine.actor_changed()
    trainer.rewards.combine.load_state_dict(state["combination"])
    set_random_state(torch.load(folder / _random_file(trainer), map_location="cpu", weights_only=True))


def _parameters(trainer: PPOTrainer) -> list[tuple[str, torch.nn.Parameter, str]]:
    return [(name, p, key) for name, each in trainer.parameters.items() for key, p in each.items()]


def _random_file(trainer: PPOTrainer) -> str:
    accelerator = trainer.accelerator
    return "rng_state.pth" if accelerator.num_processes == 1 else f"rng_state_{accelerator.process_index}.pth"
