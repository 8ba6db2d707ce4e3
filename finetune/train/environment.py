"""What a run runs in: versions and devices, and what it leaves with the adapter of that."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.files import write_json

if TYPE_CHECKING:
    from finetune.baichuan.load import Base
    from finetune.recipe.schema import Recipe

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "evaluate")


def environment() -> dict[str, Any]:
    """Versions, devices and the command line, for environment.json."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from finetune import __version__

    versions = {"baichuan2-finetune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": versions,
    }


def _command() -> list[str]:
    """The command line as it can be typed again."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return ["python", "-m", program.parent.name, *sys.argv[1:]]
    return [program.name, *sys.argv[1:]]


def record_environment(run_dir: Path, *, attention: dict[str, str]) -> None:
    """Write environment.json; of a resumed run it keeps the earlier ones under `earlier`, newest last.

    Args:
        run_dir: the run.
        attention: the implementation chosen, and why.
    """
    path = run_dir / "environment.json"
    record = {**environment(), "attention": attention}
    with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
        before = json.loads(path.read_text(encoding="utf-8"))
        record["earlier"] = [*before.pop("earlier", []), before]
    write_json(path, record)


def note_training(recipe: Recipe, base: Base, adapter: Path) -> None:
    """Write into an adapter what training held the base as: chat takes it up, merging checks and warns by it."""
    from finetune.adapters.training_note import write_training_note
    from finetune.baichuan.fingerprint import fingerprint
    from finetune.baichuan.load import compute_dtype, pick_device

    model = recipe.model
    write_training_note(
        adapter,
        base=base.identity,
        base_revision=base.revision,
        base_fingerprint=fingerprint(base.folder),
        quantization=model.quantization,
        dtype=str(compute_dtype(model.dtype, pick_device())).removeprefix("torch."),
        stage=recipe.stage,
    )
