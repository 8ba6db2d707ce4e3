"""A training step on torch's meta device: whoever asks it for a value, or mixes in another device, raises.

What runs through there runs on a GPU without the host waiting for it (tests/gpu watches a real one).
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from test_checkpointing import lora_model

from finetune.baichuan.checkpointing import Checkpointing
from finetune.baichuan.documents import Documents
from finetune.baichuan.int8_rows import quantise_embeddings

LENGTH = 64


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("documents", [1, 4])
@pytest.mark.parametrize(
    ("keep", "embeddings", "z_loss_weight"),
    [(None, "full", 0.0), ("inputs", "int8", 0.0), ("attention", "full", 2e-4), ("matmul", "int8", 2e-4)],
)
def test_a_step_asks_for_no_value(
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
    documents: int,
    keep: Any,
    embeddings: str,
    z_loss_weight: float,
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
    model = lora_model(encoding, None if keep is None else Checkpointing(keep))
    base = model.get_base_model()
    base.config.z_loss_weight = z_loss_weight
    base.to(torch.bfloat16)
    if embeddings == "int8":
        quantise_embeddings(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.to("meta")
    ids = torch.zeros(2, LENGTH, dtype=torch.long, device="meta")
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    batch |= {"position_ids": ids} if documents > 1 else {"attention_mask": ids}
    lengths = [LENGTH // documents] * documents * 2
    loss = model(
        **batch,
        documents=Documents(torch.zeros(len(lengths) + 1, dtype=torch.int32, device="meta"), lengths),
        supervised=torch.zeros(100, dtype=torch.long, device="meta"),
        num_items_in_batch=torch.zeros((), dtype=torch.long, device="meta"),
        skip_logits=True,
        use_cache=False,
    ).loss
    assert loss.dtype == torch.float32
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and gradient.is_meta for gradient in gradients)


def test_whoever_asks_raises() -> None:
    """Documents that have to be found are looked for on the device."""
    model = lora_model("rope", None).to("meta")
    ids = torch.zeros(2, LENGTH, dtype=torch.long, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        model(input_ids=ids, attention_mask=ids, use_cache=False)
