"""What gradient checkpointing keeps changes memory and time, and no gradient."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_model import HIDDEN, LAYERS, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from finetune.baichuan import attend
from finetune.baichuan.checkpointing import Checkpointing, HostMemory, _policy
from finetune.errors import UserError

IDS = torch.arange(1200, 1264).view(2, 32)
POSITIONS = torch.arange(32).repeat(2, 1) % 20  # two documents to a row
DOCUMENTS = 4


def lora_model(
    encoding: str, checkpointing: Checkpointing | None, *, dropout: float = 0.1, **changes: Any
) -> Any:
    """A tiny model with LoRA that trains, layers checkpointed as asked for."""
    model = tiny_model(encoding, **changes)
    model.requires_grad_(False)
    model.freeze_head()
    config = LoraConfig(
        r=4, lora_dropout=dropout, init_lora_weights=False,
        target_modules=["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft_model = get_peft_model(model, config)
    peft_model.enable_input_require_grads()
    if checkpointing is not None:
        model.checkpointing = checkpointing
        peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    return peft_model.train()


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = self.large_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.attentions += "scaled_dot_product" in name and "backward" not in name
        self.large_products += name == "aten.mm.default" and min(args[1].shape) >= HIDDEN
        return func(*args, **(kwargs or {}))


def step(model: Any) -> tuple[dict[str, torch.Tensor], Operations]:
    """Gradients of one step, and what its backward pass computed; dropout is drawn alike every time."""
    torch.manual_seed(7)
    loss = model(input_ids=IDS, position_ids=POSITIONS, labels=IDS, skip_logits=True, use_cache=False).loss
    with Operations() as counted:
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return gradients, counted


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("keep", ["inputs", "attention", "matmul"])
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_those_without_checkpointing(
    monkeypatch: pytest.MonkeyPatch, encoding: str, keep: Any, offload: bool
) -> None:
    monkeypatch.setattr(HostMemory, "SMALLEST", 1)
    expected, plain = step(lora_model(encoding, None))
    found, counted = step(lora_model(encoding, Checkpointing(keep, offload)))
    assert all(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    again = {"inputs": (DOCUMENTS * LAYERS, 5 * LAYERS), "attention": (0, 5 * LAYERS), "matmul": (0, 0)}[keep]
    assert counted.attentions - plain.attentions == again[0]
    assert counted.large_products - plain.large_products == again[1]


@pytest.mark.parametrize("keep", ["attention", "matmul"])
def test_attention_in_one_call_for_all_documents_is_kept(keep: str) -> None:
    """What packed rows take on a GPU: torch's operation, by the name that it has there."""
    import torch.nn.attention.varlen

    operation = torch.ops.torch_attn._varlen_attn.default
    assert _policy(keep, HIDDEN)(None, operation) == CheckpointPolicy.MUST_SAVE
    assert _policy(keep, HIDDEN)(None, torch.ops.aten.add.Tensor) == CheckpointPolicy.PREFER_RECOMPUTE


def test_given_contexts_are_kept() -> None:
    """PPO has each layer computed again under the adapter that it ran with."""
    entered: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            entered.append(self.name)

        def __exit__(self, *exception: object) -> None:
            pass

    model = lora_model("rope", None)
    base = model.get_base_model()
    base.checkpointing = Checkpointing("matmul")
    contexts = lambda: (Noted("forward"), Noted("again"))  # noqa: E731
    base.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    found, _ = step(model)
    assert entered == ["forward"] * LAYERS + ["again"] * LAYERS
    expected, _ = step(lora_model("rope", None))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_reentrant_checkpointing_keeps_nothing() -> None:
    with pytest.raises(UserError, match="does not work with DeepSpeed ZeRO-3"):
        Checkpointing("attention").applied_to(
            partial(checkpoint, use_reentrant=True), hidden_size=HIDDEN, device=torch.device("cpu")
        )


