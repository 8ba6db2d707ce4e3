"""`model.attention`: what is chosen, what is refused with which remedy, and what a self-test sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from finetune.baichuan import attend, attention_choice
from finetune.baichuan.attention import ALIBI_DIMS
from finetune.baichuan.attention_choice import check_attention, choose_attention, self_test
from finetune.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FLASH = ("flash_attention_2", "flash_attention_3")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    choose_attention.cache_clear()
    attend.varlen_works.cache_clear()
    yield
    choose_attention.cache_clear()
    attend.varlen_works.cache_clear()


class Card:
    """A GPU that is not there: what is installed for it, and what fails on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.installed, self.failing = (9, 0), set(FLASH), set[str]()
        self.tried: list[str] = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: self.capability)
        packages = {
            name: (package, install, lambda name=name: name in self.installed)
            for name, (package, install, _) in attention_choice._PACKAGES.items()
        }
        monkeypatch.setattr(attention_choice, "_PACKAGES", packages)
        monkeypatch.setattr(attention_choice, "self_test", self.self_test)
        monkeypatch.setattr(attend, "varlen_works", lambda *_: True)

    def self_test(self, name: str, *_: Any) -> Iterator[tuple[str, float]]:
        self.tried.append(name)
        yield "packed rows", 0.5 if name in self.failing else 0.01

    def auto(self, encoding: str, dtype: torch.dtype = torch.bfloat16) -> str:
        choose_attention.cache_clear()
        return choose_attention("auto", GPU, dtype, encoding).implementation


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_a_cpu_has_sdpa(encoding: str) -> None:
    chosen = choose_attention("auto", CPU, torch.float32, encoding)
    assert chosen.implementation == "sdpa"
    assert "no mask" in chosen.reason
    assert choose_attention("eager", CPU, torch.float32, encoding).implementation == "eager"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("flash_attention_2", "needs a GPU, and this is cpu"),
        ("flash_attention_3", "needs a GPU, and this is cpu"),
        ("flex_attention", "no backward pass of it for cpu"),
    ],
)
def test_a_cpu_refuses_what_it_cannot_do(wanted: str, says: str) -> None:
    for refuse in (
        lambda: check_attention(wanted, CPU, torch.float32),
        lambda: choose_attention(wanted, CPU, torch.float32, "rope"),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        assert f"model.attention: {wanted} is not available here" in str(caught.value)
        assert says in str(caught.value)
        assert "model.attention=auto" in str(caught.value)


def test_the_order_on_gpus(card: Card) -> None:
    assert card.auto("rope") == "flash_attention_3"
    assert card.auto("alibi") == "flash_attention_2"  # the one that knows ALiBi
    card.capability = (8, 6)  # FlashAttention 3 is for Hopper
    assert card.auto("rope") == card.auto("alibi") == "flash_attention_2"
    card.capability, card.installed = (9, 0), {"flash_attention_3"}
    assert card.auto("rope") == card.auto("alibi") == "flash_attention_3"
    card.tried.clear()
    assert card.auto("rope", torch.float32) == "sdpa"
    card.installed = set()
    assert card.auto("rope") == card.auto("alibi") == "sdpa"
    card.installed, card.capability = set(FLASH), (7, 5)
    assert card.auto("rope", torch.float16) == "sdpa"
    assert card.tried == []


def test_compiled_layers_get_what_reads_a_mask(card: Card) -> None:
    chosen = choose_attention("auto", GPU, torch.bfloat16, "rope", compiled=True)
    assert chosen.implementation == "sdpa"
    assert card.tried == []


def test_auto_falls_back_from_what_fails(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    card.failing = {"flash_attention_3"}
    assert card.auto("rope") == "flash_attention_2"
    assert "flash_attention_3 is not used" in caplog.text
    card.failing = set(FLASH)
    choose_attention.cache_clear()
    chosen = choose_attention("auto", GPU, torch.bfloat16, "rope")
    assert chosen.implementation == "sdpa"
    assert "flash_attention_2 is installed but fails its self-test" in chosen.reason
    assert "relative errors: packed rows 0.50" in caplog.text


def test_one_that_is_named_and_fails_is_refused(card: Card) -> None:
    card.failing = {"flash_attention_2"}
    with pytest.raises(UserError, match=r"fails its self-test: relative errors: packed rows 0\.50"):
        choose_attention("flash_attention_2", GPU, torch.bfloat16, "rope")
    assert choose_attention("flash_attention_3", GPU, torch.bfloat16, "rope").reason == "as the recipe says"


def test_a_gpu_refuses_by_what_is_missing(card: Card) -> None:
    with pytest.raises(UserError, match=r"16 bits only, and model\.dtype is float32"):
        check_attention("flash_attention_2", GPU, torch.float32)
    card.installed = set()
    with pytest.raises(UserError, match=r"flash-attn is not installed\n.*pip install flash-attn"):
        check_attention("flash_attention_2", GPU, torch.bfloat16)
    card.capability = (7, 5)
    with pytest.raises(UserError, match=r"8\.0 \(Ampere\)"):
        check_attention("flash_attention_2", GPU, torch.float16)


def test_a_package_that_cannot_be_imported_is_a_failure(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Iterator[tuple[str, float]]:
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda")

    monkeypatch.setattr(attention_choice, "self_test", broken)
    assert card.auto("alibi") == "sdpa"
    with pytest.raises(UserError, match="undefined symbol"):
        choose_attention("flash_attention_2", GPU, torch.bfloat16, "alibi")


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_test_passes_what_is_right(encoding: str, dtype: torch.dtype) -> None:
    before = torch.random.get_rng_state()
    errors = dict(self_test("sdpa", CPU, dtype, encoding))
    assert torch.equal(torch.random.get_rng_state(), before)  # a run's random numbers are its own
    assert len(errors) == 5
    assert 0 < max(errors.values()) < (1e-4 if dtype == torch.float32 else 0.04)
    assert attention_choice._failure("sdpa", CPU, dtype, encoding) is None


def _one_late(query: Any, key: Any, value: Any, mask: Any) -> tuple[Any, ...]:
    return query, key, value, None if mask is None else mask.roll(1, dims=-1)


def _no_alibi(query: Any, key: Any, value: Any, mask: Any) -> tuple[Any, ...]:
    query = query.clone()
    query[..., -ALIBI_DIMS:] = 0
    return query, key, value, mask


def _no_mask(query: Any, key: Any, value: Any, mask: Any) -> tuple[Any, ...]:
    return query, key, value, None


def _no_gradient(query: Any, key: Any, value: Any, mask: Any) -> tuple[Any, ...]:
    return query, key.detach(), value, mask


@pytest.mark.parametrize(
    ("encoding", "flaw", "seen"),
    [
        ("rope", _one_late, "packed rows"),
        ("rope", _no_mask, "generation"),
        ("alibi", _no_mask, "packed rows"),
        ("alibi", _no_alibi, "generation"),
        ("rope", _no_gradient, "packed rows, gradient"),
        ("alibi", _no_gradient, "padded rows, gradient"),
    ],
)
def test_the_self_test_sees_what_is_wrong(encoding: str, flaw: Any, seen: str) -> None:
    """Kernels that run, and confuse documents, positions or gradients."""

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, *flaw(query, key, value, mask), **kwargs)

    name = "flawed_attention"
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    failure = attention_choice._failure(name, CPU, torch.bfloat16, encoding)
    assert failure is not None
    assert seen in failure
