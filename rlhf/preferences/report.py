"""What is told about preference data: to the user before training, and in the run's report after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.data.report import DataReport
from finetune.words import are, plural
from rlhf.preferences.layouts import Preference


@dataclass(frozen=True)
class PreferenceCounts:
    """What a set of preferences holds.

    Attributes:
        prompts: rows.
        responses: of all prompts.
        pairs: comparisons that are learned.
        ties: pairs of equally good responses, from which nothing is learned.
        gaps: number of pairs by gap, where gaps are known.
        categories: number of prompts by category, where categories are given.
        other_families: number of responses by source model, of models of other families.
    """

    prompts: int
    responses: int
    pairs: int
    ties: int
    gaps: dict[str, int]
    categories: dict[str, int]
    other_families: dict[str, int]


def count(preferences: Sequence[Preference], families: Sequence[str]) -> PreferenceCounts:
    """Count what the preferences hold; models whose name begins with none of `families` are other ones."""
    own = tuple(family.lower() for family in families)
    gaps: Counter[float] = Counter()
    categories: Counter[str] = Counter()
    others: Counter[str] = Counter()
    pairs = ties = 0
    for preference in preferences:
        size = len(preference.responses)
        decided = preference.pairs
        pairs += len(decided)
        ties += size * (size - 1) // 2 - len(decided)
        gaps.update(gap for pair in decided if (gap := preference.gap(*pair)) is not None)
        categories.update([preference.category] if preference.category else [])
        others.update(
            model
            for response in preference.responses
            if (model := response.source_model) and not model.lower().startswith(own)
        )
    return PreferenceCounts(
        prompts=len(preferences),
        responses=sum(len(preference.responses) for preference in preferences),
        pairs=pairs,
        ties=ties,
        gaps={f"{gap:g}": gaps[gap] for gap in sorted(gaps)},
        categories={name: categories[name] for name in sorted(categories)},
        other_families=dict(others.most_common()),
    )


@dataclass(frozen=True)
class PreferenceReport(DataReport):
    """Everything about the preference data of a run; documents are responses with their prompt.

    Attributes:
        cut_prompts: training prompts of which tokens are missing.
        counts: of the training and the held-out set, as "train" and "validation".
    """

    cut_prompts: int = 0
    counts: dict[str, PreferenceCounts] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """What the user should know before the numbers are believed, as sentences."""
        found = [*self.rows_left_out(), *self.conversations_cut()]
        found += self.sampling.warnings() if self.sampling else []
        train = self.counts["train"]
        if cut := self.cut_prompts:
            found.append(
                f"{cut:,} of {plural(train.prompts, 'training prompt')} {are(cut)} cut on the left "
                f"(data.max_length {self.max_length})"
            )
        if shared := self.shared_prompts:
            held_out = plural(self.counts["validation"].prompts, "held-out prompt")
            found.append(
                f"{shared:,} of {held_out} {are(shared)} also trained on: the accuracy will look better than it is"
            )
        if ties := train.ties:
            pairs = plural(ties + train.pairs, "training pair")
            found.append(f"{ties:,} of {pairs} {are(ties)} tied: nothing is learned there")
        if train.other_families:
            total = sum(train.other_families.values())
            names = ", ".join(f"{name} {number:,}" for name, number in list(train.other_families.items())[:4])
            found.append(
                f"{total:,} of {plural(train.responses, 'training response')} {are(total)} by models of other "
                f"families ({names}); "
                "for Baichuan 2's reward model such responses did not help (data.families names the own ones)"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain dictionaries, lists, strings and numbers."""
        counts = {split: asdict(each) for split, each in self.counts.items()}
        return {**super().as_dict(), "cut_prompts": self.cut_prompts, "preferences": counts}
