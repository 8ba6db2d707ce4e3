"""Whether a base is the one that an adapter was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.baichuan.catalog import CATALOG, CatalogEntry
from finetune.baichuan.fingerprint import fingerprint, same_model
from finetune.baichuan.load import Base
from finetune.errors import UserError


def check_same_base(adapter: Path, config: dict[str, Any], note: dict[str, Any], base: Base) -> None:
    """Refuse a base that is not the adapter's, or of which that cannot be told.

    The fingerprint that training recorded decides. Adapters without one are judged by the fingerprints of two
    folders, or by name: for released models a catalogue name, a hub id and a local copy's folder name are the
    same.

    Args:
        adapter: its folder, for messages.
        config: of adapter_config.json.
        note: of `read_training_note`.
        base: what the adapter is to be merged into.

    Raises:
        UserError: another model, or perhaps one.
    """
    recorded = note.get("base") or config.get("base_model_name_or_path")
    revision = note.get("base_revision") or config.get("revision")
    hint = "give its base with --base; if you know that this is right, say --force-base"
    same_name = bool(recorded) and _same_name(str(recorded), revision, base)
    known = note.get("base_fingerprint")
    if known is None and recorded and (Path(recorded) / "config.json").is_file():
        known = fingerprint(Path(recorded))
    if known is not None:
        if same_model(fingerprint(base.folder), known):
            return
        # The official 4-bit releases round the embeddings' tiniest values, too.
        if same_name and any(_is_official_4bit(name) for name in (str(recorded), base.name, base.identity)):
            return
        what = "it has that name, but other weights" if same_name else "a model with other weights"
        raise UserError(
            f"{adapter}: was trained on {recorded}, and {base.name} is another base: {what}", hint=hint
        )
    if recorded and not same_name:
        raise UserError(
            f"{adapter}: was trained on {recorded}, and nothing says that {base.name} is the same model",
            hint=hint,
        )


def _same_name(recorded: str, revision: str | None, base: Base) -> bool:
    names = {base.name, base.identity}
    return any(_canonical(recorded, revision) == _canonical(name, base.revision) for name in names)


def _canonical(identity: str, revision: str | None) -> tuple[str, str | None]:
    """Which model a name stands for, and which checkpoint where a repository holds several.

    Released models have their repository's name, without its owner and without ``-4bits``, wherever a copy lies.
    Any other folder or hub id stands for itself alone: many a run's model is called ``merged``.
    """
    entry = CATALOG.get(identity)
    if entry is not None:
        identity, revision = _repository(entry), entry.revision or revision
    name = _last_part(identity).removesuffix("-4bits")
    if name not in {_last_part(_repository(entry)) for entry in CATALOG.values()}:
        return identity, revision
    return name, revision if name.endswith("checkpoints") else None


def _repository(entry: CatalogEntry) -> str:
    return entry.repo_id or entry.name


def _last_part(identity: str) -> str:
    return Path(identity).name.lower()


def _is_official_4bit(identity: str) -> bool:
    releases = {
        name for entry in CATALOG.values() if entry.quantized for name in (entry.name, _repository(entry))
    }
    return _last_part(identity) in {_last_part(name) for name in releases}
