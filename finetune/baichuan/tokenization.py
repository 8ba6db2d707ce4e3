"""Baichuan's tokenizer on transformers' fast base class, with no remote code.

Built from the SentencePiece ``tokenizer.model`` of any official release (half a second), or from its own
``tokenizer.json``. The ids are those of the official tokenizer: SentencePiece's, and 1, 2, 0 for a literal
``<s>``, ``</s>``, ``<unk>``.

Two deliberate differences: decoding puts no spaces around ``<s>``, ``</s>`` and ``<unk>``, and
``skip_special_tokens=True`` also skips role and reserved pieces, which no answer needs.

Virtual tokens (a merged P-Tuning adapter) are treated as other models treat a BOS token: plain calls put them in
front unless told ``add_special_tokens=False``, and the chat template writes them itself. Text that a template
rendered must therefore be tokenised with ``add_special_tokens=False``, which is what ``apply_chat_template``
and every serving engine do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers.tokenization_utils_base import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from finetune.baichuan.chat import (
    ASSISTANT_TOKEN_ID,
    CONTROL_PIECE,
    USER_TOKEN_ID,
    RoleIds,
    chat_template,
    check_messages,
    encode_content,
    encode_conversation,
    role_ids,
    with_virtual_pieces,
)
from finetune.errors import UserError

STOCK_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Written as ``tokenizer_class``: every transformers (4 and 5) and what builds on it loads it without us."""

_SPACE = "\u2581"  # SentencePiece's visible space


