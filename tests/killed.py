"""The command line, struck by a signal at a chosen moment of stage ppo.

    python tests/killed.py MOMENT ITERATION SIGNAL run recipe.yaml ...

MOMENT is rollout (responses are half sampled), update (one optimiser step of several is done) or checkpoint (some
of its files are written). With SIGKILL nothing runs after that.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def strike_at(moment: str, iteration: int, number: int) -> None:
    """Have the signal come once."""
    from rlhf.ppo import checkpoint, rollout
    from rlhf.ppo.trainer import PPOTrainer

    running: list[PPOTrainer] = []

    def strike(trainer: PPOTrainer | None) -> None:
        if trainer is not None and trainer.iteration + (moment != "checkpoint") == iteration:
            running.clear()
            os.kill(os.getpid(), number)

    def step(self: Any) -> Any:
        running[:] = [self]
        return original_step(self)

    def generate_batch(*args: Any, **kwargs: Any) -> Any:
        answers = original_generate(*args, **kwargs)
        if moment == "rollout" and running:
            strike(running[0])
        return answers

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        if moment == "update" and running and self.changed:
            strike(self)
        return original_update(self, *args, **kwargs)

    def save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        original_save(content, path, *args, **kwargs)
        if moment == "checkpoint" and Path(path).name == "optimizer.pt" and running:
            strike(running[0])

    original_step, original_update = PPOTrainer.step, PPOTrainer._update
    original_generate, original_save = rollout._generate_batch, checkpoint.torch.save
    PPOTrainer.step, PPOTrainer._update = step, update  # type: ignore[method-assign]
    rollout._generate_batch = generate_batch
    checkpoint.torch.save = save


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import finetune.cli

    moment, iteration, name, *arguments = sys.argv[1:]
    strike_at(moment, int(iteration), signal.Signals[name])
    sys.argv[1:] = arguments
    finetune.cli.main()
