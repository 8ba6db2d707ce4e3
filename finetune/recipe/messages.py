"""What is said about a recipe that is not right: the expectation, the find, the nearest known key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

from finetune.recipe.keys import dotted, field_at, known_keys, required_keys, section_at, stages_with
from finetune.recipe.schema import Recipe, Step
from finetune.recipe.yaml_text import Key

FILE_KEYS = ("for_base", "pipeline")
"""Top-level keys that a file may hold beside the recipe's own; the effective recipe has none of them."""

# What other toolkits call things. difflib cannot get from `lr` to `learning_rate`.
_OTHER_NAMES = {
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "target_modules": "adapter.targets",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora",
    "init_lora_weights": "adapter.init",
    "model_name_or_path": "model.base",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "attn_implementation": "model.attention",
    "dataset": "data.train",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "val_size": "data.validation_share",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
}

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a section (keys indented below it)",
    "dict_type": "a section (keys indented below it)",
}
_COMPARISONS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def missing_key(key: Key, recipe: type[Step] = Recipe) -> str:
    """Say that a key is required, and what it is for; of a section, which keys are."""
    field = field_at(key, recipe)
    if field is None or field.description is None:
        needed = [dotted(required) for required in required_keys(recipe) if required[0] == key[0]]
        return "required, and not given" + (f": it holds {', '.join(needed)}" if needed else "")
    return f"required, and not given: {field.description}"


def unknown_key(key: Key, *recipes: type[Step]) -> str:
    """Say that a key is not known to the recipes of a stage, or of several, and which one was probably meant."""
    if all(isinstance(part, str) for part in key):
        if whole := _one_value(key, recipes):
            return f"unknown key; {whole}"
        if stages := stages_with(dotted(key)):
            word = "stage" if len(stages) == 1 else "stages"
            return f"unknown key here; it belongs to {word} {', '.join(stages)}"
    near = suggest(key, *recipes)
    return "unknown key" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _one_value(key: Key, recipes: Sequence[type[Step]]) -> str | None:
    """Say that what was taken for a section is a key that is set as a whole, if so."""
    known = known_keys(*recipes)
    for length in range(len(key) - 1, 0, -1):
        name = dotted(key[:length])
        if name in known and not any(other.startswith(f"{name}.") for other in known):
            fields = [field_at(key[:length], recipe) for recipe in recipes or (Recipe,)]
            return f"{name} is set as a whole: {next(field.description for field in fields if field)}"
    return None


def suggest(key: Key, *recipes: type[Step]) -> list[str]:
    """The known keys nearest to an unknown one, dotted, best first: at most three, or none.

    A key in the wrong section is found, and so is a misspelt key of any section. Of keys with the same last part
    those are named whose sections were typed, too.
    """
    leaf = str(key[-1])
    if any(isinstance(part, int) for part in key):  # inside an entry of a list, such as data.train
        sections = [section_at(key[:-1], recipe) for recipe in recipes or (Recipe,)]
        names = [name for section in sections if section for name in section.model_fields]
        return difflib.get_close_matches(leaf, names, n=1)
    known = known_keys(*recipes)
    by_leaf: dict[str, list[str]] = {}
    for name in (*known, *(FILE_KEYS if len(key) == 1 else ())):
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    if leaf in by_leaf and (len(key) > 1 or not known.get(leaf, False)):
        return _likest(key, by_leaf[leaf])
    if (other := _OTHER_NAMES.get(leaf.lower())) in known:
        return [str(other)]
    section = dotted(key[:-1])
    places = [section] if section in ("", *known) else by_leaf.get(section.rpartition(".")[2], [])
    for place in places:
        siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == place}
        if near := difflib.get_close_matches(leaf.lower(), siblings, n=1):
            return [siblings[near[0]]]
    if section not in known and (values := [place for place in places if not known.get(place, True)]):
        return _likest(key, values)  # what was taken for a section is a key elsewhere
    near = difflib.get_close_matches(leaf.lower(), by_leaf, n=1)
    return _likest(key, by_leaf[near[0]]) if near else []


def _likest(key: Key, names: Sequence[str]) -> list[str]:
    """Of keys with the same last part those whose sections are most like what was typed; three at most."""
    typed = re.split(r"[._-]", dotted(key))

    def likeness(name: str) -> int:
        return sum(bool(difflib.get_close_matches(own, typed, cutoff=0.7)) for own in name.split(".")[:-1])

    best = max(map(likeness, names))
    return [name for name in names if likeness(name) == best][:3]


def describe(error: ErrorDetails, key: Key, recipe: type[Step] = Recipe) -> str:
    """One pydantic error about a key in the words of this toolkit: what was expected, what was found."""
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(key, recipe)
    if kind == "missing":
        return missing_key(key, recipe)
    if kind in _EXPECTED:
        remedy = ""
        if kind == "string_type" and isinstance(found, (bool, int, float, dict)):
            remedy = "; put it in quotes if it is meant as text"
        return f"expected {_EXPECTED[kind]}, found {show(found)}{remedy}"
    if kind in _COMPARISONS:
        name, words = _COMPARISONS[kind]
        return f"expected {words} {context[name]:g}, found {show(found)}"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(found), choices, n=1)
        return f"expected one of {', '.join(choices)}, found {show(found)}" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    if kind in ("too_short", "too_long"):
        least, most = context.get("min_length"), context.get("max_length")
        return f"expected {least or most} entries, found {show(found)}"
    if kind == "string_too_short":
        return "expected text, found none"
    if kind == "string_pattern_mismatch":
        return f"expected a name without / and \\, found {show(found)}"
    if kind in ("source", "sources"):
        return f"{error['msg']}, found {show(found)}"
    if kind == "value_error":
        return str(context["error"])
    return f"{error['msg']}, found {show(found)}"


def show(value: Any) -> str:
    """A value as the user wrote it, with its type where that may be the surprise."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a truth value)"
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value)
    return (text if len(text) <= 60 else text[:57] + "...") + (" (text)" if isinstance(value, str) else "")
