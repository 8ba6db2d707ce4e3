"""What this machine has and lacks for fine-tuning: versions, devices, caches, and the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

GIB = 1024**3

State = Literal["ok", "note", "missing"]
_MARKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("--", "yellow"),
    "missing": ("!!", "red"),
}

_DISTRIBUTION = "baichuan2-finetune"

# What the toolkit cannot do without, and what each is for. Versions are those of pyproject.toml.
_REQUIRED = {
    "torch": "tensors and training",
    "transformers": "models and trainers",
    "peft": "adapters",
    "trl": "fine-tuning trainers",
    "accelerate": "devices and processes",
    "datasets": "reading data",
    "bitsandbytes": "model.quantization int8 and nf4, 8-bit optimizers",
    "evaluate": "the metrics of the report",
    "sentencepiece": "reading Baichuan's tokenizer.model",
    "tokenizers": "tokenisation",
    "safetensors": "reading and writing weights",
    "scikit-learn": "classifying prompts",
}
# module, what it is for, how to get it
_OPTIONAL = [
    (
        "flash_attn",
        "model.attention flash_attention_2 (ALiBi without wider heads)",
        "pip install flash-attn --no-build-isolation",
    ),
    ("liger_kernel", "train.kernels: liger", "pip install '.[gpu]' in the toolkit's folder"),
    (
        "flash_attn_interface",
        "model.attention flash_attention_3 (Hopper GPUs)",
        "pip install ./hopper --no-build-isolation in a checkout of flash-attention",
    ),
    ("deepspeed", "recipes/accelerate/ ZeRO-2 and ZeRO-3", "pip install '.[gpu]' in the toolkit's folder"),
    ("modelscope", "model.source modelscope", "pip install '.[modelscope]' in the toolkit's folder"),
    ("vllm", "ppo.rollout_engine vllm", "pip install '.[vllm]' in the toolkit's folder"),
]
_ENVIRONMENT = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_ENDPOINT",
    "MODELSCOPE_CACHE",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: "ok", "note" (absent or worth knowing, the toolkit works without) or "missing"
            (the toolkit does not work without).
        advice: what it would be needed for and how to get it; empty where nothing is to be done.
    """

    name: str
    value: str
    state: State = "ok"
    advice: str = ""


def diagnose() -> bool:
    """Print all findings.

    Returns:
        Whether everything that the toolkit cannot do without is there.
    """
    good = True
    for title, find in _SECTIONS.items():
        findings = list(find())
        _print_section(title, findings)
        good = good and all(finding.state != "missing" for finding in findings)
    if not good:
        print("Something that the toolkit needs is missing: follow the lines marked !!")
    return good


def packages() -> Iterator[Finding]:
    """Python and the packages that the toolkit cannot do without."""
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    wanted = _requirements()
    for name, purpose in _REQUIRED.items():
        wish = wanted.get(name, "")
        install = f"needed for {purpose}: pip install '{name}{wish}'"
        version = _version(name)
        if version is None:
            yield Finding(name, "not installed", "missing", install)
        elif not _satisfies(version, wish):
            yield Finding(name, f"{version}, expected {wish}", "missing", install)
        else:
            yield Finding(name, version)


def options() -> Iterator[Finding]:
    """Packages that make more possible or faster."""
    for module, purpose, install in _OPTIONAL:
        if find_spec(module) is None:
            yield Finding(module, "not installed", "note", f"for {purpose}: {install}")
        else:
            yield Finding(module, _version(module) or "installed")


