"""``merge.json``: what a merged folder was made of, and how it was checked."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.adapters.merge_plan import MergePlan, SavedAdapter
    from finetune.adapters.verify import Verification

FILE = "merge.json"
CHUNK = 4 << 20


class FileHashes:
    """SHA-256 of whole files, computed beside other work.

    A thread reads each file from front to back as merging begins to read it, so that the disk is read once and
    the hash waits for nobody; the digests are those that ``sha256sum`` and the hub give.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._closed = Event()
        self._found: dict[Path, Future[str]] = {}

    def add(self, path: Path) -> None:
        """Begin with a file."""
        self._found[path] = self._thread.submit(sha256, path, self._closed)

    def result(self) -> dict[str, dict[str, Any]]:
        """Bytes and digest by file name, in the order they came; waits for what is not done."""
        return {
            path.name: {"bytes": path.stat().st_size, "sha256": digest.result()}
            for path, digest in self._found.items()
        }

    def close(self) -> None:
        """Drop what is not done: the process would not end before its threads."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)


def sha256(path: Path, stop: Event | None = None) -> str:
    """Digest of a file, as ``sha256sum`` prints it.

    Args:
        path: of the file.
        stop: another thread sets it when the digest is no longer wanted.

    Raises:
        CancelledError: it was set.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            if stop is not None and stop.is_set():
                raise CancelledError
            digest.update(chunk)
    return digest.hexdigest()


def write_record(
    folder: Path,
    plan: MergePlan,
    base_files: dict[str, dict[str, Any]],
    *,
    dtype: str,
    max_shard_size: str,
    verification: Verification | str,
) -> None:
    """Write ``merge.json``.

    Args:
        folder: of the merged model.
        plan: what was done.
        base_files: from `FileHashes`.
        dtype: of the weights written.
        max_shard_size: as given.
        verification: what it found, or why there was none.
    """
    from importlib.metadata import version

    from finetune import __version__
    from finetune.baichuan.fingerprint import fingerprint

    settings: dict[str, Any] = {
        "format": plan.format,
        "dtype": dtype,
        "onto": plan.onto,
        "max_shard_size": max_shard_size,
    }
    if plan.onto == "dequantized" or plan.keeps_quantization:
        settings["quantization"] = plan.quantization
    if len(plan.adapters) > 1 or plan.combination.method != "linear":
        settings |= {"combine": plan.combination.method, "weights": list(plan.combination.weights)}
        if plan.combination.method != "linear":
            settings["density"] = plan.combination.density
        if plan.combination.method.startswith("dare"):
            settings["seed"] = plan.combination.seed
    record: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": {
            "name": plan.base.name,
            "revision": plan.base.revision,
            "fingerprint": fingerprint(plan.base.folder),
            "files": base_files,
        },
        "adapters": [
            _adapter(adapter, weight) for adapter, weight in zip(plan.adapters, plan.combination.weights)
        ],
        "settings": settings,
        "verification": {"skipped": verification} if isinstance(verification, str) else asdict(verification),
        "software": {
            "finetune": __version__,
            **{
                name: version(name)
                for name in ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
            },
        },
    }
    if plan.token_ids:
        record["virtual_token_ids"] = list(plan.token_ids)
    if plan.score is not None:
        record["reward_model"] = True
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def _adapter(adapter: SavedAdapter, weight: float) -> dict[str, Any]:
    files = ("adapter_model.safetensors", "adapter_config.json")
    return {
        "name": str(adapter.folder),
        "method": adapter.config["peft_type"],
        "weight": weight,
        "training": adapter.note,
        "files": {name: {"sha256": sha256(adapter.folder / name)} for name in files},
    }


def read_record(folder: Path | str) -> dict[str, Any]:
    """What `write_record` wrote."""
    return json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
