"""Balanced samples for recipes: what `data.sampling` calls (finetune.sampling_table names it)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from finetune.data.sampling import UNKNOWN, Candidate, CategoryShare, Draw, SamplingSettings
from finetune.errors import UserError
from rlhf.taxonomy.sampling import TEMPERATURE, balanced_indices, classified, secondary_of
from rlhf.taxonomy.tree import Taxonomy, load_taxonomy

KEY = "data.sampling"


def draw(
    candidates: Sequence[Candidate],
    settings: SamplingSettings,
    *,
    seed: int,
    resolve: Callable[[str], str] = str,
) -> Draw:
    """A balanced sample of a recipe's training rows, see `rlhf.taxonomy.sampling.balanced_sample`.

    Args:
        candidates: rows, with the ids of their categories if data.sampling.column is set.
        settings: the recipe's section.
        seed: decides which rows of a category are taken.
        resolve: where a path of the recipe points on this machine.

    Raises:
        UserError: an overlay cannot be read, or a category does not exist; names the key.
    """
    taxonomy = _taxonomy([resolve(path) for path in settings.overlays])
    wanted = [
        name if name == UNKNOWN else taxonomy.check_id(name, f"{KEY}.categories")
        for name in settings.categories or []
    ]
    if settings.column is None:
        categories = classified([each.prompt for each in candidates], taxonomy)
    else:
        categories = [_given(each, taxonomy) for each in candidates]
    of_these = [row for row, category in enumerate(categories) if not wanted or _lies_in(category, wanted)]
    chosen, firsts = balanced_indices(
        [candidates[row].prompt for row in of_these],
        [categories[row] for row in of_these],
        size=settings.size,
        seed=seed,
        method=settings.method,
        temperature=TEMPERATURE if settings.temperature is None else settings.temperature,
    )
    distinct = [row for place, row in enumerate(of_these) if firsts[place] == place]
    there = Counter(secondary_of(categories[row]) for row in distinct)
    taken = Counter(secondary_of(categories[of_these[place]]) for place in chosen)
    return Draw(
        chosen=[of_these[place] for place in chosen],
        repeats=[(of_these[p], of_these[first]) for p, first in enumerate(firsts) if first != p],
        other=len(candidates) - len(of_these),
        categories=[
            CategoryShare(name, _name(name, taxonomy), there[name], taken[name]) for name in sorted(there)
        ],
    )


def _taxonomy(overlays: Sequence[str]) -> Taxonomy:
    try:
        return load_taxonomy(*overlays)
    except UserError as error:
        raise UserError(f"{KEY}.overlays: {error.args[0]}", hint=error.hint) from error


def _given(candidate: Candidate, taxonomy: Taxonomy) -> str | None:
    if candidate.category in (None, UNKNOWN):
        return None
    return taxonomy.check_id(candidate.category, f"{KEY}.column: {candidate.location}")


def _lies_in(category: str | None, wanted: Sequence[str]) -> bool:
    own = category or UNKNOWN
    return any(own == name or own.startswith(f"{name}.") for name in wanted)


def _name(secondary: str, taxonomy: Taxonomy) -> str:
    return "" if secondary == UNKNOWN else f"{taxonomy[secondary].zh} {taxonomy[secondary].en}"
