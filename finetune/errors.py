"""What the user can mend, told apart from what we must."""

from __future__ import annotations


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
