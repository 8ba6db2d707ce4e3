"""Gradient checkpointing: what is kept of a layer for its backward pass, and where.

A checkpointed layer keeps its input and is computed again in the backward pass. `Checkpointing.keep` names what
is kept beside the input, so that it need not be computed again:

    inputs     nothing
    attention  attention's output: one more hidden state a layer. Worth it in long rows, where attention is dear
    matmul     that, and the products with the base's matrices: what is left to compute again costs next to
               nothing, and about half of a layer's memory is still saved

With `Checkpointing.offload` the layers' inputs are kept in pinned host memory (`HostMemory`).
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from finetune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune.recipe.train_section import Train

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""What a checkpointed layer's forward pass, and its recomputation, run in."""

_ATTENTION = tuple(
    packet.default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if (packet := getattr(torch.ops.aten, name, None)) is not None
)
_OTHER_ATTENTION = ("flash_attn", "varlen_attn")
"""Parts of the names of FlashAttention's operations, and of torch's for documents of differing lengths."""
_MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_QUANTISED_PRODUCTS = (
    "bitsandbytes.int8_scaled_mm",
    "bitsandbytes.int8_linear_matmul",
    "bitsandbytes.gemm_4bit",
)


@dataclass(frozen=True)
class Checkpointing:
    """How layers are checkpointed, where they are.

    Attributes:
        keep: what is kept beside a layer's input.
        offload: whether the inputs are kept in host memory.
    """

    keep: Literal["inputs", "attention", "matmul"] = "inputs"
    offload: bool = False

    @classmethod
    def of(cls, train: Train) -> Checkpointing:
        """What a recipe asks for; of no consequence where it does not checkpoint."""
        keep = train.gradient_checkpointing
        return cls(keep if isinstance(keep, str) else "inputs", train.activation_offloading)

    def applied_to(
        self, checkpoint: partial[Any], *, hidden_size: int, device: torch.device
    ) -> Callable[..., Any]:
        """A checkpointing function that does as these settings say.

        Args:
            checkpoint: torch's, with its settings; a `context_fn` among them is kept.
            hidden_size: of the model: what tells the base's matrices from an adapter's.
            device: where the model computes.

        Raises:
            UserError: if something is to be kept under reentrant checkpointing.
        """
        function: Callable[..., Any] = checkpoint
        if self.keep != "inputs":
            if checkpoint.keywords.get("use_reentrant"):  # trl sets it under ZeRO-3
                raise UserError(
                    f"train.gradient_checkpointing: {self.keep} does not work with DeepSpeed ZeRO-3",
                    hint="set train.gradient_checkpointing to true",
                )
            given = checkpoint.keywords.get("context_fn", _no_contexts)
            function = partial(checkpoint, context_fn=partial(_kept, _policy(self.keep, hidden_size), given))
        if self.offload:
            function = partial(_in_host_memory, HostMemory(device), function)
        return function


def _no_contexts() -> Contexts:
    return nullcontext(), nullcontext()


def _policy(keep: str, hidden_size: int) -> Callable[..., CheckpointPolicy]:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kind = _kind(operation)
        kept = kind == "attention" or (kind is not None and keep == "matmul")
        if kept and kind == "product":
            # LoRA's products have its rank for one side; they are cheap, and would be kept a second time.
            kept = min(args[-1].shape) >= hidden_size
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


@functools.cache  # some thousand operations a step are asked about, of some dozen kinds
def _kind(operation: Any) -> Literal["attention", "product", "quantised product"] | None:
    name = str(operation)
    if operation in _ATTENTION or any(part in name for part in _OTHER_ATTENTION):
        return "attention"
    if name.startswith(_QUANTISED_PRODUCTS):
        return "quantised product"
    return "product" if operation in _MATRIX_PRODUCTS else None


def _kept(policy: Callable[..., CheckpointPolicy], given: Callable[[], Contexts]) -> Contexts:
    """The contexts that keep what the policy says, within those that were given."""
    given_forward, given_again = given()
    forward, again = create_selective_checkpoint_contexts(policy)
    if isinstance(given_forward, nullcontext) and isinstance(given_again, nullcontext):
        return forward, again  # torch.compile wants these themselves
    return _both(given_forward, forward), _both(given_again, again)


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(first)
        stack.enter_context(second)
        yield


# --- host memory --------------------------------------------------------------------------------------------


def _in_host_memory(memory: HostMemory, checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # What a layer saves inside is checkpointing's business: these hooks see what it keeps for itself, its input.
    with saved_tensors_hooks(memory.pack, memory.unpack):
        return checkpoint(*args, **kwargs)


class HostMemory:
    """Where saved tensors wait for the backward pass: in pinned host memory, copied beside the computation.

    A stream of its own copies each tensor out while the next layers run, and back while the layer above it is
    computed again: the backward pass asks for tensors in reverse, so with each one the one that was saved before
    it is fetched. The host never waits, and memory is used again in the order of the computing stream, however
    far the host runs ahead. (trl's OffloadActivations empties the allocator's cache at every step where
    bitsandbytes is installed, which stops the device.)

    Args:
        device: whose tensors are moved. On a CPU they are copied, for tests.
    """

    RESIDENT = 2
    """Tensors on the device whose copy may still be on its way."""

    SMALLEST = 2**20
    """Bytes from which a tensor is moved."""

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self._stream: Any = None
        self._leaving: deque[Callable[[], _Held | None]] = deque()
        self._last: Callable[[], _Held | None] = lambda: None

    @property
    def stream(self) -> Any:
        """The stream of the copies; None on a CPU."""
        if self._stream is None and self.device_type == "cuda":
            self._stream = torch.cuda.Stream()
        return self._stream

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Held:
        """Called by autograd with each tensor that is saved."""
        if tensor.device.type != self.device_type or tensor.nbytes < self.SMALLEST:
            return tensor
        while len(self._leaving) >= self.RESIDENT:
            if (oldest := self._leaving.popleft()()) is not None:
                oldest.leave()
        held = _Held(tensor, self.stream, self._last)
        self._last = weakref.ref(held)
        self._leaving.append(self._last)
        return held

    def unpack(self, packed: torch.Tensor | _Held) -> torch.Tensor:
        """Called by autograd when the tensor is needed."""
        if not isinstance(packed, _Held):
            return packed
        tensor = packed.take()
        if (before := packed.before()) is not None:
            before.fetch()
        return tensor


class _Held:
    """A tensor with a copy in host memory.

    Attributes:
        before: gives the one that was saved before it, while that is still held.
    """

    def __init__(self, tensor: torch.Tensor, stream: Any, before: Callable[[], _Held | None]) -> None:
        self.before, self.device = before, tensor.device
        self._stream = stream
        self._tensor: torch.Tensor | None = tensor
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        self._copied = self._copy(self._host, tensor)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin a copy behind what is queued for now; its event, or None on a CPU, where it is done."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _wait(self) -> None:
        """Have the present stream, not the host, wait for the copy."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def leave(self) -> None:
        """Give the device's memory back."""
        self._wait()
        self._tensor = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self._tensor is None:
            self._tensor = torch.empty_like(self._host, device=self.device)
            self._copied = self._copy(self._tensor, self._host)

    def take(self) -> torch.Tensor:
        """The tensor on its device, ready for the present stream."""
        self.fetch()
        self._wait()
        tensor, self._tensor = self._tensor, None
        assert tensor is not None
        return tensor
