"""YAML as recipes use it: floats such as `1e-4`, line numbers, no silent duplicates.

PyYAML follows YAML 1.1, where `1e-4` is text (a float needs a dot) and `2023-09-06` a date; both
surprise people who write learning rates and revisions. Loader and dumper share one set of rules,
so what `dump_yaml` writes, `parse_yaml` (and plain PyYAML) reads back as it was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from finetune.errors import UserError

Key = tuple[str | int, ...]
"""Where a value stands: ("train", "learning_rate") or ("data", "train", 0, "weight")."""

_FLOAT_TAG = "tag:yaml.org,2002:float"
_TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"
_MERGE_TAG = "tag:yaml.org,2002:merge"
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
         |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
         |[-+]?\.(?:inf|Inf|INF)
         |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """Safe: builds plain data only, never Python objects."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own class attribute)
        first: [(tag, pattern) for tag, pattern in rules if tag not in (_FLOAT_TAG, _TIMESTAMP_TAG)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would otherwise take for a number."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # indent list items under their key


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    """Lists of plain values on one line: `betas: [0.9, 0.98]`."""
    short = not any(isinstance(item, (dict, list)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=short)


_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))
_Dumper.add_representer(list, _represent_list)


@dataclass(frozen=True)
class Document:
    """Parsed YAML with the line (from 1) of every key and list item, and of every repeated key."""

    data: Any
    lines: dict[Key, int]
    duplicates: list[tuple[Key, int, int]]
    """(key, line of the first, line of the repetition)"""


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document.

    Args:
        text: the YAML.
        name: what to call it in messages, for example the file's path.

    Raises:
        UserError: not valid YAML, several documents, or a value that contains itself.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None, {}, [])
        lines: dict[Key, int] = {}
        duplicates: list[tuple[Key, int, int]] = []
        _walk(node, (), lines, duplicates, set(), [], name)
        return Document(loader.construct_document(node), lines, duplicates)
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, name) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line}: not valid YAML: the character {error.character!r}") from error
    except ValueError as error:  # 0x, _ and other spellings that resolve to a number and are none
        raise UserError(f"{name}: not valid YAML: {error}", hint="put the value in quotes") from error
    except RecursionError as error:
        raise UserError(f"{name}: not valid YAML: nested too deeply") from error


def dump_yaml(data: dict[str, Any]) -> str:
    """Render plain data in the order of its keys."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100
    )


def _walk(
    node: yaml.Node,
    key: Key,
    lines: dict[Key, int],
    duplicates: list[tuple[Key, int, int]],
    seen: set[int],
    ancestors: list[yaml.Node],
    name: str,
) -> None:
    """Record where every key stands. An anchor's content is recorded where it first appears."""
    if any(node is ancestor for ancestor in ancestors):
        raise UserError(
            f"{name}:{node.start_mark.line + 1}: a value that contains itself (an alias to its own anchor)"
        )
    if id(node) in seen:
        return
    seen.add(id(node))
    ancestors.append(node)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE_TAG:
                child = (*key, key_node.value)
                if key_node.value in first:
                    duplicates.append((child, first[key_node.value], line))
                first.setdefault(key_node.value, line)
                lines[child] = line
                _walk(value_node, child, lines, duplicates, seen, ancestors, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            _walk(item, (*key, index), lines, duplicates, seen, ancestors, name)
    ancestors.pop()


def _not_yaml(error: yaml.MarkedYAMLError, name: str) -> UserError:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}" if mark else name
    reason = "; ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in reason:
        hint = "indent with spaces, not with tabs"
    elif "mapping values are not allowed" in reason:
        hint = "check the indentation, and put text that contains ': ' in quotes"
    else:
        hint = "check indentation, brackets and quotes at this line and the one before"
    return UserError(f"{where}: not valid YAML: {reason}", hint=hint)
