"""Compiled layers: the same gradients, one graph for all layers, and no new one at every step."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from test_checkpointing import Operations, lora_model
from tiny_model import tiny_model
from tiny_run import finetune, losses, write_recipe
from torch._dynamo.utils import counters

from finetune.baichuan.checkpointing import Checkpointing
from finetune.baichuan.compiling import compile_layers


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and differentiated as always, then run without a code generator, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(model: Any, length: int, *, documents: int) -> dict[str, torch.Tensor]:
    """Gradients of a step on two rows of packed documents."""
    ids = torch.arange(1200, 1200 + 2 * length).view(2, length)
    positions = (torch.arange(length) % (length // documents)).repeat(2, 1)
    loss = model(input_ids=ids, position_ids=positions, labels=ids, skip_logits=True, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("keep", [None, "inputs", "matmul"])
def test_gradients_and_graphs(encoding: str, keep: Any) -> None:
    checkpointing = None if keep is None else Checkpointing(keep)
    plain, compiled = (
        lora_model(encoding, checkpointing, num_hidden_layers=3, dropout=0.0) for _ in range(2)
    )
    compile_layers(compiled.get_base_model())
    graphs = []
    for length, documents in ((32, 2), (48, 3), (64, 1), (40, 4), (56, 2), (32, 4)):
        expected, found = (step(model, length, documents=documents) for model in (plain, compiled))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 1  # for all layers
    assert graphs[-1] == graphs[2] <= 3  # once lengths are known to vary
    assert not counters["graph_break"]


@pytest.mark.parametrize("keep", ["attention", "matmul"])
def test_what_checkpointing_keeps_is_kept_within(keep: Any) -> None:
    """Not computed again: transformers 5.17 checkpoints around a layer's call, later versions within it."""
    found = []
    for compiled in (False, True):
        model = lora_model("rope", Checkpointing(keep), dropout=0.0)
        if compiled:
            compile_layers(model.get_base_model())
        ids = torch.arange(1200, 1264).view(2, 32)
        loss = model(input_ids=ids, labels=ids, skip_logits=True, use_cache=False).loss
        with Operations() as counted:
            loss.backward()
        found.append(counted)
    plain, compiled_layers = found
    assert compiled_layers.attentions == plain.attentions == 0
    if keep == "matmul":
        assert compiled_layers.large_products == plain.large_products


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_is_no_new_graph(encoding: str, projected: bool) -> None:
    """Though its cache is another object at each step. The first layer, whose input learns nothing, is a second."""

    def prefix_model() -> Any:
        settings = PrefixTuningConfig(
            num_virtual_tokens=5, prefix_projection=projected, task_type="CAUSAL_LM", encoder_hidden_size=16
        )
        torch.manual_seed(3)
        return get_peft_model(tiny_model(encoding, num_hidden_layers=3), settings).train()

    plain, compiled = prefix_model(), prefix_model()
    compile_layers(compiled.get_base_model())
    graphs = []
    for length, padding in ((32, 4), (48, 0), (64, 9), (40, 1), (56, 7)):
        ids = torch.arange(1200, 1200 + 2 * length).view(2, length)
        mask = torch.ones_like(ids)
        mask[1, length - padding :] = 0
        gradients = []
        for model in (plain, compiled):
            model(input_ids=ids, attention_mask=mask, labels=ids, skip_logits=True).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
            model.zero_grad()
        assert gradients[0]
        for expected, found in zip(*gradients, strict=True):
            assert expected.any()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 4, 4, 4, 4]  # the second time with lengths left open
    assert not counters["graph_break"]


def test_a_cache_that_the_call_makes_and_copies_of_a_model() -> None:
    model = lora_model("rope", None, dropout=0.0).train()
    compile_layers(model.get_base_model())
    ids = torch.arange(1200, 1212)[None]
    expected = model(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(model(ids, labels=ids, use_cache=True).loss, expected)
    again = pickle.loads(pickle.dumps(model.get_base_model().model.layers[0]))
    assert again.compiled is None


def test_generation_and_evaluation_are_not_compiled() -> None:
    model = lora_model("rope", None, dropout=0.0).eval()
    compile_layers(model.get_base_model())
    ids = torch.arange(1200, 1212)[None]
    expected = lora_model("rope", None, dropout=0.0).eval()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    assert torch.equal(model.generate(input_ids=ids, **options), expected.generate(input_ids=ids, **options))
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, expected.train()(ids).logits)
    assert counters["stats"].get("unique_graphs", 0) == 0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_learns(tiny_base: Path, tmp_path: Path, quantization: str) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_base,
        model={"base": str(tiny_base), "quantization": quantization},
        data={"packing": True},
        train={"compile": True, "max_steps": 16, "learning_rate": 2e-2},
    )
    finetune("run", recipe)
    course = losses(tmp_path / "run")
    assert min(course[-3:]) < 0.9 * course[0], course
