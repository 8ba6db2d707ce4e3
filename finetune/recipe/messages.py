"""What is said about a recipe that is not right: the expectation, the find, the nearest known key."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from finetune.recipe.schema import Recipe, Source, Step
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


@cache
def known_keys(recipe: type[Step] = Recipe) -> dict[str, bool]:
    """Every dotted key of a recipe, in schema order; the value says whether it is a section."""
    keys: dict[str, bool] = {}
    for name, field in recipe.model_fields.items():
        section = field.annotation
        is_section = isinstance(section, type) and issubclass(section, BaseModel)
        keys[name] = is_section
        if isinstance(section, type) and issubclass(section, BaseModel):
            for leaf, setting in section.model_fields.items():
                keys[f"{name}.{leaf}"] = False
                inner = _optional_section(setting.annotation)
                keys |= {f"{name}.{leaf}.{key}": False for key in inner.model_fields} if inner else {}
    return keys


def _optional_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting may hold, such as data.sampling; None if it holds none."""
    kinds = [kind for kind in get_args(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return kinds[0] if kinds and type(None) in get_args(annotation) else None


def required_keys(recipe: type[Step] = Recipe) -> list[tuple[str, str]]:
    """(section, key) of every key in a section that has no default."""
    return [
        (name, leaf)
        for name, field in recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for leaf, setting in field.annotation.model_fields.items()
        if setting.is_required()
    ]


def dotted(key: Key) -> str:
    """("data", "train", 0, "weight") → data.train[0].weight"""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def missing_key(key: Key, recipe: type[Step] = Recipe) -> str:
    """Say that a key is required, and what it is for; of a section, which keys are."""
    if any(isinstance(part, int) for part in key):  # an entry of data.train
        return f"required, and not given: {Source.model_fields[str(key[-1])].description}"
    field = recipe.model_fields[str(key[0])]
    section = field.annotation
    if len(key) > 2:
        inner = _optional_section(section.model_fields[str(key[1])].annotation)  # type: ignore[union-attr]
        field = inner.model_fields[str(key[2])] if inner else field
        return f"required, and not given: {field.description}"
    if isinstance(section, type) and issubclass(section, BaseModel):
        if len(key) == 1:
            needed = [f"{key[0]}.{name}" for name, leaf in section.model_fields.items() if leaf.is_required()]
            return f"required, and not given: it holds {', '.join(needed)}"
        field = section.model_fields.get(str(key[1]), field)
    return "required, and not given" + (f": {field.description}" if field.description else "")


def unknown_key(key: Key, recipe: type[Step] = Recipe) -> str:
    """Say that a key is not known, and which one was probably meant."""
    near = suggest(key, recipe)
    return "unknown key" + (f"; did you mean {' or '.join(near)}?" if near else "")


def suggest(key: Key, recipe: type[Step] = Recipe) -> list[str]:
    """The known keys nearest to an unknown one, best first: at most two, or none.

    A key in the wrong section is found, and so is a misspelt key of any section.
    """
    leaf = str(key[-1])
    if any(isinstance(part, int) for part in key):  # inside an entry of data.train
        return difflib.get_close_matches(leaf, list(Source.model_fields), n=1)
    known = known_keys(recipe)
    by_leaf: dict[str, list[str]] = {}
    for name in (*known, *(FILE_KEYS if len(key) == 1 else ())):
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    if leaf in by_leaf and (len(key) > 1 or not known.get(leaf, False)):
        return by_leaf[leaf][:2]
    if leaf.lower() in _OTHER_NAMES:
        return [_OTHER_NAMES[leaf.lower()]]
    section = ".".join(map(str, key[:-1]))
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    for names in (siblings if section in known or not section else [], list(by_leaf)):
        if near := difflib.get_close_matches(leaf.lower(), names, n=1):
            same_section = [f"{section}.{near[0]}" if section else near[0]]
            return [name for name in same_section if name in known] or by_leaf[near[0]][:2]
    return []


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