class BaichuanTokenizer(TokenizersBackend):
    """Tokenizer of Baichuan 2 and first-generation Baichuan.

    Args:
        vocab_file: an official ``tokenizer.model``; also copied by ``save_pretrained``, because llama.cpp and
            others read it.
        tokenizer_file: a ``tokenizer.json``; wins where both are given, being what was saved last.
        user_token_id: the id that opens a user's turn.
        assistant_token_id: the id that opens an assistant's turn.
        virtual_token_ids: ids that stand in front of every conversation and text, if there are any.

    Raises:
        UserError: no usable file, a SentencePiece model of another kind, or impossible role or virtual ids.
    """

    vocab_files_names: ClassVar = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    model_input_names: ClassVar = ["input_ids", "attention_mask"]

    user_token_id: int = USER_TOKEN_ID
    assistant_token_id: int = ASSISTANT_TOKEN_ID
    virtual_token_ids: Sequence[int] = ()

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        *,
        user_token_id: int = USER_TOKEN_ID,
        assistant_token_id: int = ASSISTANT_TOKEN_ID,
        virtual_token_ids: Sequence[int] = (),
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        unk_token: str | AddedToken = "<unk>",
        pad_token: str | AddedToken = "<unk>",
        tokenizer_object: Tokenizer | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("auto_map", "sp_model_kwargs"):  # official leftovers: remote code, its options
            kwargs.pop(name, None)
        roles = RoleIds(user_token_id, assistant_token_id)
        if tokenizer_object is None:
            tokenizer_object = _load_backend(vocab_file, tokenizer_file, roles, kwargs.get("name_or_path"))
        self._tokenizer = tokenizer_object
        self.virtual_token_ids = virtual_token_ids  # before the base class makes a post-processor
        role_pieces = _role_pieces(tokenizer_object, roles)
        virtual_pieces = _pieces(tokenizer_object, virtual_token_ids)
        if virtual_token_ids:
            kwargs["virtual_token_ids"] = list(virtual_token_ids)
        if kwargs.get("chat_template") is None:
            kwargs["chat_template"] = chat_template(*role_pieces, virtual_pieces)
        super().__init__(
            vocab_file=vocab_file,
            # Only the names count: official configs say single_word, which their own tokenizer ignores.
            bos_token=str(bos_token),
            eos_token=str(eos_token),
            unk_token=str(unk_token),
            pad_token=str(pad_token),
            user_token_id=user_token_id,
            assistant_token_id=assistant_token_id,
            **kwargs,
        )
        self.user_token_id = user_token_id
        self.assistant_token_id = assistant_token_id

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to ``__init__``; the base class would take them apart."""
        return kwargs

    def encode_content(self, text: str) -> list[int]:
        """Ids of text from data or users, safe against role injection: see :func:`chat.encode_content`."""
        return encode_content(self, text)

    def prepend_virtual_tokens(self, ids: Sequence[int]) -> None:
        """Put ids in front of every conversation and text, before the virtual tokens that are there already.

        Changes the prompt builder, the chat template and plain calls, here and in what is saved.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        template = self.get_chat_template()
        own = template == self._own_template()
        template = with_virtual_pieces(template, _pieces(self._tokenizer, ids))
        self.virtual_token_ids = [*ids, *self.virtual_token_ids]
        self.init_kwargs["virtual_token_ids"] = self.virtual_token_ids
        self.chat_template = self._own_template() if own else template
        self.update_post_processor()

    def update_post_processor(self) -> None:
        """What plain calls add to a text: as in transformers, with the virtual tokens in front."""
        super().update_post_processor()
        if not self.virtual_token_ids:
            return
        virtual = list(zip(_pieces(self._tokenizer, self.virtual_token_ids), self.virtual_token_ids))
        first = [*virtual, *([(self.bos_token, self.bos_token_id)] if self.add_bos_token else [])]
        last = [(self.eos_token, self.eos_token_id)] if self.add_eos_token else []
        front, back = [piece for piece, _ in first], [piece for piece, _ in last]
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*front, "$A", *back],
            pair=[*front, "$A", *back, "$B:1", *back],
            special_tokens=[*first, *last],
        )

    def apply_chat_template(
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, for one conversation or a list, but ids never go through text: content
        cannot forge roles.

        That holds for the tokenizer's own template, the official format. Any other template is rendered and
        tokenised by transformers (see its ``sanitize_control_tokens``), and so is any text made with
        ``tokenize=False``: there, literal control pieces in content are as dangerous as they look.
        """
        template = self.get_chat_template(chat_template, tools)
        if not tokenize or tools or documents or template != self._own_template():
            return super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                **kwargs,
            )
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        rows = []
        for messages in conversation if batched else [conversation]:
            check_messages(messages)
            ids, mask = encode_conversation(
                self, messages, append_eos=not (add_generation_prompt or continue_final_message)
            )
            if add_generation_prompt and messages[-1]["role"] == "user":
                ids.append(self.assistant_token_id)
                mask.append(0)
            rows.append((ids, mask))
        return self._collate_chat(rows, batched=batched, **kwargs)

    def _own_template(self) -> str:
        virtual_pieces = _pieces(self._tokenizer, self.virtual_token_ids)
        return chat_template(*_role_pieces(self._tokenizer, role_ids(self)), virtual_pieces)

    def _collate_chat(
        self,
        rows: list[tuple[list[int], list[int]]],
        *,
        batched: bool,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **template_variables: Any,  # which the official format has none of
    ) -> Any:
        """Truncate, pad and return ids and assistant masks the way ``apply_chat_template`` promises."""
        if return_assistant_tokens_mask and not return_dict:
            raise ValueError("return_assistant_tokens_mask=True requires return_dict=True")
        if truncation:
            limit = max_length or self.model_max_length
            rows = [(self._truncate(ids, limit), self._truncate(mask, limit)) for ids, mask in rows]
        as_batch = batched or return_tensors is not None
        input_ids = [ids for ids, _ in rows]
        options = {"padding_side": self.padding_side, **(tokenizer_kwargs or {})}
        encoded: BatchEncoding = self.pad(
            {"input_ids": input_ids if as_batch else input_ids[0]},
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            return_tensors=return_tensors,
            **options,
        )
        if return_assistant_tokens_mask:
            widths = [len(ids) for ids in encoded["input_ids"]] if as_batch else [len(encoded["input_ids"])]
            masks = []
            for (_, mask), width in zip(rows, widths):
                fill = [0] * (width - len(mask))
                masks.append(mask + fill if options["padding_side"] == "right" else fill + mask)
            encoded["assistant_masks"] = masks if as_batch else masks[0]
            encoded.convert_to_tensors(tensor_type=return_tensors)
        return encoded if return_dict else encoded["input_ids"]

    def _truncate(self, values: list[int], limit: int) -> list[int]:
        """At most ``limit`` values, cut on the tokenizer's side; what belongs to virtual tokens stays."""
        surplus = len(values) - limit
        if surplus <= 0 or self.truncation_side == "right":
            return values[:limit]
        kept = min(len(self.virtual_token_ids), limit)
        return values[:kept] + values[kept + surplus :]

    def _save_pretrained(
        self,
        save_directory: str,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Make the saved folder loadable by software that has never heard of this class."""
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["tokenizer_class"] = STOCK_TOKENIZER_CLASS
        foreign = ["auto_map", "is_local", "local_files_only"]
        if self.virtual_token_ids:  # transformers would replace the post-processor that adds them
            foreign += ["add_bos_token", "add_eos_token"]
        for name in foreign:
            config.pop(name, None)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        config_file.write_text(text + "\n", encoding="utf-8")
        saved = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return saved + self.save_vocabulary(save_directory, filename_prefix)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy ``tokenizer.model`` where there is one; returns the path in a tuple, or an empty one."""
        source = Path(self.vocab_file) if getattr(self, "vocab_file", None) else None
        if source is None or not source.is_file():
            return ()
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)
        return (str(target),)


# --- reading SentencePiece ----------------------------------------------------------------------------------


def build_backend(vocab_file: str | Path, roles: RoleIds) -> Tokenizer:
    """Turn a SentencePiece BPE model into a ``tokenizers`` one that gives the same ids.

    SentencePiece merges whichever two neighbours spell the piece with the best score, so every way to split a
    piece into two others becomes a merge, ranked by the piece's score. User-defined pieces are matched first,
    longest first, and never merged: they become added tokens. Pieces that steer a model are marked special,
    so that ``split_special_tokens=True`` reads their literals as text.

    Args:
        vocab_file: path to a ``tokenizer.model``.
        roles: ids of the role pieces, which are control pieces however they are spelled.

    Raises:
        UserError: the file is not a SentencePiece model, or one with options Baichuan's does not have.
    """
    proto = _read_model(Path(vocab_file))
    kind = proto.SentencePiece
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == kind.NORMAL}
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    merges.sort(key=lambda merge: -merge[0])  # stable: equal scores keep the order of the vocabulary
    backend = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=[(left, right) for _, left, right in merges],
            unk_token=next(piece.piece for piece in proto.pieces if piece.type == kind.UNKNOWN),
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    added = []
    for index, piece in enumerate(proto.pieces):
        if piece.type in (kind.CONTROL, kind.UNKNOWN):
            added.append(AddedToken(piece.piece, special=True, normalized=False))
        elif piece.type == kind.USER_DEFINED:
            special = index in roles or CONTROL_PIECE.fullmatch(piece.piece) is not None
            # normalized: SentencePiece looks for these after spaces have become visible
            added.append(AddedToken(piece.piece, special=special, normalized=True))
    backend.add_tokens(added)
    return backend


