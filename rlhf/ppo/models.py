"""The four models of PPO on one frozen base: named LoRA adapters, and heads that read a number.

Actor, critic, reference and reward differ in their adapters only. The base, quantised or not, lies in memory
once, and which of them a forward pass is decides a name:

    models = SharedBase(load_model(...))
    models.add_new("actor", config)
    models.add_copy("reference", of="actor")
    with models.using("actor"):
        hidden = models.hidden(input_ids, attention_mask)

peft's own `set_adapter` also decides what is trainable, which would take the critic's gradients away whenever
the actor runs. Here what is trainable is fixed when an adapter is added, and switching sets a name on each LoRA
layer: no tensor is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

    from finetune.baichuan.modeling import BaichuanForCausalLM


class SharedBase:
    """A frozen base with any number of adapters, of which each forward pass uses one or none.

    Attributes:
        lm: the language model, with LoRA layers in place of its matrices.
        peft: peft's view of it, which saves and loads adapters.
    """

    def __init__(self, lm: BaichuanForCausalLM) -> None:
        self.lm = lm
        lm.requires_grad_(False)
        lm.freeze_head()
        self.peft: Any = None
        self._trainable: dict[str, bool] = {}
        self._layers: list[Any] = []
        self._current: str | None = None

    # ---- adapters ----

    def add_new(self, name: str, config: LoraConfig, *, trainable: bool = True) -> None:
        """A new adapter, which changes nothing yet."""
        if self.peft is None:
            from peft import PeftModel

            self.peft = PeftModel(self.lm, config, adapter_name=name)
        else:
            self.peft.add_adapter(name, config)
        self.register(name, trainable=trainable)

    def add_saved(self, name: str, folder: Path, *, trainable: bool = False) -> None:
        """An adapter from its folder.

        Raises:
            UserError: the folder is no adapter, is damaged, or fits another base.
        """
        from peft import PeftModel

        from finetune.adapters.build import check_adapter_folder

        config = check_adapter_folder(folder)
        if config.get("peft_type") != "LORA":
            raise UserError(
                f"{folder}: an adapter of type {config.get('peft_type')}, expected LORA",
                hint="adapters that are switched on one base have to be LoRA",
            )
        try:
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.lm, str(folder), adapter_name=name)
            else:
                self.peft.load_adapter(str(folder), adapter_name=name)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).strip().splitlines()[:2])[:300]
            raise UserError(
                f"{folder}: this adapter does not fit the base: {reason}",
                hint="its adapter_config.json names the base that it was made for (base_model_name_or_path)",
            ) from error
        self.peft.peft_config[name].base_model_name_or_path = self.lm.name_or_path
        self.register(name, trainable=trainable)

    def add_copy(self, name: str, *, of: str, trainable: bool = False) -> None:
        """An adapter with the configuration and the present weights of another."""
        import copy

        self.add_new(name, copy.deepcopy(self.peft.peft_config[of]), trainable=trainable)
        target = dict(self.named_parameters(name))
        with torch.no_grad():
            for key, parameter in self.named_parameters(of):
                target[key].copy_(parameter)

    def register(self, name: str, *, trainable: bool = False) -> None:
        """Take in an adapter that peft has loaded. Who trains is as asked for, whatever peft thinks."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._trainable[name] = trainable
        self._layers = [layer for layer in self.lm.modules() if isinstance(layer, BaseTunerLayer)]
        for each, train in self._trainable.items():
            for _, parameter in self.named_parameters(each):
                parameter.requires_grad_(train)
                if train:
                    parameter.data = parameter.data.float()
        for layer in self._layers:
            # An unchanged policy must have the ratio 1: PPO trains without dropout.
            for dropout in layer.lora_dropout.values():
                dropout.p = 0.0
        self._switch(None)

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of one adapter, under names that do not contain the adapter's."""
        marker = f".{name}."
        for key, parameter in self.lm.named_parameters():
            if "lora_" in key and (marker in key or key.endswith(f".{name}")):
                yield f"{key}.".replace(marker, ".").rstrip("."), parameter

    def has(self, name: str) -> bool:
        """Whether there is an adapter of this name."""
        return name in self._trainable

    # ---- switching ----

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within: forward passes use this adapter, None is the bare base. Contexts may be nested.

        Raises:
            KeyError: there is no such adapter.
        """
        if name is not None and name not in self._trainable:
            raise KeyError(name)
        before = self._current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        self._current = name
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, with the adapter that the forward pass had.

        The backward pass of a loss of several models runs when none or another of them is active. So each
        checkpointed layer remembers, when it runs forward, which one is.
        """

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), self.using(self._current)

        self.lm.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})

    # ---- forward ----

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states (b, length, hidden_size) after the final norm, of the adapter in use."""
        outputs = self.lm.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return outputs.last_hidden_state

    @property
    def head_weight(self) -> torch.Tensor:
        """The language model's head (vocab_size, hidden_size), rows of unit length for Baichuan 2."""
        return self.lm.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.lm.lm_head.weight.device

    def save(self, name: str, folder: Path) -> None:
        """Write one adapter, under plain peft names, into ``folder`` itself."""
        import shutil
        import tempfile

        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:  # peft adds the adapter's name
            self.peft.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
            folder.mkdir(parents=True, exist_ok=True)
            for path in (Path(temporary) / name).iterdir():
                shutil.move(path, folder / path.name)


class ScalarHead(nn.Module):
    """The critic's head: a float32 number from a hidden state."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1)
        # As the value head of Ziegler et al. 2019: small, so that the first values are near 0.
        nn.init.normal_(self.score.weight, std=(hidden_size + 1) ** -0.5)
        nn.init.zeros_(self.score.bias)

    @torch.no_grad()
    def begin_as(self, weight: torch.Tensor, *, mean: float, std: float) -> None:
        """Give the normalised score of a reward head, (hidden · weight − mean) / std."""
        self.score.weight.copy_(weight[None] / std)
        self.score.bias.fill_(-mean / std)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) of any dtype → (…), float32; outside of autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.float())[..., 0]
