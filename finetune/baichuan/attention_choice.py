"""Which attention implementation a run uses: `model.attention`.

`auto` takes the first that the machine offers and that passes a self-test, of

- on a CPU: SDPA. FlexAttention has no backward pass there, and there is no FlashAttention.
- on a GPU in float32: SDPA, FlashAttention computes in 16 bits only.
- on a GPU in 16 bits, RoPE: FlashAttention 3 (on the Hopper cards it is written for), FlashAttention 2, SDPA.
- on a GPU in 16 bits, ALiBi: FlashAttention 2, the only one that knows ALiBi, so that a head stays 128 wide;
  FlashAttention 3 (Hopper) and SDPA, by whose kernels the folded 136 are computed as 192; the limit is 256.

FlexAttention is taken only where a recipe names it: it compiles for each new shape. The order on GPUs follows
what the libraries document; `benchmarks/attention.py` measures it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from finetune.baichuan import attend
from finetune.baichuan.attend import ALLOWED_ERROR, HALF, brief, relative_error
from finetune.baichuan.attention import ALIBI_DIMS
from finetune.baichuan.configuration import BaichuanConfig
from finetune.errors import UserError

AUTO_ON_GPU = {
    "rope": ("flash_attention_3", "flash_attention_2"),
    "alibi": ("flash_attention_2", "flash_attention_3"),
}
HIDDEN = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attention:
    """What was chosen.

    Attributes:
        implementation: as transformers calls it.
        reason: why, in a few words.
    """

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})"


def check_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an implementation that is not installed, or that cannot do what it is wanted for.

    Raises:
        UserError: naming the remedy.
    """
    found = _obstacle(wanted, device, dtype)
    if found is not None:
        obstacle, remedy = found
        raise UserError(f"model.attention: {wanted} is not available here: {obstacle}", hint=remedy)


@functools.lru_cache
def choose_attention(
    wanted: str, device: torch.device, dtype: torch.dtype, encoding: str, *, compiled: bool = False
) -> Attention:
    """The attention implementation for a model.

    Args:
        wanted: `model.attention` of a recipe.
        device: where the model will compute.
        dtype: in which precision.
        encoding: the model's positions, ``rope`` or ``alibi``.
        compiled: whether layers are compiled. They are told of documents by a mask, which FlashAttention cannot
            read: `auto` is SDPA then.

    Raises:
        UserError: one is named that is not installed, cannot do this, or fails its self-test.
    """
    if wanted != "auto":
        check_attention(wanted, device, dtype)
        if wanted not in ("eager", "sdpa") and (failure := _failure(wanted, device, dtype, encoding)):
            raise UserError(
                f"model.attention: {wanted} is installed but fails its self-test: {failure}",
                hint="install it again for this version of torch, or use model.attention=auto",
            )
        return Attention(wanted, "as the recipe says")
    if compiled:
        return Attention("sdpa", "which compiled layers can tell packed documents apart with, by a mask")
    failures = []
    for name in AUTO_ON_GPU[encoding] if device.type == "cuda" else ():
        if _obstacle(name, device, dtype) or (name == "flash_attention_3" and not _is_hopper(device)):
            continue
        failure = _failure(name, device, dtype, encoding)
        if failure is None:
            return Attention(name, f"installed, and right in a self-test of {encoding} on this GPU")
        failures.append(f"; {name} is installed but fails its self-test")
        logger.warning("%s is not used, it fails its self-test: %s", name, failure)
    return Attention("sdpa", _about_sdpa(device, dtype, encoding) + "".join(failures))


def _about_sdpa(device: torch.device, dtype: torch.dtype, encoding: str) -> str:
    if device.type != "cuda":
        return "torch's kernel, packed documents one after another, no mask"
    head_dim = 128 + (ALIBI_DIMS if encoding == "alibi" else 0)
    packed = (
        "in one call"
        if dtype in HALF and attend.varlen_works(device, dtype, head_dim)
        else "one after another"
    )
    return f"torch's kernels, packed documents {packed}, no mask"


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str] | None:
    """What is in the way of an implementation, and the remedy; None if nothing is."""
    use_auto = "use model.attention=auto"
    if name.startswith("flash_attention"):
        if device.type != "cuda":
            return f"it needs a GPU, and this is {device.type}", use_auto
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 (Ampere) or newer", use_auto
        if dtype not in HALF:
            return (
                f"it computes in 16 bits only, and model.dtype is {str(dtype).removeprefix('torch.')}",
                f"set model.dtype to bfloat16, or {use_auto}",
            )
        package, install, installed = _PACKAGES[name]
        if not installed():
            return f"{package} is not installed", f"{install}, or {use_auto}"
    if name == "flex_attention":
        if device.type != "cuda":
            return f"torch has no backward pass of it for {device.type}", use_auto
        from torch.utils._triton import has_triton

        if not has_triton():
            return "it is compiled by triton, which is not there or does not know this GPU", use_auto
    return None


