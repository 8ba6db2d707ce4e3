"""A P-Tuning adapter into weights: its vectors become the embeddings of vocabulary pieces that nothing uses.

peft puts a P-Tuning adapter's vectors in front of the embeddings of a sequence. Baichuan's vocabulary has
hundreds of ``<reserved_N>`` pieces without a meaning: a vector written into the embedding row of one of them
enters the model wherever that piece stands, so with the pieces in front of every sequence the model computes
what base and adapter compute. The tokenizer, the chat template and the prompt builder of the merged folder put
them there. The head is left alone: how likely the model holds any token, these pieces included, is what it was.

A row has the dtype of the embeddings. peft rounds the vectors to that dtype at each use, so a bfloat16 merge
computes what the adapter computes on the bfloat16 base; only a base that is held in float32 for the adapter sees
the unrounded vectors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.words import plural

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from finetune.baichuan.load import Base

PROMPT_TYPES = ("P_TUNING", "PROMPT_TUNING")
"""The methods of peft whose whole result is vectors in front of the input."""

EMBEDDINGS = "model.embed_tokens.weight"
RESERVED_PIECE = re.compile(r"<reserved_(\d+)>")
ROLE_NUMBERS = frozenset({102, 103, 106, 107})
"""Reserved pieces that open turns, in Baichuan (102, 103) and Baichuan 2 (106, 107)."""


def read_virtual_vectors(adapter: Path, config: Mapping[str, Any]) -> torch.Tensor:
    """The trained vectors, float32 of shape (num_virtual_tokens, hidden_size), in the order they stand.

    A saved adapter holds them as the encoder computed them last; the encoder itself is not needed any more.

    Raises:
        UserError: for another method, and for an adapter that does not hold what its configuration says.
    """
    import torch
    from safetensors.torch import load_file

    kind = config.get("peft_type")
    if kind not in PROMPT_TYPES:
        raise UserError(f"{adapter}: a {kind} adapter has no virtual tokens")
    tensors = load_file(adapter / "adapter_model.safetensors")
    if set(tensors) != {"prompt_embeddings"}:
        raise UserError(
            f"{adapter}: holds {', '.join(sorted(tensors)) or 'nothing'}, expected prompt_embeddings alone",
            hint="merge the adapter/ folder of a finished run",
        )
    vectors = tensors["prompt_embeddings"].float()
    expected = (config.get("num_virtual_tokens"), config.get("token_dim"))
    if tuple(vectors.shape) != expected:
        raise UserError(
            f"{adapter}: prompt_embeddings has shape {tuple(vectors.shape)}, adapter_config.json says {expected}"
        )
    if not bool(torch.isfinite(vectors).all()):
        raise UserError(
            f"{adapter}: its vectors are not finite", hint="train again with a lower learning rate"
        )
    return vectors


def choose_token_ids(
    tokenizer: PreTrainedTokenizerBase, count: int, *, settings: Mapping[str, Any] | None = None
) -> list[int]:
    """Free reserved pieces for virtual tokens: those with the highest ids, in ascending order.

    Free is what no text of a user or a data set can become (:func:`finetune.baichuan.chat.encode_content` reads
    every reserved piece's literal as text) and nothing gives a meaning to: no role, no special token, no virtual
    token, not in the chat template, no token id in ``settings``. Plain ``tokenizer.encode`` still turns the
    literal of such a piece into its id, as it does with the roles.

    Args:
        tokenizer: of the model that the vectors go into.
        count: how many are needed.
        settings: the keys of ``config.json`` and ``generation_config.json``; ``…_token_id`` counts.

    Raises:
        UserError: there are fewer.
    """
    from finetune.baichuan.chat import role_ids, virtual_token_ids

    taken = {*role_ids(tokenizer), *virtual_token_ids(tokenizer), *tokenizer.all_special_ids}
    for key, value in (settings or {}).items():
        if key.endswith(("_token_id", "_token_ids")) and value is not None:
            taken.update(value if isinstance(value, list) else [value])
    template = str(tokenizer.chat_template)
    free = []
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        number = RESERVED_PIECE.fullmatch(token.content)
        if number is None or index in taken or int(number[1]) in ROLE_NUMBERS:
            continue
        if token.content not in template:
            free.append(index)
    if count > len(free):
        raise UserError(
            f"{plural(count, 'virtual token')}, but of the vocabulary's reserved pieces only {len(free)} are free",
            hint="train with fewer: adapter.num_virtual_tokens",
        )
    return free[len(free) - count :]


def merge_virtual_tokens(
    tensors: Iterable[tuple[str, torch.Tensor]],
    vectors: torch.Tensor,
    ids: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model, vectors in their places in the embeddings and all else passed through.

    Args:
        tensors: names and tensors of a Baichuan checkpoint.
        vectors: (n, hidden_size).
        ids: n rows of the embeddings, for the vectors in order.
        dtype: of the embeddings from here on; None keeps theirs. Rounding a vector once is better than twice.

    Raises:
        UserError: the embeddings are missing or of another shape, or their dtype cannot hold a vector.
    """
    import torch

    found = False
    for name, tensor in tensors:
        if name == EMBEDDINGS:
            found = True
            if tensor.ndim != 2 or tensor.shape[1] != vectors.shape[1] or max(ids) >= tensor.shape[0]:
                raise UserError(
                    f"{EMBEDDINGS} has shape {tuple(tensor.shape)}: no place for vectors of {vectors.shape[1]} "
                    f"numbers in row {max(ids)}",
                    hint="the adapter was trained on another model: give its base with --base",
                )
            tensor = tensor.to(dtype or tensor.dtype, copy=True)
            rows = vectors.to(tensor.dtype)
            if not bool(torch.isfinite(rows).all()):
                raise UserError(
                    f"the vectors are too large for {str(tensor.dtype).removeprefix('torch.')}",
                    hint="merge with --dtype bfloat16 or float32",
                )
            tensor[list(ids)] = rows
        yield name, tensor
    if not found:
        raise UserError(f"the base has no {EMBEDDINGS}", hint="give the right --base")


def write_virtual_token_companions(folder: Path, ids: Sequence[int]) -> dict[str, Any]:
    """Have the tokenizer in ``folder`` put these ids in front of everything, whatever software loads it.

    ``tokenizer.json`` gets a post-processor that adds them to plain calls (as one adds a BOS token elsewhere),
    the chat template writes them, and ``tokenizer_config.json`` lists their ids for :mod:`finetune.baichuan.chat`.

    Args:
        folder: holds a tokenizer already: the base's.
        ids: of the vectors, in order.

    Returns:
        ``virtual_token_ids`` and ``virtual_token_pieces`` of this merge, to keep a record of.
    """
    from finetune.baichuan.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.prepend_virtual_tokens(ids)
    tokenizer.save_pretrained(folder)
    return {
        "virtual_token_ids": list(ids),
        "virtual_token_pieces": tokenizer.convert_ids_to_tokens(list(ids)),
    }


def check_prompt_base(
    base: Base, adapter: Path, vectors: torch.Tensor, dtype: str | None, *, passes_through: bool
) -> None:
    """Refuse a base that the vectors do not fit.

    Args:
        base: to merge into.
        adapter: for messages.
        vectors: (n, hidden_size).
        dtype: to write, or None.
        passes_through: whether quantised weights are to stay quantised.

    Raises:
        UserError: another hidden size, or quantised weights that cannot be written as asked.
    """
    from finetune.baichuan.checkpoints import find_weight_files

    hidden = base.config["hidden_size"]
    if vectors.shape[1] != hidden:
        raise UserError(
            f"{adapter}: its vectors have {vectors.shape[1]} numbers, {base.folder} has hidden_size {hidden}",
            hint="the adapter was trained on another model: give its base with --base",
        )
    if not base.quantized or not passes_through:
        return
    if dtype is not None:
        raise UserError(
            f"--dtype: found {dtype}, but the weights of {base.folder} are {base.quantization}",
            hint="leave --dtype out, or expand the weights with --onto dequantized",
        )
    if any(path.suffix != ".safetensors" for path in find_weight_files(base.folder)):
        raise UserError(
            f"{base.folder}: quantised weights in pickle files cannot be written anew",
            hint="merge onto the 16-bit release of the same model with --base, or use --onto dequantized",
        )


def token_settings(base: Base) -> dict[str, Any]:
    """The keys of a base's ``config.json`` and ``generation_config.json``."""
    path = base.folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {**base.config, **generation}
