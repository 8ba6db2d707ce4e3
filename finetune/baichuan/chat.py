"""Baichuan's chat format in token ids: prompts, training examples, and content that cannot forge a role.

The format (official ``generation_utils.py`` and ``fine-tune.py`` of Baichuan 2): a system message is its bare
tokens at the very front; a user turn starts with id 195, an assistant turn with id 196; there is no EOS
between turns. First-generation Chat models use the same two ids under other names, so nothing here looks at
how the role pieces are spelled.

A model that a P-Tuning adapter was merged into has its trained vectors in the embedding rows of a few reserved
pieces (``virtual_token_ids`` in ``tokenizer_config.json``). They stand in front of everything, the system
message included, as the vectors stood in training.

The official encoder turns a literal ``<reserved_107>`` in a user's text into the assistant's role. Everything
here encodes content with :func:`encode_content`, which cannot.

All functions take a :class:`~finetune.baichuan.tokenization.BaichuanTokenizer` or any other fast tokenizer
with the same vocabulary, such as the one that transformers makes of a saved ``tokenizer.json`` by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from finetune.errors import UserError
from finetune.words import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

USER_TOKEN_ID = 195
ASSISTANT_TOKEN_ID = 196
IGNORE_INDEX = -100
"""Label of tokens that the loss leaves out."""

CONTROL_PIECE = re.compile(r"<(reserved_\d+|SEP|CLS)>")
"""Pieces that steer a model whatever their id; the role pieces are known by id, whatever their name."""


class RoleIds(NamedTuple):
    """The ids that open a user's and an assistant's turn."""

    user: int
    assistant: int


def role_ids(tokenizer: PreTrainedTokenizerBase) -> RoleIds:
    """The role ids of a tokenizer: its own, those its ``tokenizer_config.json`` carries, or 195 and 196."""
    return RoleIds(
        _setting(tokenizer, "user_token_id", USER_TOKEN_ID),
        _setting(tokenizer, "assistant_token_id", ASSISTANT_TOKEN_ID),
    )


def virtual_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that stand in front of every conversation and text; none unless P-Tuning was merged in."""
    return list(_setting(tokenizer, "virtual_token_ids", ()))


def _setting(tokenizer: PreTrainedTokenizerBase, name: str, default: Any) -> Any:
    own = getattr(tokenizer, name, None)
    return own if own is not None else tokenizer.init_kwargs.get(name, default)


# --- content ------------------------------------------------------------------------------------------------

