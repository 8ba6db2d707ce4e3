"""The safety taxonomy: six types of attack, and the safety values by area. Read, checked, extended by overlays."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError

from finetune.errors import UserError
from finetune.recipe.yaml_text import Document, Key, parse_yaml

DATA = Path(__file__).resolve().parent / "data"
TAXONOMY_FILE = DATA / "taxonomy.yaml"
FORMAT_VERSION = 1

Behaviour = Literal["refuse", "answer_safely", "redirect_to_help"]
"""What a good answer does: decline; say the danger and the safe way; show care and where help is."""

_END_OF_SENTENCE = re.compile(r"[。！？!?.…]$")


def _open_ended(text: str) -> str:
    if _END_OF_SENTENCE.search(text):
        raise PydanticCustomError("punctuation", "ends with punctuation; templates put their own after it")
    return text


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Phrase = Annotated[Text, AfterValidator(_open_ended)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttackType(_Entry):
    """A way of going about it, whatever the harm is."""

    id: Annotated[str, StringConstraints(pattern=r"^[a-z_]+$")]
    zh: Text
    en: Text
    scope: Text


class Value(_Entry):
    """One thing that answers must not harm.

    Attributes:
        id: `AREA.NUMBER`, such as `D.03`; never given to another value once published.
        topic: a Chinese verb phrase that attack templates insert.
        reason: why it is not done, for written answers.
        alternative: what is offered instead, for written answers.
    """

    id: Annotated[str, StringConstraints(pattern=r"^[A-Z]\.\d{2}$")]
    zh: Text
    en: Text
    scope: Text
    behaviour: Behaviour
    topic: Phrase
    reason: Phrase
    alternative: Phrase

    @property
    def area(self) -> str:
        """Id of the area: the letter."""
        return self.id[0]


class Area(_Entry):
    """Values that belong together. In an overlay, `zh` and `en` may be left out of an area that is there."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Z]$")]
    zh: Text | None = None
    en: Text | None = None
    values: tuple[Value, ...] = Field(min_length=1)


class _File(_Entry):
    version: Literal[1]
    attacks: tuple[AttackType, ...] = ()
    areas: tuple[Area, ...] = Field(min_length=1)


@dataclass(frozen=True)
class SafetyTaxonomy:
    """Types of attack and areas of values, in the order of their files."""

    version: int
    attacks: tuple[AttackType, ...]
    areas: tuple[Area, ...]

    @cached_property
    def values(self) -> dict[str, Value]:
        """All values by id."""
        return {value.id: value for area in self.areas for value in area.values}

    @cached_property
    def attack_ids(self) -> tuple[str, ...]:
        """Ids of the types of attack."""
        return tuple(attack.id for attack in self.attacks)

    def value(self, identity: str, where: str = "safety taxonomy") -> Value:
        """The value of an id.

        Raises:
            UserError: there is none; names the nearest and `where` it was asked for.
        """
        if identity not in self.values:
            raise _unknown(identity, "safety value", self.values, where)
        return self.values[identity]

    def area(self, identity: str) -> Area:
        """The area of an id, or of the id of one of its values."""
        for area in self.areas:
            if area.id == identity[:1]:
                return area
        raise _unknown(identity, "area", [area.id for area in self.areas], "safety taxonomy")

    def attack(self, identity: str, where: str = "safety taxonomy") -> AttackType:
        """The type of attack of an id.

        Raises:
            UserError: there is none.
        """
        for attack in self.attacks:
            if attack.id == identity:
                return attack
        raise _unknown(identity, "attack type", self.attack_ids, where)


def load_safety_taxonomy(*overlays: Path | str) -> SafetyTaxonomy:
    """The shipped taxonomy, extended by overlay files in order.

    An overlay has the layout of the shipped file without `attacks`. It adds values to areas that are there
    (named by id), and new areas; it cannot change what an id means.

    Raises:
        UserError: a file is missing, no valid YAML or not of this layout; an id or name is taken.
    """
    taxonomy = _assemble(SafetyTaxonomy(FORMAT_VERSION, (), ()), _read(TAXONOMY_FILE), base=True)
    for overlay in overlays:
        taxonomy = _assemble(taxonomy, _read(Path(overlay)), base=False)
    return taxonomy


