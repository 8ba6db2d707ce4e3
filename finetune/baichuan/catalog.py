"""Bases that have names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.baichuan.nano import NANO_MODELS

INTERMEDIATE_REPO = "baichuan-inc/Baichuan2-7B-Intermediate-Checkpoints"
INTERMEDIATE_TOKENS = range(220, 2421, 220)
"""Billions of tokens seen by each of the 11 published checkpoints."""


@dataclass(frozen=True)
class CatalogEntry:
    """A base with a name.

    Attributes:
        repo_id: where the Hugging Face hub has it; None for models that are built here.
        revision: branch of that repository.
        modelscope_id: where ModelScope has it.
        size: ``7b``, ``13b`` or ``nano``.
        position_embedding: ``rope`` or ``alibi``.
        kind: ``base`` or ``chat``.
        quantized: whether the weights are 4-bit already.
    """

    name: str
    repo_id: str | None
    size: str
    position_embedding: str
    kind: str
    revision: str | None = None
    modelscope_id: str | None = None
    quantized: bool = False
    note: str = ""


def _official(
    name: str, repository: str, size: str, kind: str, *, quantized: bool = False, note: str = ""
) -> CatalogEntry:
    repo_id = f"baichuan-inc/{repository}"
    encoding = "rope" if size == "7b" else "alibi"
    return CatalogEntry(
        name, repo_id, size, encoding, kind, modelscope_id=repo_id, quantized=quantized, note=note
    )


def _entries() -> list[CatalogEntry]:
    first = "first generation, 64,000-token vocabulary"
    entries = [
        _official("baichuan2-7b-base", "Baichuan2-7B-Base", "7b", "base"),
        _official("baichuan2-7b-chat", "Baichuan2-7B-Chat", "7b", "chat"),
        _official("baichuan2-13b-base", "Baichuan2-13B-Base", "13b", "base"),
        _official("baichuan2-13b-chat", "Baichuan2-13B-Chat", "13b", "chat"),
        _official("baichuan2-7b-chat-4bits", "Baichuan2-7B-Chat-4bits", "7b", "chat", quantized=True),
        _official("baichuan2-13b-chat-4bits", "Baichuan2-13B-Chat-4bits", "13b", "chat", quantized=True),
        _official("baichuan-7b", "Baichuan-7B", "7b", "base", note=first),
        _official("baichuan-13b-base", "Baichuan-13B-Base", "13b", "base", note=first),
        _official("baichuan-13b-chat", "Baichuan-13B-Chat", "13b", "chat", note=first),
    ]
    for tokens in INTERMEDIATE_TOKENS:
        entries.append(
            CatalogEntry(
                name=f"baichuan2-7b-base-{tokens:05d}b",
                repo_id=INTERMEDIATE_REPO,
                revision=f"train_{tokens:05d}B",
                modelscope_id=INTERMEDIATE_REPO,
                size="7b",
                position_embedding="rope",
                kind="base",
                note=f"intermediate checkpoint after {tokens / 1000:.2f} trillion tokens",
            )
        )
    for name, encoding in NANO_MODELS.items():
        entries.append(
            CatalogEntry(
                name,
                None,
                "nano",
                encoding,
                "chat",
                note="built here in a few minutes, needs no download",
            )
        )
    return entries


_13B = {"hidden_size": 5120, "intermediate_size": 13_696, "num_hidden_layers": 40, "num_attention_heads": 40}


def known_config(name: str) -> dict[str, Any] | None:
    """The configuration of a 7B or 13B base in the catalogue, without its files; None for any other name."""
    from finetune.baichuan.configuration import BaichuanConfig

    entry = CATALOG.get(name)
    if entry is None or entry.size not in ("7b", "13b"):
        return None
    first = not name.startswith("baichuan2")
    config = BaichuanConfig(
        vocab_size=64_000 if first else 125_696,
        norm_head=not first,
        position_embedding=entry.position_embedding,  # type: ignore[arg-type]
        **(_13B if entry.size == "13b" else {}),  # type: ignore[arg-type]
    )
    return config.to_dict()


CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in _entries()}
"""Name → entry."""
