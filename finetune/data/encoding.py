"""Bytes into text: UTF-8 with or without a byte-order mark, and clear words about anything else."""

from __future__ import annotations

import codecs

from finetune.errors import UserError

CONVERT_HINT = (
    "Chinese files are often GB18030: `iconv -f GB18030 -t UTF-8 OLD > NEW` converts them "
    "(Excel writes UTF-8 as 'CSV UTF-8')"
)


def decode_file(raw: bytes, name: str) -> str:
    """A whole file's text.

    Raises:
        UserError: it is not UTF-8; names the line and the byte.
    """
    refuse_utf16(raw, name)
    try:
        return strip_bom(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        raise UserError(f"{name}:{line}: {describe(error, column)}", hint=CONVERT_HINT) from error


def decode_line(raw: bytes) -> str:
    """One line's text.

    Raises:
        ValueError: it is not UTF-8; names the byte.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(describe(error, error.start + 1)) from error


def describe(error: UnicodeDecodeError, column: int) -> str:
    """The reason why a line cannot be decoded; `column` counts its bytes from 1."""
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {column} of the line"


def strip_bom(raw: bytes) -> bytes:
    """The bytes without UTF-8's byte-order mark, which Windows programs like to write."""
    return raw.removeprefix(codecs.BOM_UTF8)


def refuse_utf16(raw: bytes, name: str) -> None:
    """Raise UserError for a file that begins with the byte-order mark of UTF-16."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(
            f"{name}: the file is UTF-16, expected UTF-8",
            hint="`iconv -f UTF-16 -t UTF-8 OLD > NEW` converts it",
        )
