"""Which library multiplies float32 matrices on a CPU, and that it does so in float32."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from finetune.baichuan import cpu_matmul
from finetune.baichuan.cpu_matmul import (
    ALLOWED_ERROR,
    MIN_HIDDEN_SIZE,
    fast_matmul,
    matmul_error,
    onednn_is_better,
)

AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
CPU = torch.device("cpu")
SETTINGS = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    """A process that has not looked yet; afterwards, what it had been set to before."""
    before = SETTINGS.fp32_precision
    cpu_matmul._onednn_passes.cache_clear()
    SETTINGS.fp32_precision = "none"
    yield
    cpu_matmul._onednn_passes.cache_clear()
    SETTINGS.fp32_precision = before


def processor(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, error: float = 3e-7) -> None:
    """Have the processor be this one, oneDNN's products off by so much."""
    path = folder / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(cpu_matmul, "PROCESSOR", path)
    monkeypatch.setattr(cpu_matmul, "matmul_error", lambda: error)


def chosen_within(hidden_size: int = MIN_HIDDEN_SIZE, device: torch.device = CPU) -> str:
    with fast_matmul(hidden_size, device):
        return SETTINGS.fp32_precision


def test_onednn_computes_in_float32_where_it_is_taken() -> None:
    if not cpu_matmul._faster_here():
        pytest.skip("MKL multiplies on this processor")
    SETTINGS.fp32_precision = "bf16"  # whatever the self-test says
    assert matmul_error() < ALLOWED_ERROR
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul_error() < ALLOWED_ERROR


def test_bfloat16_would_be_found_out() -> None:
    error = matmul_error(lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    assert error > 100 * ALLOWED_ERROR


def test_amd_with_avx512_takes_onednn_inside_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processor(monkeypatch, tmp_path, AMD)

    def fail() -> None:
        with fast_matmul(MIN_HIDDEN_SIZE, CPU), fast_matmul(MIN_HIDDEN_SIZE, CPU):
            raise ZeroDivisionError

    assert chosen_within() == "bf16"
    assert SETTINGS.fp32_precision == "none"
    with pytest.raises(ZeroDivisionError):
        fail()
    assert SETTINGS.fp32_precision == "none"


@pytest.mark.parametrize(
    "text",
    [
        AMD.replace("AuthenticAMD", "GenuineIntel"),
        AMD.replace(" avx512f", ""),
        AMD.replace("avx2", "avx2 amx_tile amx_bf16"),  # would compute in bfloat16
        "",
    ],
    ids=["Intel", "no AVX-512", "AMX", "unknown"],
)
def test_other_processors_stay_with_what_torch_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    processor(monkeypatch, tmp_path, text)
    assert chosen_within() == "none"


@pytest.mark.parametrize(("hidden_size", "device"), [(MIN_HIDDEN_SIZE - 1, "cpu"), (MIN_HIDDEN_SIZE, "cuda")])
def test_narrow_models_and_gpus_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hidden_size: int, device: str
) -> None:
    processor(monkeypatch, tmp_path, AMD)
    assert chosen_within(hidden_size, torch.device(device)) == "none"


@pytest.mark.parametrize("error", [2e-3, float("nan")])
def test_inexact_products_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: float
) -> None:
    processor(monkeypatch, tmp_path, AMD, error)
    assert chosen_within() == "none"
    assert "multiplied by MKL" in caplog.text


def test_a_precision_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processor(monkeypatch, tmp_path, AMD)
    for chosen in ("ieee", "tf32"):
        SETTINGS.fp32_precision = chosen
        assert chosen_within() == chosen


def test_the_first_question_may_come_from_several_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: onednn_is_better(), range(8)))) == 1
    assert SETTINGS.fp32_precision == "none"
