"""A complete Baichuan model folder of two layers and random weights, written in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import train_tiny_sentencepiece

VOCAB_SIZE = 1800
HIDDEN, WIDE, LAYERS, HEADS = 64, 128, 2, 4


def tiny_config(position_embedding: str = "rope", **changes: Any) -> Any:
    """Shapes of the tiny model."""
    from finetune.baichuan import BaichuanConfig

    return BaichuanConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "model_max_length": 512,
            "initializer_range": 0.1,  # far enough from zero that attention matters
            "position_embedding": position_embedding,
            **changes,
        }
    )


def tiny_model(position_embedding: str = "rope", *, seed: int = 0, **changes: Any) -> Any:
    """A causal LM with random weights, in eval mode, the same at every call."""
    from finetune.baichuan import BaichuanForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BaichuanForCausalLM(tiny_config(position_embedding, **changes)).eval()


def write_tiny_base(folder: Path, position_embedding: str = "rope", **changes: Any) -> Path:
    """Config, weights and tokenizer in ``folder``, as `model.base=FOLDER` wants them."""
    from finetune.baichuan import BaichuanTokenizer
    from finetune.baichuan.nano import generation_config

    folder.mkdir(parents=True, exist_ok=True)
    vocab_file = train_tiny_sentencepiece(folder / "tokenizer.model", VOCAB_SIZE)
    BaichuanTokenizer(vocab_file=str(vocab_file), model_max_length=512).save_pretrained(folder)
    model = tiny_model(position_embedding, **changes)
    model.generation_config = generation_config()
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded with 0 on the left or right, and their mask."""
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    if side == "left":
        ids = [pad + row for pad, row in zip(pads, rows)]
        mask = [pad + [1] * len(row) for pad, row in zip(pads, rows)]
    else:
        ids = [row + pad for pad, row in zip(pads, rows)]
        mask = [[1] * len(row) + pad for pad, row in zip(pads, rows)]
    return torch.tensor(ids), torch.tensor(mask)
