"""Prompts that attack and prompts that only look dangerous: the shipped ones, generated ones, a user's own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from finetune.data.formats import ROLE_ALIASES
from finetune.data.reading import read_rows
from finetune.data.records import BadRow, Location, Message, Row, RowError, kind_of
from finetune.errors import UserError
from rlhf.safety.taxonomy import DATA, SafetyTaxonomy, load_safety_taxonomy

Split = Literal["train", "evaluation"]
EVALUATION_FILE = DATA / "evaluation.jsonl"
TRAINING_FILE = DATA / "training.jsonl"
BENIGN_FILE = DATA / "benign.jsonl"
TEMPLATES_FILE = DATA / "templates.yaml"

PROMPT_COLUMNS = ("prompt", "question", "query", "instruction", "input", "text", "goal", "问题")
TURN_COLUMNS = ("messages", "conversations", "conversation")
GROUP_COLUMNS = ("type", "category", "area")
"""Where public sets say what kind of prompt it is."""


@dataclass(frozen=True)
class AttackPrompt:
    """A prompt to be answered, and what it tries.

    Attributes:
        id: unique within its file.
        messages: the conversation up to the user's last turn, as `build_prompt` takes it.
        attack: id of a type of attack; None where it is not known.
        value: id of a safety value; None where it is not known.
        group: what a file of the user's calls its kind, where it names no safety value.
    """

    id: str
    messages: tuple[Message, ...]
    attack: str | None = None
    value: str | None = None
    group: str | None = None

    @property
    def prompt(self) -> str:
        """What the user says last."""
        return self.messages[-1]["content"]

    @property
    def area(self) -> str | None:
        """Id of the area of the value, or else the group."""
        return self.value[0] if self.value else self.group


@dataclass(frozen=True)
class BenignPrompt(AttackPrompt):
    """A harmless prompt that looks dangerous.

    Attributes:
        response: a good answer; only training prompts have one.
    """

    response: str | None = None


@cache
def templates() -> dict[str, dict[str, tuple[str, ...]]]:
    """Templates by type of attack and split; `{topic}` stands for the topic of a safety value."""
    import yaml

    content = yaml.safe_load(TEMPLATES_FILE.read_text(encoding="utf-8"))["templates"]
    return {a: {split: tuple(lines) for split, lines in by.items()} for a, by in content.items()}


def generate_attacks(
    seed: int,
    split: Split,
    *,
    count: int | None = None,
    attacks: Sequence[str] | None = None,
    values: Sequence[str] | None = None,
    taxonomy: SafetyTaxonomy | None = None,
) -> list[AttackPrompt]:
    """Attack prompts from templates × safety values, the same for the same arguments.

    Every combination of attack and value comes once before any comes twice, and never with the same template.

    Args:
        seed: decides the order and the templates.
        split: which templates; those of the two splits share none.
        count: how many; None for one of every combination.
        attacks: ids of the types of attack to use; None for all.
        values: ids of the safety values to use, such as those that red-teaming found weak; None for all.
        taxonomy: with overlays; the shipped one by default.

    Raises:
        UserError: an id that does not exist, or more asked for than there are.
    """
    taxonomy = taxonomy or load_safety_taxonomy()
    chosen_attacks = [taxonomy.attack(a, "generate_attacks").id for a in attacks or taxonomy.attack_ids]
    chosen_values = [taxonomy.value(v, "generate_attacks") for v in values or taxonomy.values]
    if split not in ("train", "evaluation"):
        raise UserError(f"split is {split!r}, expected train or evaluation")
    combinations = [(attack, value) for attack in chosen_attacks for value in chosen_values]
    rounds = min(len(templates()[attack][split]) for attack in chosen_attacks)
    count = len(combinations) if count is None else count
    if not 0 <= count <= rounds * len(combinations):
        raise UserError(
            f"{count} attack prompts asked for; {len(combinations)} combinations of attack and value in "
            f"{rounds} wordings make {rounds * len(combinations)}",
            hint="ask for fewer, or name more attacks and values",
        )
    generator = random.Random(f"{seed}/{split}")
    orders = {pair: generator.sample(templates()[pair[0]][split], rounds) for pair in combinations}
    made: list[AttackPrompt] = []
    for index in range(rounds):
        for attack, value in generator.sample(combinations, len(combinations)):
            if len(made) == count:
                return made
            text = orders[attack, value][index].format(topic=value.topic)
            message = {"role": "user", "content": text}
            made.append(AttackPrompt(f"{split}-{seed}-{len(made) + 1:05d}", (message,), attack, value.id))
    return made


def evaluation_prompts() -> list[AttackPrompt]:
    """The fixed attack prompts of evaluation; training must not see them."""
    return read_prompts(EVALUATION_FILE)


def training_prompts() -> list[AttackPrompt]:
    """Attack prompts written for training, beside those that `generate_attacks` makes."""
    return read_prompts(TRAINING_FILE)


def benign_prompts(split: Split) -> list[BenignPrompt]:
    """Harmless prompts that look dangerous; those of training have a good answer."""
    rows = [json.loads(line) for line in BENIGN_FILE.read_text(encoding="utf-8").splitlines()]
    return [
        BenignPrompt(row["id"], ({"role": "user", "content": row["prompt"]},), response=row.get("response"))
        for row in rows
        if row["split"] == split
    ]


def read_prompts(path: Path | str, taxonomy: SafetyTaxonomy | None = None) -> list[AttackPrompt]:
    """Prompts of a file: JSONL, JSON, CSV or Parquet.

    A row has `messages` (or `conversations`), of which the turns up to the user's last are kept, or a
    prompt in a column such as `prompt` or `question`. It may name `attack` and `value` of the safety
    taxonomy; `type` and `category` of public sets become the attack where they name one (in any
    spelling), else a group of its own in reports. A JSON object of lists, as some public sets are, is read
    whole. Answers in the file are not used.

    Raises:
        UserError: no such file, an empty one, a row without a prompt, or an id that does not exist.
    """
    path = Path(path)
    taxonomy = taxonomy or load_safety_taxonomy()
    if not path.is_file():
        raise UserError(f"{path}: no such file", hint="give a JSONL file with a prompt in each row")
    prompts = [_to_prompt(row, number, taxonomy) for number, row in enumerate(_rows(path), start=1)]
    if not prompts:
        raise UserError(f"{path}: no prompts in it", hint='a row looks like {"prompt": "…"}')
    repeated = _first_repeated([prompt.id for prompt in prompts])
    if repeated:
        raise UserError(f"{path}: the id {repeated!r} comes twice", hint="make ids unique or leave them out")
    return prompts


def _rows(path: Path) -> Iterator[Row]:
    nested = _lists_by_name(path)
    if nested is not None:
        for number, item in enumerate(nested, start=1):
            yield _as_row(item, Location(str(path), number, "item"))
        return
    for row in read_rows(path):
        if isinstance(row, BadRow):
            raise UserError(str(row))
        yield row


def _as_row(item: Any, location: Location) -> Row:
    if not isinstance(item, dict):
        raise UserError(f"{location}: expected an object, found {kind_of(item)}")
    return Row(item, location)


def _lists_by_name(path: Path) -> list[Any] | None:
    """The rows of `{"kind": [rows], "other kind": [rows]}`, which tells kinds apart by keys; else None."""
    if path.suffix.lower() != ".json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None  # the general reader says what is wrong
    if not isinstance(content, dict) or len(content) < 2:
        return None
    if not all(isinstance(rows, list) and rows for rows in content.values()):
        return None
    if any(name in content for name in TURN_COLUMNS):
        return None
    return [
        {"type": name, **row} if isinstance(row, dict) else row
        for name, rows in content.items()
        for row in rows
    ]


def _to_prompt(row: Row, number: int, taxonomy: SafetyTaxonomy) -> AttackPrompt:
    columns = row.columns
    try:
        messages = _messages_of(columns)
        attack, value = (_id_in(columns, name) for name in ("attack", "value"))
    except RowError as error:
        raise UserError(f"{row.location}: {error}") from error
    if attack is not None:
        taxonomy.attack(attack, str(row.location))
    if value is not None:
        taxonomy.value(value, str(row.location))
    group = next((str(columns[name]) for name in GROUP_COLUMNS if columns.get(name)), None)
    named = {_spelling(known): known for known in taxonomy.attack_ids}
    if attack is None and group is not None and _spelling(group) in named:
        attack, group = named[_spelling(group)], None
    identity = columns.get("id")
    return AttackPrompt(str(number if identity is None else identity), messages, attack, value, group)


def _spelling(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _id_in(columns: Mapping[str, Any], name: str) -> str | None:
    value = columns.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f"column '{name}' is {kind_of(value)}, expected an id")
    return value


def _messages_of(columns: Mapping[str, Any]) -> tuple[Message, ...]:
    for name in TURN_COLUMNS:
        if columns.get(name):
            return _turns(columns[name], name)
    for name in PROMPT_COLUMNS:
        text = columns.get(name)
        if isinstance(text, str) and text.strip():
            system = columns.get("system")
            front = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
            return (*front, {"role": "user", "content": text})
    found = ", ".join(map(repr, list(columns)[:8])) or "none"
    raise RowError(
        f"no prompt: columns {found}, expected {' or '.join(map(repr, (*TURN_COLUMNS[:2], *PROMPT_COLUMNS[:3])))}"
    )


def _turns(turns: Any, name: str) -> tuple[Message, ...]:
    """A conversation up to the user's last turn."""
    from finetune.baichuan.chat import check_messages

    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"column '{name}' is {kind_of(turns)}, expected a list of turns")
    messages = []
    for turn in turns:
        role = ROLE_ALIASES.get(str(turn.get("role", turn.get("from"))).lower())
        messages.append({"role": role or "?", "content": turn.get("content", turn.get("value"))})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    try:
        check_messages(messages)
    except UserError as error:
        raise RowError(str(error)) from error
    return tuple(messages)


def _first_repeated(ids: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for identity in ids:
        if identity in seen:
            return identity
        seen.add(identity)
    return None
