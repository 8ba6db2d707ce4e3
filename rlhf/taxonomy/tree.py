"""The taxonomy of prompts: read from YAML, checked, extended by overlay files.

A file holds `version: 1` and `primary:`, a list of categories. A category has `id`, `zh`, `en`, `scope` and
`children`; at the third tier `examples` (two prompts or more) and `terms` (words that such prompts use) in
place of children. An overlay is a file of the same form: a category whose id is known needs only its id and
its new children.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from finetune.errors import UserError
from finetune.recipe.yaml_text import Key, parse_yaml

DATA = Path(__file__).resolve().parent / "data"
PROMPT_FILES = tuple(sorted((DATA / "prompts").glob("*.yaml")))
HELD_OUT_FILE = DATA / "heldout.jsonl"
TIERS = ("primary", "secondary", "tertiary")
SIMILAR_NAMES = 0.8

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Node(BaseModel):
    """One category as a file writes it. What a category new to the taxonomy needs is checked on assembly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^[1-9](\.\d\d){0,2}$")]
    zh: Text | None = None
    en: Text | None = None
    scope: Text | None = None
    terms: str = ""
    examples: tuple[Text, ...] = ()
    children: tuple[_Node, ...] = ()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    primary: tuple[_Node, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Category:
    """A category of any tier.

    Attributes:
        id: such as "3", "3.02" or "3.02.07"; never given to another category once published.
        scope: what belongs here, in one line of Chinese.
        terms: words that such prompts use; third tier only.
        examples: prompts; third tier only.
    """

    id: str
    zh: str
    en: str
    scope: str
    terms: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    @property
    def tier(self) -> int:
        """1, 2 or 3."""
        return tier_of(self.id)


def tier_of(identity: str) -> int:
    """The tier that an id belongs to: 1, 2 or 3."""
    return identity.count(".") + 1


def ancestor(identity: str, tier: int) -> str:
    """The id of the category of a tier that an id lies in: ("3.02.07", 2) → "3.02"."""
    return ".".join(identity.split(".")[:tier])


@dataclass(frozen=True)
class Taxonomy:
    """All categories by id, parents before their children, siblings in the order of the files."""

    categories: dict[str, Category]

    @cached_property
    def tiers(self) -> tuple[tuple[Category, ...], ...]:
        """The categories of each tier."""
        return tuple(
            tuple(each for each in self.categories.values() if each.tier == tier) for tier in (1, 2, 3)
        )

    def __getitem__(self, identity: str) -> Category:
        return self.categories[identity]

    def children(self, identity: str) -> tuple[Category, ...]:
        """The categories one tier below."""
        tier = tier_of(identity)
        return tuple(each for each in self.tiers[tier] if ancestor(each.id, tier) == identity)

    def check_id(self, identity: Any, where: str) -> str:
        """The id, if there is such a category.

        Raises:
            UserError: there is none; names the nearest, and `where` it was written.
        """
        if isinstance(identity, str) and identity in self.categories:
            return identity
        near = difflib.get_close_matches(str(identity), self.categories, n=1)
        raise UserError(
            f"{where}: there is no category {identity!r}",
            hint=f"did you mean {near[0]} ({self[near[0]].zh})?" if near else "`taxonomy stats` lists them",
        )


def load_taxonomy(*overlays: Path | str) -> Taxonomy:
    """The shipped taxonomy, extended by overlay files in order.

    An overlay adds categories of the second or third tier (or a primary one with its own children). It cannot
    rename or remove what is there: ids are written into data sets.

    Raises:
        UserError: a file is missing, no valid YAML or not of this form; an id, name or example is taken, a
            category stands under another parent than its id says, or lacks children or examples.
    """
    builder = _Builder()
    for path in PROMPT_FILES:
        builder.add(_Source(path, path.name, shipped=True))
    for overlay in overlays:
        builder.add(_Source(Path(overlay), str(overlay)))
    return builder.taxonomy()


def similar_names(taxonomy: Taxonomy) -> list[tuple[Category, Category]]:
    """Categories of one tier whose names, Chinese or English, are nearly the same: worth a second look."""
    found = []
    for tier in taxonomy.tiers:
        for one, other in combinations(tier, 2):
            if any(_alike(a, b) for a, b in ((one.zh, other.zh), (one.en.lower(), other.en.lower()))):
                found.append((one, other))
    return found


def _alike(one: str, other: str) -> bool:
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    # The cheap upper bounds settle nearly all of some thirty thousand pairs.
    return (
        matcher.real_quick_ratio() >= SIMILAR_NAMES
        and matcher.quick_ratio() >= SIMILAR_NAMES
        and matcher.ratio() >= SIMILAR_NAMES
    )


class _Source:
    """A file, its content checked for form, and the lines of its keys for messages."""

    def __init__(self, path: Path, name: str, *, shipped: bool = False) -> None:
        self.name = name
        try:
            self.text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UserError(f"{name}: cannot be read: {reason}", hint="name a YAML file") from error
        # The shipped files are many and known to be sound: libyaml reads them twenty times faster.
        fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        data = yaml.load(self.text, Loader=fast) if shipped else self._parsed()
        try:
            self.content = _File.model_validate(data)
        except ValidationError as error:
            raise self._malformed(error) from error

    def _parsed(self) -> Any:
        document = parse_yaml(self.text, self.name)
        if document.duplicates:
            key, first, line = document.duplicates[0]
            raise UserError(f"{self.name}:{line}: the key '{key[-1]}' stands at line {first} already")
        return document.data

    @cached_property
    def _lines(self) -> dict[Key, int]:
        return parse_yaml(self.text, self.name).lines

    def at(self, key: Key) -> str:
        """FILE:LINE of a key, or of the nearest one around it that the file has."""
        lines = (self._lines.get(key[:end]) for end in range(len(key), 0, -1))
        return f"{self.name}:{next((line for line in lines if line), 1)}"

    def _malformed(self, error: ValidationError) -> UserError:
        problem = error.errors()[0]
        key = tuple(problem["loc"])
        where = ".".join(map(str, key)) or "the file"
        found = f", found {problem['input']!r:.60}" if problem["type"] != "missing" else ""
        return UserError(
            f"{self.at(key)}: {where}: {problem['msg']}{found}",
            hint="a file has `version: 1` and `primary:`; a category has id (in quotes, such as '3.02.90'), zh, en, "
            "scope, and children or examples",
        )


@dataclass
class _Builder:
    """The tree as it grows, and where each id, name and example was first seen."""

    nodes: dict[str, Category] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, source: _Source) -> None:
        for node, parent, key in _walk(source.content.primary, "", ("primary",)):
            self._add_node(node, parent, key, source)

    def taxonomy(self) -> Taxonomy:
        """Parents before their children: an overlay's categories go where they belong."""
        order = {identity: index for index, identity in enumerate(self.nodes)}
        ids = sorted(
            self.nodes, key=lambda each: [order[ancestor(each, n)] for n in range(1, tier_of(each) + 1)]
        )
        return Taxonomy({identity: self.nodes[identity] for identity in ids})

    def _add_node(self, node: _Node, parent: str, key: Key, source: _Source) -> None:
        where = source.at((*key, "id")) if node.id in self.nodes else None
        if tier_of(node.id) != tier_of(parent) + 1 if parent else tier_of(node.id) != 1:
            raise UserError(
                f"{source.at((*key, 'id'))}: category {node.id} stands at the wrong tier",
                hint="'3' holds '3.02', which holds '3.02.07'",
            )
        if parent and ancestor(node.id, tier_of(parent)) != parent:
            raise UserError(
                f"{source.at((*key, 'id'))}: category {node.id} is a child of {parent}",
                hint=f"the id of a child begins with its parent's: {parent}.NN",
            )
        if where is None:
            self._add_new(node, key, source)
        elif tier_of(node.id) == len(TIERS) or not node.children:
            raise UserError(
                f"{where}: the id {node.id} is taken ({self.nodes[node.id].zh})", hint="take a free one"
            )
        elif any((node.zh, node.en, node.scope, node.terms, node.examples)):
            raise UserError(
                f"{where}: {node.id} ({self.nodes[node.id].zh}) is in the taxonomy and cannot be changed",
                hint="give only its id and its new children",
            )

    def _add_new(self, node: _Node, key: Key, source: _Source) -> None:
        if not (node.zh and node.en and node.scope):
            lacking = [name for name in ("zh", "en", "scope") if not getattr(node, name)]
            raise UserError(
                f"{source.at((*key, 'id'))}: the new category {node.id} lacks {', '.join(lacking)}"
            )
        last = tier_of(node.id) == len(TIERS)
        if last and len(node.examples) < 2:
            raise UserError(
                f"{source.at((*key, 'examples'))}: {node.id}: expected two examples or more, "
                f"found {len(node.examples)}",
                hint="the classifier learns from them; five of different wording are a good start",
            )
        if last == bool(node.children) or (not last and (node.examples or node.terms)):
            raise UserError(
                f"{source.at((*key, 'id'))}: {node.id}: expected "
                + ("no children at the third tier" if last else "children, and no examples or terms"),
            )
        for name, kind in ((node.zh, "zh"), (node.en, "en")):
            taken = self.names.setdefault(f"{kind}:{name.casefold()}", node.id)
            if taken != node.id:
                raise UserError(
                    f"{source.at((*key, kind))}: {node.id}: the name '{name}' is taken by {taken}"
                )
        for index, example in enumerate(node.examples):
            taken = self.examples.setdefault(re.sub(r"\s", "", example), node.id)
            if taken != node.id or example in node.examples[:index]:
                raise UserError(
                    f"{source.at((*key, 'examples', index))}: {node.id}: "
                    f"the example '{example}' stands in {taken} already"
                )
        self.nodes[node.id] = Category(
            node.id, node.zh, node.en, node.scope, tuple(node.terms.split()), node.examples
        )


def _walk(nodes: Sequence[_Node], parent: str, key: Key) -> Iterator[tuple[_Node, str, Key]]:
    """Every node with its parent's id and its key in the file, parents first."""
    for index, node in enumerate(nodes):
        here = (*key, index)
        yield node, parent, here
        yield from _walk(node.children, node.id, (*here, "children"))
