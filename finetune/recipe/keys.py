"""The keys of a recipe, as the schema of its stage has them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic.fields import FieldInfo

from finetune.recipe.schema import Recipe, Step
from finetune.recipe.section import Choice, Section
from finetune.recipe.yaml_text import Key
from finetune.stage_table import STAGES


@cache
def known_keys(*recipes: type[Step]) -> dict[str, bool]:
    """Every dotted key of a recipe, or of several, in schema order; the value says whether it is a section."""
    return {
        dotted(key): _is_section(field.annotation)
        for recipe in recipes or (Recipe,)
        for key, field in _settings(recipe, ())
    }


def required_keys(recipe: type[Step] = Recipe) -> list[tuple[str, str]]:
    """(section, key) of every key in a section that has no default."""
    return [
        (str(key[0]), str(key[1]))
        for key, field in _settings(recipe, ())
        if len(key) == 2 and field.is_required()
    ]


def choices_of(recipe: type[Step]) -> dict[Key, Choice]:
    """The keys whose value decides which others of their section are read."""
    return {
        (*key, name): choice
        for key, field in _settings(recipe, ())
        if (section := _section_in(field.annotation))
        for name, choice in section.choices.items()
    }


def stages_with(name: str) -> list[str]:
    """The stages whose recipes have a dotted key, and use it."""
    kinds: dict[str, type[Step]] = {stage: STAGES[stage].load("recipe") for stage in STAGES}
    return [stage for stage, kind in kinds.items() if name in known_keys(kind).keys() - kind.unread]


def field_at(key: Key, recipe: type[Step]) -> FieldInfo | None:
    """What the schema says of a key; of one in an entry of a list (data.train[0].weight) too."""
    section: type[Section] | None = recipe
    field = None
    for name in (part for part in key if isinstance(part, str)):
        field = section.model_fields.get(name) if section else None
        section = _section_in(field.annotation) if field else None
    return field


def section_at(key: Key, recipe: type[Step]) -> type[Section] | None:
    """The section that a key holds, by itself or in the entries of a list; None if it holds none."""
    field = field_at(key, recipe)
    return _section_in(field.annotation) if field else None


def dotted(key: Key) -> str:
    """("data", "train", 0, "weight") → data.train[0].weight"""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _settings(section: type[Section], at: Key) -> Iterator[tuple[Key, FieldInfo]]:
    """Every key below a section, in order; entries of lists have none of their own."""
    for name, field in section.model_fields.items():
        yield (*at, name), field
        inner = _section_in(field.annotation)
        if inner is not None and inner in (field.annotation, *get_args(field.annotation)):
            yield from _settings(inner, (*at, name))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a type is or is made of."""
    if _is_section(annotation):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
