"""Small files written whole, and modes that others can read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.errors import UserError

HEAD_BYTES = 4096
"""Where a page has its title, long names included."""


def write_text(path: Path, text: str) -> None:
    """Write `text` so that whoever looks at `path` sees the whole of it or what was there before."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def check_free(
    *files: Path,
    overwrite: bool,
    called: str = "--output",
    others: Iterable[Path] = (),
    page: str | None = None,
) -> None:
    """Refuse, before any work, to write files that are there already or cannot be written.

    Args:
        overwrite: replace what is there, the command's own files aside.
        called: the option that names the files, for messages.
        others: what the command reads, or writes beside; never replaced.
        page: text in the head of pages of this kind, which are written again without being asked.

    Raises:
        UserError: naming the first that may not be written.
    """
    taken = [Path(os.path.realpath(other.expanduser())) for other in others]
    for file in files:
        if file.is_dir():
            raise UserError(f"{file}: is a folder, expected a file", hint=f"give {called} the name of a file")
        if Path(os.path.realpath(file)) in taken:
            raise UserError(
                f"{file}: this command itself reads or writes this file, so it cannot be {called}, too",
                hint=f"choose another {called}",
            )
        if file.exists() and not overwrite and not (page and _has_in_head(file, page)):
            raise UserError(f"{file}: is there already", hint=f"choose another {called}, or pass --overwrite")
        check_writable(file.parent, called=called)


def _has_in_head(file: Path, text: str) -> bool:
    with file.open("rb") as opened:
        return text.encode() in opened.read(HEAD_BYTES)


def check_writable(folder: Path, *, called: str) -> None:
    """Refuse a folder that cannot be written into, or made where it is not there; nothing is touched.

    Args:
        called: the option or setting that names it, for messages.

    Raises:
        UserError: saying why.
    """
    folder = folder.absolute()
    nearest = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if not nearest.is_dir():
        why = f"{nearest} is a file, not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
        why = f"{nearest}: {os.strerror(errno.EROFS if read_only else errno.EACCES)}"
    else:
        return
    raise UserError(f"{called}: {folder} cannot be written ({why})", hint=f"choose another {called}")


def give_usual_modes(folder: Path) -> None:
    """Give the files of a folder the mode that the user's umask asks for; safetensors writes 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)