def _flash_2_installed() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def _flash_3_installed() -> bool:
    from transformers.utils import is_flash_attn_3_available

    return bool(is_flash_attn_3_available())


_PACKAGES: dict[str, tuple[str, str, Callable[[], bool]]] = {
    "flash_attention_2": (
        "the package flash-attn",
        "pip install flash-attn --no-build-isolation",
        _flash_2_installed,
    ),
    "flash_attention_3": (
        "the package flash-attn-3",
        "pip install ./hopper --no-build-isolation in a checkout of flash-attention",
        _flash_3_installed,
    ),
}


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _failure(name: str, device: torch.device, dtype: torch.dtype, encoding: str) -> str | None:
    """What is wrong with an implementation on this device, or None: `self_test` with its exceptions caught."""
    try:
        errors = dict(self_test(name, device, dtype, encoding))
    except Exception as error:  # whatever a package built for another torch raises
        return brief(error)
    wrong = [f"{what} {error:.2f}" for what, error in errors.items() if not error < ALLOWED_ERROR]
    return f"relative errors: {', '.join(wrong)}" if wrong else None


def self_test(
    name: str, device: torch.device, dtype: torch.dtype, encoding: str
) -> Iterator[tuple[str, float]]:
    """Relative errors of an implementation against eager attention in float32, in a layer of random weights.

    Heads are as wide as the released models'. Packed rows, padded rows (outputs and gradients) and a step with a
    cache are tried.

    Args:
        name: the implementation.
        device: to try it on.
        dtype: to try it in.
        encoding: ``rope`` or ``alibi``.

    Yields:
        what was tried, and its error.
    """
    from finetune.baichuan.modeling import BaichuanModel

    def model_of(implementation: str) -> BaichuanModel:
        config = BaichuanConfig(
            vocab_size=8,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.1,
            position_embedding=encoding,
        )
        model = BaichuanModel(config).to(device)
        model.set_attn_implementation(implementation)
        return model

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        tried, exact = model_of(name).to(dtype), model_of("eager").float()
        embeddings = torch.randn(2, 160, HIDDEN).to(device, dtype)
    exact.load_state_dict(tried.state_dict())

    ones = torch.ones(2, 160, dtype=torch.long, device=device)
    positions = ones.cumsum(-1) - 1
    starts = torch.tensor([[0, 70], [0, 33]], device=device).repeat_interleave(
        torch.tensor([70, 90], device=device), dim=1
    )
    packed = {"position_ids": torch.where(starts == starts[:, :1], positions, positions - starts)}
    padded = ones.clone()
    padded[1, 90:] = 0
    yield from _compare(tried, exact, "packed rows", embeddings, ones, packed)
    yield from _compare(tried, exact, "padded rows", embeddings, padded, {"attention_mask": padded})

    left = padded.flip(-1)
    outputs = []
    with torch.no_grad():
        for model in (tried, exact):
            given = embeddings.to(next(model.parameters()).dtype)
            first = model(inputs_embeds=given[:, :-1], attention_mask=left[:, :-1], use_cache=True)
            last = model(
                inputs_embeds=given[:, -1:],
                attention_mask=left,
                past_key_values=first.past_key_values,
                use_cache=True,
            )
            outputs.append(last.last_hidden_state)
    yield "generation", relative_error(*outputs)


def _compare(
    tried: Any, exact: Any, what: str, embeddings: torch.Tensor, real: torch.Tensor, given: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    results = []
    with torch.enable_grad():
        for model in (tried, exact):
            dtype = next(model.parameters()).dtype
            inputs = embeddings.to(dtype).detach().requires_grad_()
            output = model(inputs_embeds=inputs, use_cache=False, **given).last_hidden_state[real == 1]
            weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
            (gradient,) = torch.autograd.grad((output.float() * weights).sum(), inputs)
            results.append((output.detach(), gradient[real == 1]))
    for part, one, other in zip(("", ", gradient"), *results, strict=True):
        yield what + part, relative_error(one, other)