def machine() -> Iterator[Finding]:
    """Operating system, processor, memory, disk."""
    yield Finding("system", platform.platform())
    yield Finding(
        "cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    )
    try:
        memory = import_module("psutil").virtual_memory()
        yield Finding("memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    except ImportError:
        yield Finding("memory", "unknown", "missing", "needed to predict memory: pip install psutil")
    free = shutil.disk_usage(".").free / GIB
    advice = "a merged 7B model takes 14 GiB, 13B takes 26 GiB" if free < 30 else ""
    yield Finding("disk, current folder", f"{free:.1f} GiB free", "note" if advice else "ok", advice)


def devices() -> Iterator[Finding]:
    """CUDA devices, their free memory, bfloat16."""
    torch = _import("torch")
    if torch is None:
        yield Finding("devices", "unknown: torch cannot be imported", "missing", "see packages above")
        return
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding(
            "CUDA",
            f"none (torch {built})",
            "note",
            "enough for the nano models; 7B and 13B need a GPU (finetune check RECIPE predicts its memory)",
        )
        chosen = _import("finetune.baichuan.cpu_matmul")
        if chosen is not None:
            faster = chosen.onednn_is_better()
            value = (
                f"oneDNN from hidden size {chosen.MIN_HIDDEN_SIZE} on" if faster else "as torch takes them"
            )
            yield Finding("float32 matmul", value)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"cuda:{index}", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bfloat16", "yes")
    else:
        yield Finding("bfloat16", "not on this GPU", "note", "set model.dtype to float16")


def attention() -> Iterator[Finding]:
    """What `model.attention: auto` takes here for the 7B (RoPE) and the 13B (ALiBi) models."""
    load = _import("finetune.baichuan.load")
    choice = _import("finetune.baichuan.attention_choice")
    if _import("torch") is None or load is None or choice is None:
        yield Finding("attention", "unknown: torch cannot be imported", "missing", "see packages above")
        return
    device = load.pick_device()
    dtype = load.compute_dtype("bfloat16", device)
    for encoding, name in (("rope", "RoPE (7B)"), ("alibi", "ALiBi (13B)")):
        chosen = choice.choose_attention("auto", device, dtype, encoding)
        yield Finding(name, f"attention {chosen}", "note" if "fails" in chosen.reason else "ok")


def caches() -> Iterator[Finding]:
    """Where weights and data are kept, and what the environment says about the network."""
    constants = _import("huggingface_hub.constants")
    if constants is not None:
        cache = Path(constants.HF_HUB_CACHE)
        yield Finding("Hugging Face cache", f"{cache} ({_free(cache)})")
    nano = _import("finetune.baichuan.nano")
    if nano is not None:
        folder = Path(nano.cache_dir())
        built = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        value = f"{folder} ({', '.join(built) or 'empty, the first run with a nano model builds it'})"
        yield Finding("nano models", value)
    for name in _ENVIRONMENT:
        setting = os.environ.get(name)
        if setting is not None:
            offline = name.endswith("OFFLINE") and setting.lower() not in ("", "0", "false", "no", "off")
            advice = "nothing is downloaded; bases must be local folders or in the cache" if offline else ""
            yield Finding(name, setting, "note" if offline else "ok", advice)


_SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Packages": packages,
    "Options": options,
    "Machine": machine,
    "Devices": devices,
    "Attention": attention,
    "Caches and network": caches,
}


def _requirements() -> dict[str, str]:
    """Package → version range that the toolkit asks for, from its metadata or its pyproject.toml."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        if not project.is_file():
            return {}
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    ranges = {}
    for line in lines:
        text = line.partition(";")[0].strip()
        end = next((index for index, sign in enumerate(text) if sign in "<>=!~ "), len(text))
        if "extra ==" not in line:
            ranges[text[:end]] = text[end:].strip()
    return ranges


def _satisfies(version: str, wish: str) -> bool:
    specifiers = _import("packaging.specifiers")
    return specifiers is None or specifiers.SpecifierSet(wish).contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import(name: str) -> Any:
    """A module, or None where it is absent or broken: doctor has to survive what it looks for."""
    try:
        return import_module(name)
    except Exception:
        return None


def _free(path: Path) -> str:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return f"{shutil.disk_usage(existing).free / GIB:.1f} GiB free"


def _print_section(title: str, findings: list[Finding]) -> None:
    """Colours on a terminal, plain lines elsewhere; the same words on both."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(title, style="bold"))
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        mark, colour = _MARKS[finding.state]
        console.print(
            Text(f"  {mark} ", style=colour) + Text(f"{finding.name.ljust(width)}  {finding.value}")
        )
        if finding.advice:
            console.print(Text(f"     {' ' * width}  {finding.advice}", style="dim"))
    console.print()
