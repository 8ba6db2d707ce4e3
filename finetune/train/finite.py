"""No optimiser step on a loss or gradient that is not a number, found out without the host waiting for the device.

Whether a step is sound is known on the device, after its backward pass. Asking there and then would have the host
wait at every step, and the device for the host after that. torch's fused AdamW takes a flag on the device and
leaves weights and moments as they are where it is set: so the flag goes to the optimiser, stays set from the first
bad step on, and the host reads it when it reads the loss anyway, to log, evaluate or save. By then the host has
gone on; what it counts itself (step, epoch, learning rate) is put back to where the bad step found it.

bitsandbytes' optimisers, float16's loss scaling and FSDP have no such flag for us: there the host asks before each
step. DeepSpeed's engine steps at the end of accelerate's backward pass, before anyone can ask: there the host asks
after each step, of the weights too, nothing is saved of a bad one, and the last checkpoint, which a sound one left,
is what remains.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from finetune.train.adapter_training import AdapterTraining


@dataclass(frozen=True)
class _Counted:
    """What the host counts, before a step."""

    step: int
    epoch: float
    scheduler: dict[str, Any]
    learning_rates: list[float]


class FiniteGuard:
    """Watches the losses and gradient norms of a trainer."""

    def __init__(self, trainer: AdapterTraining) -> None:
        self.trainer = trainer
        self._finite: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None  # sound steps since the last `bad_step`
        self._before: list[_Counted] = []  # of each step since then

    def saw(self, number: torch.Tensor) -> None:
        """A loss or a gradient's norm, on the device."""
        finite = torch.isfinite(number.detach())
        self._finite = finite if self._finite is None else self._finite & finite

    def before_step(self) -> bool:
        """Have the optimiser skip its step if it is not sound, and all after it.

        Returns:
            Whether to go on. Where the optimiser cannot skip by itself this is the answer, which the host has
            waited for; elsewhere it is yes.
        """
        if self._finite is None:
            return True
        trainer = self.trainer
        if trainer.accelerator.num_processes > 1:  # all stop together
            self._finite = trainer.accelerator.reduce((~self._finite).float(), "sum") == 0
        if not self._skips_on_device:
            sound, self._finite = bool(self._finite), None
            return sound
        self._optimizer.found_inf = (~self._finite).float()
        self._taken = self._finite.long() + (0 if self._taken is None else self._taken)
        scheduler, state = trainer.lr_scheduler, trainer.state
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._before.append(
            _Counted(state.global_step, state.epoch or 0.0, copy.deepcopy(scheduler.state_dict()), rates)
        )
        return True

    def all_sound(self) -> bool:
        """Whether every step since the last call was. Waits for the device.

        If not, the trainer's counts are put back to before the first bad step, where weights and moments are.
        """
        if self._taken is None or self._finite is None:
            return True
        taken, before = int(self._taken), self._before
        self._finite, self._taken, self._before = None, None, []
        self._optimizer.found_inf = None
        if taken == len(before):
            return True
        counted, trainer = before[taken], self.trainer
        trainer.state.global_step, trainer.state.epoch = counted.step, counted.epoch
        trainer.lr_scheduler.load_state_dict(counted.scheduler)
        for group, rate in zip(self._optimizer.param_groups, counted.learning_rates):
            group["lr"] = rate
        return False

    @property
    def _optimizer(self) -> Any:
        """torch's own, within accelerate's."""
        return getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)

    @property
    def _skips_on_device(self) -> bool:
        trainer = self.trainer
        plain = not (trainer.args.fp16 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        # A checkpoint of a run whose AdamW was another brings its settings along: then nothing would heed the flag.
        fused = all(group.get("fused") for group in self._optimizer.param_groups)
        return plain and fused and getattr(self._optimizer, "_step_supports_amp_scaling", False)
