"""Weight files one at a time: reading, writing in files of limited size, and all or nothing on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune.baichuan.checkpoints import find_weight_files, read_bin
from finetune.errors import UserError
from finetune.sizes import byte_size, bytes_of

if TYPE_CHECKING:
    import torch

LENGTH_BYTES = 8
HEADER_ROOM = 64 << 10
"""For the header of a safetensors file: more than 300 tensors; a multiple of `ALIGNMENT`."""
ENTRY_ROOM = 128
"""More than a tensor's entry in the header takes beside its name."""
ALIGNMENT = 8
SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``500MiB`` or ``1000000``.

    Raises:
        UserError: if it is no positive size.
    """
    size = bytes_of(text)
    if size is None:
        raise UserError(f"max shard size: found {text!r}, expected a size such as 5GB or 500MB")
    return size


def iterate_weights(
    folder: Path, *, opened: Callable[[Path], None] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every entry of a model folder's weight files, holding one file at a time.

    Args:
        folder: model folder.
        opened: called with each file before it is read.
    """
    from safetensors import safe_open

    for path in find_weight_files(folder):
        if opened is not None:
            opened(path)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    yield name, file.get_tensor(name)
        else:
            yield from read_bin(path).items()


def pick_tensors(folder: Path, wanted: Iterable[str]) -> dict[str, torch.Tensor]:
    """Some entries of a model folder's weight files, those that are there."""
    from safetensors import safe_open

    wanted = set(wanted)
    found: dict[str, torch.Tensor] = {}
    for path in find_weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in wanted & set(file.keys())}
        else:
            entries = read_bin(path)
            found |= {name: entries[name] for name in wanted & entries.keys()}
    return found


def check_output(output: Path) -> None:
    """Refuse to write where something is.

    Raises:
        UserError: if ``output`` exists.
    """
    if output.exists():
        raise UserError(f"{output}: exists already", hint="choose another --output, or remove it")


def check_disk(output: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        output: folder that will be written.
        needed: bytes.

    Raises:
        UserError: if fewer are free.
    """
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{output}: {byte_size(needed)} are needed, {byte_size(free)} are free",
            hint="free some disk, or write to another one",
        )


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``output`` when all went well, and leaves nothing when not.

    Whoever is killed on the way leaves a hidden ``.NAME.incomplete-…`` behind; the next one that writes the same
    output removes it. A lock on the folder, which ends with its process, tells those from folders in use.

    Raises:
        UserError: the disk is full, or ``output`` has appeared in the meantime.
    """
    prefix = f".{output.name}.incomplete-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output.parent, prefix)
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=prefix))
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror})", hint="choose another place"
        ) from error
    lock = _lock(folder)
    try:
        yield folder
        for path in folder.rglob("*"):  # safetensors' own writer makes files that only their owner can read
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder.chmod(0o755)
        folder.rename(output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{output}: the disk is full", hint="free some, or write to another one"
            ) from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and output.exists():
            raise UserError(f"{output}: exists by now", hint="choose another --output") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.iterdir():
        if folder.name.startswith(prefix) and folder.is_dir():
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock that lasts as long as its process; None if another has it or the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


class ShardWriter:
    """Writes tensors as safetensors files of limited size, with an index when there are several.

    Each tensor goes to disk as it comes, so that none is kept in memory. The header stands first in the format
    but is known last: room is left for it, and the rest of the room filled with blanks, as the format allows.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self.written: list[list[str]] = []
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._file_bytes = 0
        self._header_bytes = 0
        self._odd: list[tuple[str, torch.Tensor]] = []
        # What is written has to reach the disk; that need not hold up the next file.
        self._disk = ThreadPoolExecutor(1)
        self._synced: list[Future[None]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; a new file begins when this one would grow too large."""
        size = tensor.numel() * tensor.element_size()
        full = self._file_bytes + size > self.shard_bytes
        if self._file is not None and (full or self._header_bytes > HEADER_ROOM - ENTRY_ROOM):
            self._close()
        if self._file is None:
            self._file = (self.folder / f"part-{len(self.written)}").open("wb")
            self._file.seek(LENGTH_BYTES + HEADER_ROOM)
            self._header = {"__metadata__": {"format": "pt"}}
            self._file_bytes, self._header_bytes = 0, ENTRY_ROOM
        self.total_bytes += size
        self._file_bytes += size
        self._header_bytes += len(name) + ENTRY_ROOM
        if size % ALIGNMENT:  # to the end of the file: what followed would not lie on a boundary of its type
            self._odd.append((name, tensor.clone()))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        assert self._file is not None
        begin = self._file.tell() - LENGTH_BYTES - HEADER_ROOM
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        end = begin + data.numel()
        self._header[name] = {
            "dtype": SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }

    def _close(self) -> None:
        assert self._file is not None
        for name, tensor in sorted(self._odd, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= HEADER_ROOM
        self._file.seek(0)
        self._file.write(struct.pack("<Q", HEADER_ROOM) + header.ljust(HEADER_ROOM))
        self._synced.append(self._disk.submit(_sync, self._file))
        self.written.append([name for name in self._header if name != "__metadata__"])
        self._file, self._odd = None, []

    def finish(self) -> None:
        """Write what is left, give the files their usual names, and write the index."""
        if self._file is not None:
            self._close()
        for future in self._synced:
            future.result()
        self._disk.shutdown()
        count = len(self.written)
        weight_map = {}
        for index, names in enumerate(self.written):
            file = "model.safetensors"
            if count > 1:
                file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / f"part-{index}", self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))


def _sync(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def progress_bar(title: str, total: int, *, shown: bool) -> Iterator[Any]:
    """A function that moves a bar on, by its argument or 1; the bar is drawn on a terminal only."""
    if not shown or not sys.stderr.isatty():
        yield lambda amount=1: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount=1: bar.advance(task, amount)
