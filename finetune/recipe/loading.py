"""From a YAML file and command-line overrides to a checked recipe.

The order in which settings win, last first: the command line, `for_base` blocks whose pattern
matches the base, the file, the schema's defaults. Whatever is wrong is told in one message that
names the file and line (or the command line) and the key of each problem.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from finetune.errors import UserError
from finetune.recipe.keys import choices_of, dotted, known_keys, required_keys
from finetune.recipe.layers import Settings, all_keys, get_value, remove_value
from finetune.recipe.merge import MergeRecipe
from finetune.recipe.messages import FILE_KEYS, describe, show, unknown_key
from finetune.recipe.schema import Recipe, Step
from finetune.recipe.yaml_text import Document, Key, parse_yaml
from finetune.stage_table import STAGES

_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class _Problem:
    where: str
    key: str
    text: str

    @property
    def order(self) -> tuple[bool, int]:
        """The file's problems by line, then those of the command line."""
        line = self.where.rpartition(":")[2]
        return self.where == _COMMAND_LINE, int(line) if line.isdigit() else 0

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.text}" if self.key else f"{self.where}: {self.text}"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check one recipe.

    Args:
        path: YAML file.
        overrides: `key=value` texts with dotted keys, values in YAML: `train.learning_rate=1e-4`.

    Raises:
        UserError: the file is missing, is not YAML, holds a pipeline, or anything in it or in the
            overrides is not right. The message lists every problem.
    """
    document = _read(path)
    if isinstance(document.data, dict) and "pipeline" in document.data:
        raise UserError(
            f"{_line(path, document, ('pipeline',))}: a pipeline of recipes, expected a single recipe",
            hint="name one of the recipes that it lists",
        )
    return cast(Recipe, _build(path, document, overrides))


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> list[Step]:
    """Read and check a recipe, or all recipes of a file with `pipeline: [first.yaml, second.yaml]`.

    Entries count from the pipeline's own folder, or else from the current one. An override holds for
    every recipe whose stage has its key, except that `model.base=…` leaves alone a recipe whose base is
    the output of an earlier one: it changes where the chain begins. `for_base` patterns see that
    beginning too.

    Raises:
        UserError: as in `load_recipe`; nothing is returned unless all recipes are right.
    """
    document = _read(path)
    if not isinstance(document.data, dict) or "pipeline" not in document.data:
        return [_build(path, document, overrides)]
    steps = [(entry, _read(entry)) for entry in _pipeline_entries(path, document, overrides)]
    for entry, step in steps:
        if isinstance(step.data, dict) and "pipeline" in step.data:
            raise UserError(f"{_line(entry, step, ('pipeline',))}: a pipeline cannot hold another pipeline")
    kinds = [_recipe_class(step.data, overrides) for _, step in steps]
    keys = [known_keys(kind).keys() - kind.unread for kind in kinds]
    unknown = [text for text in overrides if not any(_override_name(text) in known for known in keys)]
    problems: list[_Problem] = []
    _parse_overrides(unknown, problems, *kinds)
    if problems:
        raise _refusal(path, problems)
    recipes: list[Step] = []
    beginnings: dict[str, str] = {}  # output folder of a recipe → base that its chain began with
    for (entry, step), known in zip(steps, keys):
        beginning = _chained_to(step.data, beginnings)
        own = [text for text in overrides if _override_name(text) in known or text in unknown]
        own = [text for text in own if not (beginning and _override_name(text) == "model.base")]
        recipe = _build(entry, step, own, beginning=beginning)
        folder = os.path.normpath(recipe.output_dir)
        if folder in beginnings:
            raise UserError(
                f"{path}: two recipes of this pipeline write into {recipe.output_dir}",
                hint="give each its own name or output_dir",
            )
        if base := beginning or _beginning(recipe, beginnings):
            beginnings[folder] = base
        recipes.append(recipe)
    return recipes


def _beginning(step: Step, beginnings: dict[str, str]) -> str | None:
    """The base that a step begins with: its own, or that of the adapter that it merges."""
    if isinstance(step, Recipe):
        return step.model.base
    if isinstance(step, MergeRecipe):
        return step.merge.base or _made_in(step.merge.adapter, beginnings)
    return None


def _made_in(path: str, beginnings: dict[str, str]) -> str | None:
    """The base at the beginning of the chain whose step made what lies at a path."""
    folder = Path(os.path.normpath(path))
    return next((start for output, start in beginnings.items() if folder.is_relative_to(output)), None)


def _read(path: str | Path) -> Document:
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such recipe file", hint=_nearby(file)) from error
    except IsADirectoryError as error:
        inside = file / "recipe.yaml"
        hint = f"run its recipe: {inside}" if inside.exists() else "name a recipe file inside it"
        raise UserError(f"{path}: a folder, expected a recipe file", hint=hint) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, expected a YAML recipe (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_yaml(text, str(path))


def _nearby(file: Path) -> str:
    """Recipes that may have been meant: like-named ones beside it or in recipes/."""
    folders = dict.fromkeys((file.parent, Path("recipes")))
    choices = [candidate for folder in folders for candidate in sorted(folder.glob("*.yaml"))]
    names = difflib.get_close_matches(file.stem, [choice.stem for choice in choices], n=1)
    near = next((choice for choice in choices if names and choice.stem == names[0]), None)
    return f"did you mean {near}?" if near else "the recipes that come with the toolkit are in recipes/"


def _line(path: str | Path, document: Document, key: Key) -> str:
    return f"{path}:{document.lines[key]}" if key in document.lines else str(path)


def _pipeline_entries(path: str | Path, document: Document, overrides: Sequence[str]) -> list[Path]:
    """The recipe files of a pipeline."""
    where = _line(path, document, ("pipeline",))
    entries = document.data["pipeline"]
    if others := [str(key) for key in document.data if key != "pipeline"]:
        raise UserError(
            f"{path}: a pipeline holds recipes and no settings, found {', '.join(others)}",
            hint="put the settings into the recipes, or on the command line for all of them",
        )
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{where}: pipeline: expected a list of recipe files, found {show(entries)}")
    for name in ("name", "output_dir"):
        if any(_override_name(text) == name for text in overrides):
            raise UserError(f"{_COMMAND_LINE}: {name}: cannot be one for all recipes of the pipeline {path}")
    beside = [Path(path).parent / entry for entry in entries]
    return [
        near if near.exists() or not Path(entry).exists() else Path(entry)
        for near, entry in zip(beside, entries)
    ]


def _chained_to(data: Any, beginnings: dict[str, str]) -> str | None:
    """The base at the beginning of the chain, where a recipe starts from the output of an earlier one."""
    model = data.get("model") if isinstance(data, dict) else None
    base = model.get("base") if isinstance(model, dict) else None
    return _made_in(base, beginnings) if isinstance(base, str) else None


def _build(
    path: str | Path, document: Document, overrides: Sequence[str], beginning: str | None = None
) -> Step:
    """Lay file, for_base blocks and overrides over each other, and check the result."""
    problems = [
        _Problem(f"{path}:{line}", dotted(key), f"given twice, first in line {first}")
        for key, first, line in document.duplicates
    ]
    if document.data is None:
        raise UserError(f"{path}: empty, expected a recipe", hint="start from one in recipes/")
    if not isinstance(document.data, dict):
        raise UserError(f"{path}: expected keys and values (stage: sft), found {show(document.data)}")
    if odd := [key for key in document.data if not isinstance(key, str)]:
        raise UserError(f"{path}: expected keys that are text, found {show(odd[0])}")

    layer = {name: value for name, value in document.data.items() if name != "for_base"}
    kind = _recipe_class(layer, overrides)
    settings = Settings({"name": Path(path).stem}, str(path), choices_of(kind))
    _empty_sections(layer, kind)
    settings.apply(layer, lambda key: _line(path, document, key))
    commands = _parse_overrides(overrides, problems, kind)
    base = next((value for key, value in reversed(commands) if key == ("model", "base")), None)
    base = base or get_value(settings.values, ("model", "base"))
    names = [str(name).lower() for name in (base, beginning) if name]
    problems += _apply_for_base(path, document, settings, names, kind)
    overlay = _nested(commands)
    _empty_sections(overlay, kind)
    settings.apply(overlay, lambda _: _COMMAND_LINE)

    recipe, found = _check(settings, kind)
    problems += found
    if recipe is None or problems:
        raise _refusal(path, problems)
    recipe._file = Path(path)
    return recipe


def _recipe_class(layer: Any, overrides: Sequence[str]) -> type[Step]:
    """The class of the stage's recipes; the plain one where the stage is missing or unknown."""
    commands = (text.partition("=")[2].strip() for text in overrides if _override_name(text) == "stage")
    stage = [layer.get("stage") if isinstance(layer, dict) else None, *commands][-1]
    return STAGES[stage].load("recipe") if isinstance(stage, str) and stage in STAGES else Recipe