# --- host memory --------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """Moves tensors of 40 bytes and more."""
    monkeypatch.setattr(HostMemory, "SMALLEST", 40)
    return HostMemory(torch.device("cpu"))


def test_host_memory_gives_back_what_it_took(memory: HostMemory) -> None:
    """Whatever the layout; and in any order, more than once."""
    tensors = [torch.randn(4, 6), torch.randn(6, 4).T, torch.randn(3, 8)[:, ::2], torch.randn(20).bfloat16()]
    packed = [memory.pack(tensor) for tensor in tensors]
    for order in ([3, 2, 1, 0], [0, 2, 1, 3, 3]):
        for at in order:
            assert torch.equal(memory.unpack(packed[at]), tensors[at])
            assert memory.unpack(packed[at]).dtype == tensors[at].dtype


def test_tensors_leave_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP has the weights in host memory when checkpointing is switched on."""
    from finetune.baichuan import load

    monkeypatch.setattr(load, "pick_device", lambda: torch.device("cuda", 1))
    model = tiny_model("rope")
    model.checkpointing = Checkpointing(offload=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    held_by: Any = model.model.layers[0]._gradient_checkpointing_func
    assert held_by.args[0].device_type == "cuda"


@pytest.mark.parametrize("keep", ["inputs", "matmul"])
def test_each_layer_has_its_input_moved_and_nothing_else(monkeypatch: pytest.MonkeyPatch, keep: Any) -> None:
    monkeypatch.setattr(HostMemory, "SMALLEST", 1)
    moved: list[tuple[int, ...]] = []
    pack = HostMemory.pack

    def noted(self: HostMemory, tensor: torch.Tensor) -> Any:
        moved.append(tuple(tensor.shape))
        return pack(self, tensor)

    monkeypatch.setattr(HostMemory, "pack", noted)
    step(lora_model("rope", Checkpointing(keep, offload=True)))
    assert moved == [(*IDS.shape, HIDDEN)] * LAYERS


def test_small_tensors_stay_where_they_are(memory: HostMemory) -> None:
    small, large = torch.zeros(9), torch.zeros(10)
    assert memory.pack(small) is small
    assert memory.pack(large) is not large


def test_tensors_leave_the_device_and_come_back_one_ahead(memory: HostMemory) -> None:
    """Of six tensors two are on the device after the forward pass, and at most two while they are taken."""
    packed: list[Any] = [memory.pack(torch.full((10,), float(n))) for n in range(6)]

    def resident() -> list[int]:
        return [n for n, held in enumerate(packed) if held is not None and held._tensor is not None]

    assert resident() == [4, 5]
    for n in reversed(range(6)):
        taken = memory.unpack(packed[n])
        assert taken.tolist() == [float(n)] * 10
        assert resident() == ([n - 1] if n else [])
        packed[n] = None
    del taken
    gc.collect()
    assert memory._last() is None  # a step leaves nothing behind


@pytest.mark.parametrize("keep", ["inputs", "attention"])
def test_a_kernel_is_tried_apart_from_the_layer_that_asks(monkeypatch: pytest.MonkeyPatch, keep: Any) -> None:
    """Within a checkpointed layer whether a kernel works is found out once, in the first of its two passes."""

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Any, scaling: float
    ) -> torch.Tensor:
        return attend.each_document(q, k, v, documents.lengths, scaling)

    asked: list[bool] = []
    attention = attend.documents_attention

    def asking(*args: Any) -> torch.Tensor:
        asked.append(attend.varlen_works(torch.device("cpu"), torch.float32, 16))
        return attention(*args)

    monkeypatch.setattr(attend, "varlen", kernel)
    monkeypatch.setattr(attend, "documents_attention", asking)
    expected, _ = step(lora_model("rope", None))
    asked.clear()
    attend.varlen_works.cache_clear()
    found, _ = step(lora_model("rope", Checkpointing(keep)))
    assert asked == [True] * 2 * LAYERS
    assert attend.varlen_works.cache_info().misses == 1
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
