"""Settings in layers: the file, blocks for particular bases, the command line, and who set what."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.recipe.section import Choice
from finetune.recipe.yaml_text import Key


@dataclass
class Settings:
    """Recipe keys that are not checked yet, and where each came from."""

    values: dict[str, Any]
    default_origin: str
    choices: Mapping[Key, Choice] = field(default_factory=dict)  # by the key that others depend on
    origins: dict[Key, str] = field(default_factory=dict)

    def origin(self, key: Key) -> str:
        """Where a key was set; for one that was not, the section that lacks it or the file."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.origins:
                return self.origins[key[:length]]
        return self.default_origin

    def apply(self, layer: dict[str, Any], origin: Callable[[Key], str]) -> None:
        """Lay settings over these: sections are merged, anything else is replaced."""
        changed = self._merge(self.values, layer, (), origin)
        for key, choice in self.choices.items():
            if key in changed:
                self._drop_unread(key, choice, changed)

    def _merge(
        self, target: dict[str, Any], layer: dict[str, Any], at: Key, origin: Callable[[Key], str]
    ) -> set[Key]:
        changed: set[Key] = set()
        for name, value in layer.items():
            key = (*at, name)
            if isinstance(value, dict) and isinstance(target.get(name), dict):
                changed |= self._merge(target[name], value, key, origin)
                continue
            target[name] = copy.deepcopy(value)
            self._forget(key)
            for inner in all_keys(value, key):
                self.origins[inner] = origin(inner)
                changed.add(inner)
        return changed

    def _drop_unread(self, key: Key, choice: Choice, changed: set[Key]) -> None:
        """What is chosen anew takes the place of the old choice with all settings that were that one's own."""
        section, chosen = get_value(self.values, key[:-1]), get_value(self.values, key)
        if not isinstance(chosen, str) or chosen not in choice:
            return
        unread = {name for names in choice.values() for name in names} - set(choice[chosen])
        for name in unread & set(section):
            own = (*key[:-1], name)
            if own not in changed:
                del section[name]
                self._forget(own)

    def _forget(self, key: Key) -> None:
        self.origins = {known: where for known, where in self.origins.items() if known[: len(key)] != key}


def all_keys(value: Any, at: Key) -> Iterable[Key]:
    """A value's key and the keys of everything in it."""
    if at:
        yield at
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for name, child in children:
        yield from all_keys(child, (*at, name))


def get_value(values: Any, key: Key) -> Any:
    """The value at a key, None where there is none."""
    for part in key:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def remove_value(values: Any, key: Key) -> None:
    """Take out the value at a key; an entry of a list stays, as an unremarkable path."""
    for part in key[:-1]:
        if not isinstance(values, list) and not (isinstance(values, dict) and part in values):
            return
        values = values[part]  # type: ignore[index]  # a list is reached by a whole number
    if isinstance(values, dict):
        values.pop(key[-1], None)
    elif isinstance(values, list):
        values[key[-1]] = "-"  # type: ignore[index]  # a list is reached by a whole number
