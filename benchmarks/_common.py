"""What every benchmark shares: where it ran, and how its results are kept."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# So that `import finetune` takes this checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors", "triton")
PACKAGES += ("liger-kernel", "cut-cross-entropy", "flash-attn")


def machine() -> dict[str, Any]:
    """The machine: processor, memory, GPU, operating system."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what a benchmark depends on, Python's among them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Keep a result as JSON, with machine, versions and date.

    Args:
        name: of the benchmark; the file is ``NAME.json``, the latest result replacing the one before.
        result: settings and figures.
        folder: where to.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        **result,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def release_free_memory() -> None:
    """Give what was freed back to the system, so that it counts when it is taken again (glibc)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak_resident() -> None:
    """Forget the highest resident memory so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """Highest resident memory since the start or the last reset (Linux's VmHWM)."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Resident memory now (Linux's VmRSS)."""
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def in_fresh_process(script: str, arguments: list[str], *, timeout: float | None = None) -> dict[str, Any]:
    """Run a benchmark in a process of its own, so that no other one's memory counts; its last line is JSON.

    Returns:
        The JSON, or {"error": its last line, "said": the end of all it said}.
    """
    command = [sys.executable, script, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {timeout:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip()
        last = (said.splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": last[:300], "said": said[-3000:]}
    try:
        return json.loads(lines[-1])
    except ValueError:
        return {"error": f"its last line is no JSON: {lines[-1][:200]}"}