_control_ids: WeakKeyDictionary[Any, tuple[RoleIds, frozenset[int]]] = WeakKeyDictionary()


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that content must never produce: both roles, ``<s>``, ``</s>``, ``<unk>``, reserved pieces, and
    whatever else the tokenizer holds for special when this is first asked."""
    roles = role_ids(tokenizer)
    known_roles, controls = _control_ids.get(tokenizer, (None, frozenset()))
    if roles != known_roles:
        special = {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or CONTROL_PIECE.fullmatch(token.content)
        }
        controls = frozenset({*roles, *tokenizer.all_special_ids, *special})
        _control_ids[tokenizer] = (roles, controls)
    return controls


def encode_content(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text that comes from data or users, so that it cannot contain a control id.

    A literal ``<reserved_106>``, ``</s>`` and the like becomes the ids of its characters as ordinary text.
    All other text, user-defined pieces such as line breaks, full-width punctuation and HTML tags included,
    gets exactly the ids of ``tokenizer.encode``.

    Args:
        tokenizer: a fast tokenizer with Baichuan's vocabulary.
        text: what one message says; no marks of any format are expected in it.

    Returns:
        Token ids; ``tokenizer.decode`` of them gives the text back.

    Raises:
        UserError: the text holds a lone surrogate, or a control id of this tokenizer cannot be told from
            ordinary text (wrong role ids).
    """
    ids = _encode_plain(tokenizer, text)
    controls = control_ids(tokenizer)
    if controls.isdisjoint(ids):
        return ids
    # Tokenizers that others built may not mark the role pieces as special, and then still recognise them.
    ids = _encode_literals_apart(tokenizer, text, controls)
    if not controls.isdisjoint(ids):
        found = [tokenizer.convert_ids_to_tokens(index) for index in sorted(controls.intersection(ids))]
        raise UserError(
            f"the control pieces {found} of this tokenizer are ordinary text, so content cannot be kept "
            "apart from them",
            hint="check user_token_id and assistant_token_id in tokenizer_config.json "
            f"(Baichuan: {USER_TOKEN_ID}, {ASSISTANT_TOKEN_ID})",
        )
    return ids


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids with the special tokens left unrecognised: their literals are text."""
    try:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    except TypeError as error:  # all that tokenizers says of half a character
        raise UserError(
            "the text holds a lone surrogate, which no encoding can write", hint="repair or drop it"
        ) from error


def _encode_literals_apart(
    tokenizer: PreTrainedTokenizerBase, text: str, controls: frozenset[int]
) -> list[int]:
    """Ids of a text whose control literals are encoded a character at a time, the rest as always."""
    pieces = sorted((tokenizer.convert_ids_to_tokens(index) for index in controls), key=len, reverse=True)
    literals = re.compile("(" + "|".join(map(re.escape, pieces)) + ")")
    ids: list[int] = []
    for index, part in enumerate(literals.split(text)):
        for chunk in part if index % 2 else [part]:  # odd parts are the literals
            ids += _encode_plain(tokenizer, chunk)
    return ids


# --- conversations ------------------------------------------------------------------------------------------


def check_messages(messages: Messages, *, complete: bool = False) -> None:
    """Check that a conversation has the form Baichuan knows.

    That is: one system message or none, in front; then user and assistant in turn, the user first; every
    content a string.

    Args:
        messages: dictionaries with ``role`` and ``content``.
        complete: the assistant must have the last word, as in a training example.

    Raises:
        UserError: naming the first message that does not fit and what was expected there.
    """
    turns = list(messages)
    offset = 1 if turns and turns[0].get("role") == "system" else 0
    if len(turns) == offset:
        raise UserError("the conversation has no user message", hint="add a message with role 'user'")
    for number, message in enumerate(turns, start=1):
        expected = "system" if number <= offset else ("user", "assistant")[(number - 1 - offset) % 2]
        if message.get("role") != expected:
            raise UserError(
                f"message {number} has role {message.get('role')!r}, expected {expected!r}",
                hint="a conversation is an optional system message, then user and assistant in turn",
            )
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise UserError(f"message {number} ({expected}) has content of type {kind}, expected a string")
    if complete and turns[-1]["role"] != "assistant":
        raise UserError(
            f"the conversation ends with message {len(turns)} of the user, so there is no answer to learn",
            hint="end it with a message of role 'assistant'",
        )


def split_system(messages: Messages) -> tuple[str | None, Messages]:
    """The system message's content, if there is one, and the turns after it."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Messages) -> tuple[list[int], list[int]]:
    """Ids of user and assistant turns, and a mask of the same length that is 1 on the assistant's text."""
    roles = role_ids(tokenizer)
    ids: list[int] = []
    mask: list[int] = []
    for turn in turns:
        by_assistant = turn["role"] == "assistant"
        content = encode_content(tokenizer, turn["content"])
        ids += [roles.assistant if by_assistant else roles.user, *content]
        mask += [0, *[int(by_assistant)] * len(content)]
    return ids, mask


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, append_eos: bool
) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation, untruncated, and a mask that is 1 on what the assistant generates.

    Args:
        append_eos: close an assistant's last turn with EOS (1 in the mask); false where it is continued.
    """
    system, turns = split_system(messages)
    ids = virtual_token_ids(tokenizer) + (encode_content(tokenizer, system) if system is not None else [])
    mask = [0] * len(ids)
    turn_ids, turn_mask = encode_turns(tokenizer, turns)
    ids, mask = ids + turn_ids, mask + turn_mask
    if append_eos and turns[-1]["role"] == "assistant":
        ids.append(tokenizer.eos_token_id)
        mask.append(1)
    return ids, mask


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    max_length: int = 4096,
    max_new_tokens: int = 2048,
) -> list[int]:
    """Prompt ids for generation, as the official ``build_chat_input`` makes them.

    A round is a user turn with the answer to it. When the history is too long, whole rounds are dropped from
    the left; the newest is always kept. The system message goes in front of what remains. Then id 196 asks
    for an answer, unless the last message is the assistant's, which is continued. Last, everything is cut
    from the left to ``max_length - max_new_tokens``. Virtual tokens are part of that length; they stand in
    front and are never cut.

    Args:
        tokenizer: a fast tokenizer with Baichuan's vocabulary.
        messages: dictionaries with ``role`` (system, user, assistant) and ``content``.
        max_length: tokens that the model can hold, prompt and answer together.
        max_new_tokens: tokens kept free for the answer.

    Returns:
        At most ``max_length - max_new_tokens`` token ids.

    Raises:
        UserError: the roles are out of order, or no room is left for a prompt.
    """
    check_messages(messages)
    virtual = virtual_token_ids(tokenizer)
    room = max_length - max_new_tokens - len(virtual)
    if room <= 0:
        beside = f" beside {plural(len(virtual), 'virtual token')}" if virtual else ""
        raise UserError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt in max_length {max_length}{beside}",
            hint="lower max_new_tokens",
        )
    system, turns = split_system(messages)
    system_ids = encode_content(tokenizer, system) if system is not None else []
    history_room = room - len(system_ids)
    history: list[int] = []
    for start in range((len(turns) - 1) // 2 * 2, -1, -2):  # newest round first; rounds start at even turns
        round_ids, _ = encode_turns(tokenizer, turns[start : start + 2])
        if history and len(history) + len(round_ids) > history_room:
            break
        history = round_ids + history
    ids = system_ids + history
    if turns[-1]["role"] == "user":
        ids.append(role_ids(tokenizer).assistant)
    return virtual + ids[-room:]


def build_example(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, max_length: int
) -> dict[str, list[int]]:
    """A training example with the labels of the official fine-tuning script.

    Every assistant turn is learned, and one EOS is appended and learned. At each user-role id the label is
    EOS, so that the model learns to stop where the next turn would begin. Everything else is ignored: user
    text, the assistant-role ids, a system message (which goes in front), virtual tokens and the token after
    them (which begins the conversation: no model is to predict it).

    Args:
        tokenizer: a fast tokenizer with Baichuan's vocabulary.
        messages: a conversation that the assistant ends.
        max_length: longer examples are cut on the right to this many tokens.

    Returns:
        ``input_ids`` and ``labels``, equally long; ignored labels are -100. Labels are not shifted: as in
        transformers, the model compares position i's logits with position i + 1's label.

    Raises:
        UserError: the roles are out of order, or the last message is not the assistant's.
    """
    check_messages(messages, complete=True)
    ids, mask = encode_conversation(tokenizer, messages, append_eos=True)
    user, eos = role_ids(tokenizer).user, tokenizer.eos_token_id
    labels = [
        index if learned else eos if index == user else IGNORE_INDEX  # content never holds the user-role id
        for index, learned in zip(ids, mask)
    ]
    virtual = len(virtual_token_ids(tokenizer))
    if virtual:
        labels[: virtual + 1] = [IGNORE_INDEX] * (virtual + 1)
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


# --- template -----------------------------------------------------------------------------------------------

_TEMPLATE = """\
{%- set user, assistant = USER_PIECE, ASSISTANT_PIECE %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- if not turns %}
    {{- raise_exception('the conversation has no user message') }}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content }}
{%- endif %}
{%- for turn in turns %}
    {%- if turn.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('roles must be: optional system, then user and assistant in turn') }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- user + turn.content }}
    {%- else %}
        {{- assistant }}
        {%- generation %}
            {{- turn.content }}
            {%- if loop.last and not add_generation_prompt %}
                {{- eos_token }}
            {%- endif %}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and turns[-1].role == 'user' %}
    {{- assistant }}
{%- endif %}
"""


def chat_template(user_piece: str, assistant_piece: str, virtual_pieces: Sequence[str] = ()) -> str:
    """The official format as a Jinja template, for software that only knows templates.

    With ``add_generation_prompt=True`` (or ``continue_final_message=True``) it renders what
    :func:`build_prompt` builds, short of truncation: a last message of the assistant's is continued. With
    neither, as transformers and trl have it, a conversation that the assistant ends is complete and closes
    with EOS, as in :func:`build_example`; the assistant's text and that EOS are marked with
    ``{% generation %}``. What a template cannot say is the official label at user-role ids (EOS, where the
    input is the role id): train with :func:`build_example`.

    A rendered *text* carries content literally, so whoever tokenises it lets content forge roles.
    ``BaichuanTokenizer.apply_chat_template(tokenize=True)`` does not go through text; newer transformers
    offer ``sanitize_control_tokens=True`` for stock tokenizers.

    Args:
        user_piece: how the tokenizer at hand spells the user-role id.
        assistant_piece: the same for the assistant-role id.
        virtual_pieces: spellings of the virtual tokens, which are written in front of everything.
    """
    template = _TEMPLATE.replace("USER_PIECE", repr(user_piece))
    template = template.replace("ASSISTANT_PIECE", repr(assistant_piece))
    return with_virtual_pieces(template, virtual_pieces)


def with_virtual_pieces(template: str, virtual_pieces: Sequence[str]) -> str:
    """A chat template that writes these pieces first, and then what it wrote before."""
    if not virtual_pieces:
        return template
    # No line break behind it: a template that begins with text would write it, too.
    return "{#- virtual tokens: merged P-Tuning #}{{- " + repr("".join(virtual_pieces)) + " }}" + template