def _read_model(path: Path) -> Any:
    """Parse a SentencePiece file; refuse options whose effect on ids :func:`build_backend` does not copy."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(
            f"{path}: not a readable SentencePiece model ({type(error).__name__})",
            hint="download the file again; a Git LFS pointer of a few lines is not the file itself",
        ) from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    foreign = {
        "model_type is not BPE": trainer.model_type != trainer.BPE,
        "byte_fallback is off": not trainer.byte_fallback,
        "add_dummy_prefix is on": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces is on": normalizer.remove_extra_whitespaces,
        "escape_whitespaces is off": not normalizer.escape_whitespaces,
        f"text is normalised ({normalizer.name})": bool(normalizer.precompiled_charsmap),
    }
    if any(foreign.values()):
        problems = "; ".join(problem for problem, holds in foreign.items() if holds)
        raise UserError(f"{path}: not a tokenizer of Baichuan's kind: {problems}")
    return proto


def _load_backend(
    vocab_file: str | None, tokenizer_file: str | None, roles: RoleIds, name_or_path: str | None
) -> Tokenizer:
    if tokenizer_file is not None:
        try:
            return Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{tokenizer_file}: not a readable tokenizer.json ({error})") from error
    if vocab_file is not None:
        return build_backend(vocab_file, roles)
    raise UserError(
        f"no tokenizer.model and no tokenizer.json in {name_or_path or 'the arguments'}",
        hint="a Baichuan folder holds tokenizer.model; copy it from the base model",
    )


def _role_pieces(backend: Tokenizer, roles: RoleIds) -> tuple[str, str]:
    """How the role ids are spelled; a single character could not be told from the same character in text."""
    pieces: list[str] = []
    for role, index in roles._asdict().items():
        piece = backend.id_to_token(index)
        if piece is None or len(piece) < 2:
            found = "not in the vocabulary" if piece is None else f"the piece {piece!r}"
            raise UserError(
                f"{role}_token_id {index} is {found}, so it cannot mark a turn of the conversation",
                hint=f"Baichuan's role ids are {USER_TOKEN_ID} and {ASSISTANT_TOKEN_ID}",
            )
        pieces.append(piece)
    return pieces[0], pieces[1]


def _pieces(backend: Tokenizer, ids: Sequence[int]) -> list[str]:
    """How virtual tokens are spelled."""
    pieces = [backend.id_to_token(index) for index in ids]
    if None in pieces:
        raise UserError(
            f"virtual_token_ids: {ids[pieces.index(None)]} is not in the vocabulary",
            hint="tokenizer_config.json and tokenizer.json must be those of one merged folder",
        )
    return [str(piece) for piece in pieces]


# --- registration -------------------------------------------------------------------------------------------


def register_tokenizer() -> None:
    """Make ``AutoTokenizer`` give this class for Baichuan models; calling it again changes nothing.

    Official folders name the class in ``tokenizer_config.json``. Folders that this class saved name a stock
    class there, for software without this package; where it is imported, the two tables below let
    ``config.json``'s model type decide instead.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto import tokenization_auto

    from finetune.baichuan.configuration import BaichuanConfig

    AutoTokenizer.register(BaichuanConfig, BaichuanTokenizer, exist_ok=True)
    tokenization_auto.TOKENIZER_MAPPING_NAMES[BaichuanConfig.model_type] = BaichuanTokenizer.__name__
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(BaichuanConfig.model_type)
