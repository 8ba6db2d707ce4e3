"""Telling models apart by what is in their weights, whatever they are called."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLED_ROWS = 64
MATRIX_ROWS = 2
"""Sampled of every matrix, of W_pack in each of its three parts."""
SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
EMBEDDINGS = "model.embed_tokens.weight"
PACKED = "self_attn.W_pack"
SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MATRICES = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def fingerprint(folder: Path) -> str:
    """Two short digests of a model, ``MODEL:MATRICES``, to compare by `same_model`.

    The first is of shapes, position encoding, some of the norms, and some rows of the embeddings; the second of
    some rows of every matrix in every layer, which is where merged LoRA adapters show. It is empty where matrices
    are quantised on disk. Both are equal for copies of a model under other names, in other file formats, in
    float32 and bfloat16, and in Llama's layout. Reads about three megabytes of a 7B: tensors are memory-mapped,
    except in ``.bin`` files of before torch 1.6.

    Args:
        folder: model folder.

    Raises:
        UserError: if the weights cannot be read.
    """
    from finetune.baichuan.checkpoints import read_json
    from finetune.baichuan.shards import pick_tensors

    config = read_json(folder / "config.json")
    layers = int(config.get("num_hidden_layers", 1))
    norms = [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        f"model.layers.{layers - 1}.post_attention_layernorm.weight",
    ]
    matrices = [
        f"model.layers.{layer}.{module}.weight"
        for layer in range(layers)
        for module in (PACKED, *SPLIT, *MATRICES)
    ]
    found = pick_tensors(folder, [EMBEDDINGS, *norms, *matrices])
    shapes = [config.get(key) for key in SHAPES]
    # Official configs do not name it: as BaichuanConfig infers it.
    positions = "rope" if "max_position_embeddings" in config else "alibi"
    shapes.append(config.get("position_embedding", positions))
    digest = hashlib.sha256(json.dumps(shapes).encode())
    for name in (EMBEDDINGS, *norms):
        if name in found:
            # From the middle: the first rows are control pieces that no training touches.
            rows = _middle(found[name], SAMPLED_ROWS) if name == EMBEDDINGS else found[name]
            digest.update(name.encode() + _bytes(rows))
    return f"{digest.hexdigest()[:32]}:{_digest_matrices(found, layers)}"


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints may be of one model: matrices count where both know them.

    Of quantised copies, only what quantisation leaves alone is compared, which LoRA leaves alone, too.
    """
    (model, _, matrices), (other_model, _, other_matrices) = one.partition(":"), other.partition(":")
    return model == other_model and (not matrices or not other_matrices or matrices == other_matrices)


def _digest_matrices(found: dict[str, torch.Tensor], layers: int) -> str:
    """Of some rows of every matrix; empty if one is quantised."""
    digest = hashlib.sha256()
    for layer in range(layers):
        modules = {
            name: found.get(f"model.layers.{layer}.{name}.weight") for name in (PACKED, *SPLIT, *MATRICES)
        }
        packed = modules.pop(PACKED)
        if packed is not None:
            modules |= dict(zip(SPLIT, packed.chunk(3)))
        for matrix in modules.values():
            if matrix is None or not matrix.is_floating_point():
                return ""
            digest.update(_bytes(_middle(matrix, MATRIX_ROWS)))
    return digest.hexdigest()[:32]


def _middle(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    middle = matrix.shape[0] // 2
    return matrix[middle : middle + rows]


def _bytes(tensor: torch.Tensor) -> bytes:
    """As bfloat16, so that a copy of 32 bits has the same."""
    import torch

    return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
