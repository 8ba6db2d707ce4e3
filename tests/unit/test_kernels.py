"""Liger's kernels take the place of ours, with the right arguments; tests/gpu runs the kernels themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_model import tiny_model

from finetune.baichuan.kernels import choose_kernels, use_liger
from finetune.errors import UserError

IDS = torch.arange(1200, 1224).view(2, 12)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for installed, device, expected in ((True, cuda, "liger"), (False, cuda, "none"), (True, cpu, "none")):
        monkeypatch.setattr(
            "finetune.baichuan.kernels.find_spec", lambda name, there=installed: object() if there else None
        )
        assert choose_kernels("auto", device) == expected
        assert choose_kernels("auto", device, compiled=True) == "none"
        assert choose_kernels("none", device) == "none"
        if expected == "liger":
            assert choose_kernels("liger", device) == "liger"
        else:
            with pytest.raises(UserError, match=r"train\.kernels: liger is not available here"):
                choose_kernels("liger", device)


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_every_layer_calls_the_kernels(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Played by functions of the kernels' signatures, with the formulas that liger documents."""
    calls: dict[str, int] = {}

    def counted(name: str, compute: Any) -> type:
        def apply(*args: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return compute(*args)

        return type(name, (), {"apply": staticmethod(apply)})

    def rms(x: Any, weight: Any, eps: float, offset: float, casting: str, in_place: bool) -> Any:
        assert (casting, in_place) == ("llama", False)
        norm = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return norm.to(x.dtype) * (offset + weight)

    def rope(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        half = q.shape[-1] // 2
        return tuple(
            x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None] for x in (q, k)
        )

    for module, name, compute in (
        ("rms_norm", "LigerRMSNormFunction", rms),
        ("rope", "LigerRopeFunction", rope),
        ("swiglu", "LigerSiLUMulFunction", lambda gate, up: torch.sigmoid(gate) * gate * up),
    ):
        played = ModuleType(module)
        setattr(played, name, counted(module, compute))
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{module}", played)
    for package in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))

    model = tiny_model(encoding)
    expected = model(IDS).logits
    assert not calls
    use_liger(model)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert calls == {"rms_norm": 5, "swiglu": 2, **({"rope": 2} if encoding == "rope" else {})}


@pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")), reason="needs liger-kernel, triton"
)
def test_rotary_kernel_is_ours(tmp_path: Path) -> None:
    """Interpreted on a CPU, in a process of its own. Triton's interpreter cannot run the others (float arguments)."""
    script = """
import torch
from liger_kernel.ops.rope import LigerRopeFunction
from finetune.baichuan.attention import rotate
q, k = torch.randn(2, 2, 4, 6, 32).unbind(0)
cos, sin = torch.randn(2, 2, 6, 16).repeat(1, 1, 1, 2).unbind(0)
expected = rotate(q, k, cos, sin)
for ours, theirs in zip(expected, LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)):
    torch.testing.assert_close(theirs, ours)
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