def _empty_sections(values: dict[str, Any], kind: type[Step]) -> None:
    """`adapter:` with nothing (or only comments) below it is an empty section."""
    for name, is_section in known_keys(kind).items():
        if is_section and name in values and values[name] is None:
            values[name] = {}


def _override_name(text: str) -> str:
    return text.partition("=")[0].strip()


def _parse_overrides(
    overrides: Iterable[str], problems: list[_Problem], *kinds: type[Step]
) -> list[tuple[Key, Any]]:
    """`a.b=value` texts as keys and values, in the order given; keys are known to one of the kinds of recipe."""
    parsed: list[tuple[Key, Any]] = []
    for text in overrides:
        name, (_, equals, value) = _override_name(text), text.partition("=")
        key: Key = tuple(name.split("."))
        if not equals or not name:
            problems.append(_Problem(_COMMAND_LINE, "", f"expected key=value, found {text!r}"))
        elif name in FILE_KEYS:
            problems.append(_Problem(_COMMAND_LINE, name, "can only stand in a file"))
        elif dotted(key) not in known_keys(*kinds):
            problems.append(_Problem(_COMMAND_LINE, dotted(key), unknown_key(key, *kinds)))
        else:
            try:
                parsed.append((key, parse_yaml(value, f"{_COMMAND_LINE}: {dotted(key)}").data))
            except UserError:
                text = f"{value!r} is not a YAML value; close brackets, and put text with signs in quotes"
                problems.append(_Problem(_COMMAND_LINE, dotted(key), text))
    return parsed


