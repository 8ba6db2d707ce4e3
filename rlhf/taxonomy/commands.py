"""What the commands do: classify, then print, write a page, or write rows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import write_text
from finetune.report.formatting import percent
from finetune.terminal import print_table
from finetune.words import plural
from rlhf.taxonomy.classifier import Prediction, PromptClassifier
from rlhf.taxonomy.reading import PromptFile, read_labelled
from rlhf.taxonomy.tree import HELD_OUT_FILE, TIERS, Taxonomy, ancestor, load_taxonomy, similar_names

if TYPE_CHECKING:
    from rlhf.taxonomy.coverage import CategoryCoverage, Coverage
    from rlhf.taxonomy.sampling import Method


def predict(
    prompts: Sequence[str],
    taxonomy: Taxonomy,
    labelled: Path | None = None,
    threshold: float = 0.4,
    model: str | None = None,
    adapter: Path | None = None,
) -> list[Prediction]:
    """The category of each prompt, by the classifier, or by a language model where one is named."""
    if model is None:
        if adapter:
            raise UserError("--adapter: expected --model with it, found none")
        pairs = read_labelled(labelled, taxonomy, called="--labelled") if labelled else []
        return PromptClassifier(taxonomy, pairs).predict(prompts, threshold=threshold)
    if labelled:
        raise UserError("--labelled and --model exclude each other: the language model is not trained here")
    from finetune.chat_command import load
    from rlhf.taxonomy.likelihood import LikelihoodClassifier

    network, tokenizer = load(model, adapter, quantization="none")
    return LikelihoodClassifier(network, tokenizer, taxonomy).predict(prompts, threshold=threshold)


def show_stats(overlays: Iterable[Path]) -> None:
    """Print the size of the taxonomies, the secondary categories, and names that are nearly the same."""
    from rlhf.safety.taxonomy import load_safety_taxonomy

    taxonomy = load_taxonomy(*overlays)
    counts = " / ".join(str(len(tier)) for tier in taxonomy.tiers)
    examples = sum(len(leaf.examples) for leaf in taxonomy.tiers[2])
    print(f"prompt taxonomy: {counts} categories ({', '.join(TIERS)}), {examples:,} examples")
    safety = load_safety_taxonomy()
    print(
        f"safety taxonomy: {len(safety.attacks)} types of attack, {len(safety.values)} values in "
        f"{len(safety.areas)} areas\n"
    )
    rows = []
    for each in taxonomy.tiers[1]:
        leaves = taxonomy.children(each.id)
        count = sum(len(leaf.examples) for leaf in leaves)
        rows.append([each.id, each.zh, each.en, taxonomy[each.id[0]].zh, str(len(leaves)), str(count)])
    print_table(["id", "secondary category", "", "primary", "tertiary", "examples"], rows)
    for one, other in similar_names(taxonomy):
        print(f"note: nearly the same name: {one.id} {one.zh} ({one.en}), {other.id} {other.zh} ({other.en})")


def write_classes(path: Path, found: PromptFile, predictions: Sequence[Prediction]) -> None:
    """One JSON object a row: prompt, line, category, path, confidence."""
    _write_lines(
        path,
        (
            {"prompt": each.prompt, "line": each.row.location.number} | prediction.as_dict()
            for each, prediction in zip(found.rows, predictions)
        ),
    )


def show_classes(found: PromptFile, predictions: Sequence[Prediction], taxonomy: Taxonomy) -> None:
    """Print how many prompts each primary and secondary category has, with the mean confidence."""
    rows = []
    for tier in (1, 2):
        confidence: dict[str | None, list[float]] = {}
        for prediction in predictions:
            confidence.setdefault(prediction.at(tier), []).append(prediction.confidence[tier - 1])
        for category, values in confidence.items():
            if category is None:
                names = ["unknown", f"({TIERS[tier - 1]})", ""]
            else:
                names = [category, taxonomy[category].zh, taxonomy[category].en]
            mean = sum(values) / len(values)
            rows.append([*names, str(len(values)), percent(len(values) / len(predictions)), f"{mean:.2f}"])
    rows.sort(key=lambda row: (row[0] == "unknown", row[0]))
    print_table(["id", "category", "", "prompts", "share", "confidence"], rows)


def show_evaluation(
    file: Path | None,
    overlays: Iterable[Path],
    labelled: Path | None,
    threshold: float,
    model: str | None,
    adapter: Path | None,
) -> None:
    """Print accuracy by tier, and precision and recall by secondary category."""
    from rlhf.taxonomy.evaluation import tables

    taxonomy = load_taxonomy(*overlays)
    pairs = read_labelled(file or HELD_OUT_FILE, taxonomy)
    predictions = predict([prompt for prompt, _ in pairs], taxonomy, labelled, threshold, model, adapter)
    for headers, rows in tables(predictions, [label for _, label in pairs], taxonomy):
        print_table(headers, rows)
        print()


def show_coverage(
    found: PromptFile,
    taxonomy: Taxonomy,
    predictions: Sequence[Prediction],
    page: Path,
    json_output: Path | None,
) -> None:
    """Print the table and write the page, and the numbers where a file is named for them."""
    from rlhf.taxonomy.coverage import measure
    from rlhf.taxonomy.page import render

    result = measure(found.name, found.prompts, predictions, taxonomy)
    _print_coverage(result)
    _write(page, render(result))
    if json_output:
        _write(json_output, json.dumps(result.as_dict(), ensure_ascii=False, indent=1) + "\n")
        print(f"numbers: {json_output}")


def coverage_page(source: str) -> Path:
    """Where the page goes by default: a file's, folder's, pattern's or hub data set's own name, made plain."""
    path = Path(source)
    name = re.sub(r"[^\w.-]+", "_", (path.resolve() if path.exists() else path).name)
    return Path(f"{name}.coverage.html")


def _print_coverage(result: Coverage) -> None:
    secondary = result.tiers[1]
    thin = {each.id for tier in result.tiers for each in tier.thin}

    def row(each: CategoryCoverage) -> list[str]:
        distinct = "" if each.distinct_2 is None else f"{each.distinct_2:.2f}"
        state = "empty" if not each.rows else "thin" if each.id in thin else ""
        repeats = str(each.near_duplicates or "")
        return [each.id, each.zh, each.en, str(each.rows), percent(each.share), repeats, distinct, state]

    rows = []
    for primary in result.tiers[0].categories:
        rows.append(row(primary))
        rows += [row(each) for each in secondary.categories if ancestor(each.id, 1) == primary.id]
    print_table(["id", "category", "", "prompts", "share", "near-duplicates", "distinct-2", ""], rows)
    print()
    print_table(
        ["tier", "categories", "empty", "thin", "unknown prompts", "entropy (bits)", "of the highest"],
        [
            [
                tier.tier,
                str(len(tier.categories)),
                str(len(tier.empty)),
                str(len(tier.thin)),
                str(tier.unknown),
                f"{tier.entropy:.2f}",
                percent(tier.evenness),
            ]
            for tier in result.tiers
        ],
    )
    print(
        f"\n{plural(result.rows, 'prompt')}, of them {plural(result.near_duplicates, 'near-duplicate')} of another"
    )


def write_sample(
    found: PromptFile,
    predictions: Sequence[Prediction],
    output: Path,
    *,
    size: int,
    seed: int,
    method: Method,
    temperature: float,
) -> None:
    """Write the sampled rows, and print what became of the spread over secondary categories."""
    from rlhf.taxonomy.sampling import balanced_indices, entropy, reachable_entropy, secondary_counts

    categories = [prediction.category for prediction in predictions]
    chosen, firsts = balanced_indices(
        found.prompts, categories, size=size, seed=seed, method=method, temperature=temperature
    )
    _write_lines(output, (found.rows[index].row.columns for index in chosen))
    kept = [index for index, first in enumerate(firsts) if index == first]
    before, available, after = (
        secondary_counts(categories[index] for index in rows)
        for rows in (range(len(categories)), kept, chosen)
    )
    highest = reachable_entropy(available, sum(after.values()))
    print_table(
        ["", "rows", "secondary categories", "entropy (bits)", "of what can be reached"],
        [
            ["file", str(len(categories)), str(len(before)), f"{entropy(before.values()):.2f}", ""],
            [
                "sample",
                str(len(chosen)),
                str(len(after)),
                f"{entropy(after.values()):.2f}",
                _share(after, highest),
            ],
        ],
    )
    removed = len(categories) - len(kept)
    short = f", so there are fewer than the {size:,} asked for" if len(chosen) < size else ""
    print(f"\n{plural(removed, 'near-duplicate')} left out{short}\nsample: {output}")


def _share(counts: Counter[str], highest: float) -> str:
    from rlhf.taxonomy.sampling import entropy

    return percent(entropy(counts.values()) / highest) if highest else percent(1.0)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
