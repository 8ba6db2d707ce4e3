"""What an adapter was trained on, kept beside its weights: ``training.json``.

PEFT's own files name the base, but not how training held it; merging has to know both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError

FILE = "training.json"
QUANTIZATIONS = ("none", "int8", "nf4")


def write_training_note(folder: Path | str, **facts: Any) -> Path:
    """Write what is known of an adapter's training into its folder.

    Args:
        folder: adapter folder.
        facts: ``base`` (identity), ``base_revision``, ``base_fingerprint`` (of `fingerprint`), ``quantization``
            (``none``, ``int8`` or ``nf4``), ``dtype`` (that the base was computed in), ``stage``.

    Returns:
        The file.
    """
    path = Path(folder) / FILE
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_training_note(folder: Path | str) -> dict[str, Any]:
    """What `write_training_note` wrote; empty for adapters that came from elsewhere.

    Raises:
        UserError: if the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not valid JSON ({error})", hint="save or copy the adapter again") from error
    found = note.get("quantization", "none") if isinstance(note, dict) else None
    if found not in QUANTIZATIONS:
        raise UserError(
            f"{path}: expected an object whose quantization is one of {', '.join(QUANTIZATIONS)}, "
            f"found {found if isinstance(note, dict) else type(note).__name__!r}",
            hint="save or copy the adapter again",
        )
    return note