def _nested(commands: Iterable[tuple[Key, Any]]) -> dict[str, Any]:
    """Keys and values as the sections that they belong to; the later of two wins."""
    layer: dict[str | int, Any] = {}
    for (*sections, last), value in commands:
        target = layer
        for name in sections:
            if not isinstance(target.get(name), dict):
                target[name] = {}
            target = target[name]
        both = isinstance(value, dict) and isinstance(target.get(last), dict)
        target[last] = {**target[last], **value} if both else value
    return cast(dict[str, Any], layer)


def _apply_for_base(
    path: str | Path, document: Document, settings: Settings, bases: list[str], kind: type[Step]
) -> list[_Problem]:
    """Apply the blocks whose pattern matches a base (upper and lower case alike), check the others."""
    blocks = document.data.get("for_base") or {}
    where = _line(path, document, ("for_base",))
    if not isinstance(blocks, dict):
        return [
            _Problem(where, "for_base", f"expected patterns with settings below each, found {show(blocks)}")
        ]
    problems: list[_Problem] = []
    unmatched: list[tuple[Key, dict[str, Any]]] = []
    for pattern, block in blocks.items():
        at: Key = ("for_base", str(pattern))
        if not isinstance(block, dict) or not all(isinstance(name, str) for name in block):
            problems.append(
                _Problem(_line(path, document, at), dotted(at), f"expected settings, found {show(block)}")
            )
        elif get_value(block, ("model", "base")) is not None:
            text = "cannot change the base that it is chosen by"
            problems.append(
                _Problem(_line(path, document, (*at, "model", "base")), f"{dotted(at)}.model.base", text)
            )
        elif any(fnmatchcase(base, str(pattern).lower()) for base in bases):
            settings.apply(block, _block_origin(path, document, at))
        else:
            unmatched.append((at, block))
    for at, block in unmatched:
        problems += _check_unused(path, document, settings, at, block, kind)
    return problems


def _block_origin(path: str | Path, document: Document, at: Key) -> Callable[[Key], str]:
    return lambda key: _line(path, document, (*at, *key))


def _check_unused(
    path: str | Path,
    document: Document,
    settings: Settings,
    at: Key,
    block: dict[str, Any],
    kind: type[Step],
) -> list[_Problem]:
    """Misspelt keys and wrong values in a block for another base: found today, not on the big machine."""
    trial = Settings(copy.deepcopy(settings.values), settings.default_origin, settings.choices)
    trial.apply(block, _block_origin(path, document, at))
    own = set(all_keys(block, ()))
    problems = []
    try:
        kind.model_validate(trial.values)
    except ValidationError as error:
        for details in error.errors():
            key = _location(details["loc"])
            if key in own and details["type"] != "combination":
                text = describe(details, key, kind)
                problems.append(_Problem(trial.origin(key), dotted((*at, *key)), text))
    return problems


def _check(settings: Settings, kind: type[Step]) -> tuple[Step | None, list[_Problem]]:
    """Validate; where keys are wrong, check how the others go together all the same."""
    try:
        return kind.model_validate(settings.values), []
    except ValidationError as error:
        problems = []
        rest = copy.deepcopy(settings.values)
        for details in error.errors():
            key = _location(details["loc"])
            if details["type"] == "combination":
                return None, _combination_problems(settings, details["ctx"]["problems"])
            text = describe(details, key, kind)
            problems.append(_Problem(settings.origin(key), dotted(key), text))
            # What goes with a choice that is none cannot be told: its whole section waits.
            remove_value(rest, key[:-1] if key in settings.choices else key)
    # What is required gets a stand-in, so that only combinations can still be wrong.
    for section, name in required_keys(kind):
        rest.setdefault(section, {}).setdefault(name, "-")
    try:
        kind.model_validate({"stage": "sft", "name": "-", **rest})
    except ValidationError as error:
        for details in error.errors():
            if details["type"] == "combination":
                problems += _combination_problems(settings, details["ctx"]["problems"])
    return None, problems


def _combination_problems(settings: Settings, found: Iterable[tuple[str, str]]) -> list[_Problem]:
    return [_Problem(settings.origin(tuple(key.split("."))), key, text) for key, text in found]


def _refusal(path: str | Path, problems: list[_Problem]) -> UserError:
    if len(problems) == 1:
        return UserError(str(problems[0]))
    in_order = sorted(problems, key=lambda problem: problem.order)
    lines = "".join(f"\n  {problem}" for problem in in_order)
    return UserError(f"{path}: {len(problems)} problems{lines}")


def _location(loc: Sequence[str | int]) -> Key:
    """A pydantic location without the tags of unions."""
    return tuple(part for part in loc if not (isinstance(part, str) and part.startswith("<")))
