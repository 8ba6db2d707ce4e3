"""What the user can mend, told apart from what we must."""

from __future__ import annotations

import errno
import re


class UserError(Exception):
    """Something the user can fix: bad recipe, bad data, missing weights, not enough memory.

    The command line prints it without a traceback and exits with 2.

    Args:
        message: names the file, line or key, what was found and what was expected.
        hint: what to do about it.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  → {self.hint}" if self.hint else message


_PERMITTED = "change its permissions, or use another place"
_SPACE = "free some disk, or write to another one; `run` goes on from its last checkpoint with --resume"
_REFUSALS = {
    errno.EROFS: "write to another place",
    errno.EACCES: _PERMITTED,
    errno.EPERM: _PERMITTED,
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "part of this path is a file: name a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers raise kinds of their own
_NAMELESS = {errno.ENOSPC, errno.EDQUOT}  # writing to an open file fails without its name


def refused_by_system(error: BaseException) -> UserError | None:
    """What to tell the user where the system refused a path of theirs; None for every other error.

    A file that is not there is none of these: whoever opens one that the user named has to say which option.
    """
    if not isinstance(error, OSError):
        from_rust = _RUST_ERROR.search(str(error))
        hint = _REFUSALS.get(int(from_rust[1])) if from_rust else None
        return UserError(str(error), hint=hint) if hint else None
    if error.errno not in _REFUSALS:
        return None
    if error.filename is None and error.errno not in _NAMELESS:
        return None
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    said = error.strerror or str(error)
    path = f"{' → '.join(named)}: " if named else ""
    return UserError(f"{path}{said}", hint=_REFUSALS[error.errno])
