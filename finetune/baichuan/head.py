"""The head of Baichuan 2, whose vocabulary rows have unit length."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.utils.import_utils import is_torchdynamo_compiling


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """The whole of a parameter that ZeRO-3 has cut up; what is changed within is written back."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


class UnitRowHead(nn.Linear):
    """The head of Baichuan 2: logits are hidden · W/‖W‖, each vocabulary row normalised.

    The report calls it NormHead; accelerate's FSDP takes any class with "Norm" in its name for the final norm
    and would shard it twice.

    ``weight`` *reads* as the normalised matrix, with the gradient flowing to the stored one. So libraries that
    multiply by ``lm_head.weight`` themselves (trl's trainers, fused losses) get the right product too. The
    stored parameter keeps its name and values in ``state_dict``. Once `normalize_` has been called, which the
    toolkit does wherever the head is frozen, reading costs nothing.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        self.normalized = False
        self._norms: tuple[Any, torch.Tensor] | None = None
        super().__init__(hidden_size, vocab_size, bias=False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Rows of unit length, (vocab_size, hidden_size)."""
        stored = self.__dict__.get("_parameters", {}).get("weight")
        if stored is None:
            raise AttributeError("weight")
        return stored if self.normalized else nn.functional.normalize(stored)

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self.register_parameter("weight", value)

    def reset_parameters(self) -> None:
        """Initialise the stored rows; the base class would fill the copy that reading ``weight`` gives."""
        nn.init.kaiming_uniform_(self.stored_weight, a=math.sqrt(5))

    @property
    def stored_weight(self) -> nn.Parameter:
        """The parameter as it is stored, (vocab_size, hidden_size)."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (…, vocab_size) of hidden states (…, hidden_size)."""
        if self.normalized or torch.is_grad_enabled() or is_torchdynamo_compiling():
            return nn.functional.linear(hidden_states, self.weight)
        # Whoever generates with a head that was never frozen pays for its norms once, not at every token.
        logits = nn.functional.linear(hidden_states, self.stored_weight)
        return logits / self._row_norms().to(logits.dtype)

    def _row_norms(self) -> torch.Tensor:
        """Lengths of the stored rows, float32 of shape (vocab_size,), kept until the rows change."""
        stored = self.stored_weight
        state = None if stored.is_inference() else (stored.data_ptr(), stored._version)
        if self._norms is None or state is None or self._norms[0] != state:
            norms = torch.linalg.vector_norm(stored, dim=1, dtype=torch.float32).clamp(min=1e-12)
            self._norms = (state, norms)
        return self._norms[1]

    @torch.no_grad()
    def normalize_(self) -> None:
        """Normalise the stored rows in place; doing it twice changes nothing."""
        stored = self.stored_weight
        if self.normalized or stored.is_meta:
            return
        step = 16_384  # rows at a time: no second copy of the head
        with _gathered(stored):
            for start in range(0, stored.shape[0], step):
                rows = stored[start : start + step]
                rows.copy_(nn.functional.normalize(rows.float()).to(rows.dtype))
        self.normalized = True
