"""Tokenised data on disk, found again by what it was made from.

One file an entry, `KEY-DIGEST.arrow`: the key says what it was made from, the digest what is in it. A file
is written under another name and renamed when complete; one whose content does not have its digest is
removed and made again. The oldest go when the folder grows beyond a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

LIMIT_BYTES = 20 * 1024**3
STALE_SECONDS = 24 * 3600.0


def cache_folder() -> Path:
    """The folder `data` of the toolkit's cache (`FINETUNE_CACHE`, or in the user's cache folder)."""
    from finetune.baichuan.nano import cache_dir

    return cache_dir() / "data"


class TokenCache:
    """Tables by key, in a folder that several processes may use at once.

    Args:
        folder: made when first needed; where it cannot be, nothing is cached and nothing fails.
        limit: bytes that all entries may take together.
    """

    def __init__(self, folder: Path | None = None, *, limit: int = LIMIT_BYTES) -> None:
        self.folder = folder or cache_folder()
        self.limit = limit

    def load(self, key: str) -> Dataset | None:
        """The table stored under a key, memory-mapped; None if there is none that is whole."""
        import pyarrow as pa
        from datasets import Dataset

        for path in sorted(self.folder.glob(f"{key}-*.arrow")):
            try:
                if _digest(path) == path.stem.rpartition("-")[2]:
                    os.utime(path)  # used now: among the last to be removed
                    return Dataset.from_file(str(path))
            except (OSError, pa.ArrowException):
                pass
            with contextlib.suppress(OSError):  # perhaps somebody else's, in a shared folder
                path.unlink()
        return None

    def store(self, key: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Dataset:
        """Write a table, batch by batch, and return it memory-mapped (from memory, if there is no folder).

        Raises:
            UserError: the disk is full.
        """
        import pyarrow as pa
        from datasets import Dataset

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix="tmp-", dir=self.folder)
            os.close(handle)
        except OSError:
            return Dataset(pa.Table.from_batches(batches, schema), fingerprint=key[:64])
        try:
            with pa.OSFile(temporary, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            path = self.folder / f"{key}-{_digest(Path(temporary))}.arrow"
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(
                f"{self.folder}: tokenised data cannot be written: {error.strerror or error}",
                hint="free some space, or set FINETUNE_CACHE to a folder on another disk",
            ) from error
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._prune(path)
        return Dataset.from_file(str(path))

    def _prune(self, newest: Path) -> None:
        """Remove what was left half written long ago, and the least recently used beyond the limit."""
        entries = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
                if path.name.startswith("tmp-") and time.time() - status.st_mtime > STALE_SECONDS:
                    path.unlink()
                elif path.suffix == ".arrow" and path != newest:
                    entries.append((status.st_mtime, status.st_size, path))
            except OSError:
                continue  # another process was faster
        total = newest.stat().st_size
        for _, size, path in sorted(entries, reverse=True):
            total += size
            if total > self.limit:
                with contextlib.suppress(OSError):
                    path.unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