@dataclass(frozen=True)
class _Source:
    name: str
    content: _File
    document: Document

    def at(self, *key: str | int) -> str:
        """FILE:LINE of a key."""
        return f"{self.name}:{self.document.lines.get(key, 1)}"


def _read(path: Path) -> _Source:
    name = path.name if path == TAXONOMY_FILE else str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{name}: cannot be read: {reason}", hint="name a YAML file") from error
    document = parse_yaml(text, name)
    if document.duplicates:
        key, first, line = document.duplicates[0]
        raise UserError(f"{name}:{line}: the key '{key[-1]}' stands at line {first} already")
    try:
        return _Source(name, _File.model_validate(document.data), document)
    except ValidationError as error:
        problem = error.errors()[0]
        key = tuple(problem["loc"])
        line = next((document.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in document.lines), 1)
        raise UserError(
            f"{name}:{line}: {_dotted(key) or 'the file'}: {problem['msg']}, found {problem['input']!r:.60}",
            hint="an overlay has `version: 1` and `areas:` with `id`, `zh`, `en` and `values:`; see "
            "rlhf/safety/data/taxonomy.yaml for a value's keys",
        ) from error


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _assemble(below: SafetyTaxonomy, source: _Source, *, base: bool) -> SafetyTaxonomy:
    """`below` with the areas and values of one file added."""
    if source.content.attacks and not base:
        raise UserError(
            f"{source.at('attacks')}: an overlay cannot add types of attack",
            hint="templates belong to them; give prompts of your own with --file",
        )
    attacks = below.attacks + source.content.attacks
    areas = {area.id: area for area in below.areas}
    ids, names = set(below.values), {name for value in below.values.values() for name in (value.zh, value.en)}
    for number, area in enumerate(source.content.areas):
        for index, value in enumerate(area.values):
            _check_value(value, area, ids, names, source.at("areas", number, "values", index))
            ids.add(value.id)
            names.update((value.zh, value.en))
        areas[area.id] = _merged(areas.get(area.id), area, source.at("areas", number))
    return SafetyTaxonomy(source.content.version, attacks, tuple(areas.values()))


def _check_value(value: Value, area: Area, ids: Iterable[str], names: Iterable[str], where: str) -> None:
    if value.area != area.id:
        raise UserError(f"{where}: value {value.id} stands in area {area.id}", hint=f"call it {area.id}.NN")
    if value.id in ids:
        raise UserError(f"{where}: the id {value.id} is taken", hint="take a number that is free")
    taken = [name for name in (value.zh, value.en) if name in names]
    if taken:
        raise UserError(f"{where}: the name {taken[0]!r} of {value.id} is taken", hint="give it its own name")


def _merged(known: Area | None, added: Area, where: str) -> Area:
    if known is None:
        if added.zh is None or added.en is None:
            raise UserError(f"{where}: area {added.id} is new and has no zh or en", hint="give it both names")
        return added
    for key in ("zh", "en"):
        if getattr(added, key) not in (None, getattr(known, key)):
            raise UserError(
                f"{where}: area {added.id} is {getattr(known, key)!r}, found {getattr(added, key)!r}",
                hint="leave its names out to add values to it, or take a letter that is free",
            )
    return known.model_copy(update={"values": known.values + added.values})


def _unknown(identity: str, kind: str, known: Iterable[str], where: str) -> UserError:
    ids = list(known)
    near = difflib.get_close_matches(str(identity), ids, n=1)
    listed = f"did you mean {near[0]}?" if near else f"known: {', '.join(_shortened(ids))}"
    return UserError(f"{where}: no {kind} {identity!r}", hint=listed)


def _shortened(ids: list[str]) -> Iterator[str]:
    yield from ids[:12]
    if len(ids) > 12:
        yield "…"
