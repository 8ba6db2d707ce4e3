"""The files beside the weights of an exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

NOTICES = ("*LICEN[CS]E*", "NOTICE*", "*.pdf")
"""Licence notices; Baichuan 2's repositories hold theirs as PDF."""


def write_companions(source: Path, folder: Path, config: Any) -> None:
    """Write config and tokenizer; copy generation defaults and licence notices.

    Args:
        source: the Baichuan folder.
        folder: where to write.
        config: of the exported model.

    Raises:
        UserError: if the source has no tokenizer that can be read.
    """
    config.save_pretrained(folder)
    write_tokenizer(source, folder)
    for pattern in ("generation_config.json", *NOTICES):
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer so that software without this package makes the same ids of it.

    transformers reads ``tokenizer.json`` by its stock class. ``tokenizer.model`` is written too, where there is
    one: llama.cpp's converter reads it, and from ``tokenizer_config.json`` whether a BOS or a space goes in front
    (neither does) and which pieces are matched whole (SentencePiece's user-defined ones, the roles among them),
    all of which it would guess wrong.

    Args:
        source: holds the tokenizer.
        folder: where to write; may be ``source``.

    Raises:
        UserError: if the source has no tokenizer that can be read.
    """
    from finetune.baichuan.chat import virtual_token_ids
    from finetune.baichuan.load import load_tokenizer

    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["add_prefix_space"] = False
    if virtual_token_ids(tokenizer):
        # The post-processor says what goes in front: given add_bos_token, transformers would replace it, and
        # llama.cpp's converter takes its first token for a [CLS], and so for a BOS to add, unless there is one.
        config["cls_token"] = config["bos_token"]
    else:
        config |= {"add_bos_token": False, "add_eos_token": False}
    config["added_tokens_decoder"] = {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    path.write_text(json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
