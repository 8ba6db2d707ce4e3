"""What the report's sections show, drawn from the run folder into plain values for the template."""

from __future__ import annotations

import json
import shlex
from difflib import SequenceMatcher
from typing import Any

from finetune.report.formatting import MINUS, is_number, percent
from finetune.report.run_folder import RunFolder
from finetune.report.samples import Sample, mean_scores
from finetune.sizes import byte_size

SHORTEST_MATCH = 2
STAGE_NAMES = {
    "sft": "supervised fine-tuning",
    "pretrain": "continued pre-training",
    "reward": "reward model",
    "dpo": "direct preference optimisation",
    "ppo": "reinforcement learning (PPO)",
    "merge": "merge into plain weights",
    "redteam": "red-teaming",
    "aim": "data aimed at what red-teaming found",
}
METRIC_NAMES = {
    "reward": "Reward",
    "char_f1": "Character F1",
    "rouge_l": "ROUGE-L",
    "distinct_2": "Distinct-2",
}

Facts = list[tuple[str, str]]


def subtitle(run: RunFolder) -> str:
    """One line saying what was done to what."""
    model, adapter = run.recipe.get("model") or {}, run.recipe.get("adapter") or {}
    quantization = model.get("quantization")
    method = {"lora": "LoRA", "ptuning": "P-Tuning", "prefix": "prefix tuning"}.get(
        str(adapter.get("method")), str(adapter.get("method") or "")
    )
    if method == "LoRA" and quantization not in (None, "none"):
        method = f"QLoRA ({quantization})"
    stage = STAGE_NAMES.get(str(run.recipe.get("stage")), str(run.recipe.get("stage") or ""))
    base = run.result.get("base") or model.get("base") or ""
    return " · ".join(part for part in (str(base), method, stage) if part)


def notices(run: RunFolder) -> list[str]:
    """What the reader has to know before trusting the numbers."""
    found = []
    if run.status != "finished":
        last = max((int(row["step"]) for row in run.metrics), default=0)
        how = "was interrupted" if run.status == "interrupted" else "has not finished"
        found.append(f"The run {how}; the numbers are those up to step {last:,}.")
    broken = [row["step"] for row in run.metrics if "loss" in row and not is_number(row["loss"])]
    if broken:
        found.append(f"The loss was not a finite number at step {broken[0]:,}.")
    found += [str(warning) for warning in run.result.get("warnings") or []]
    return found + [f"Left out, because it cannot be read: {message}" for message in run.unreadable]


def metric_rows(samples: list[Sample]) -> list[list[str]]:
    """Metric, mean before, mean after, difference: for each metric that the samples were scored with."""
    means = mean_scores(samples)
    rows = []
    for metric in dict.fromkeys(name.rpartition("_")[0] for name in means):
        before, after = means.get(f"{metric}_before"), means.get(f"{metric}_after")
        change = "" if before is None or after is None else f"{after - before:+.3f}".replace("-", MINUS)
        rows.append(
            [
                METRIC_NAMES.get(metric, metric),
                "–" if before is None else f"{before:.3f}",
                "–" if after is None else f"{after:.3f}",
                change,
            ]
        )
    return rows


def sample_cards(samples: list[Sample]) -> list[dict[str, Any]]:
    """The samples as the template shows them."""
    return [
        {
            "context": [(m["role"], m["content"]) for m in sample.messages[:-1]],
            "prompt": sample.messages[-1]["content"] if sample.messages else "",
            "reference": sample.reference,
            "score": "F1" if sample.reference else "reward",
            **{
                f"score_{moment}": sample.scores.get(
                    f"{'char_f1' if sample.reference else 'reward'}_{moment}"
                )
                for moment in ("before", "after")
            },
            "before": _marked(sample.before, sample.reference),
            "after": _marked(sample.after, sample.reference),
        }
        for sample in samples
    ]


def _marked(answer: str | None, reference: str) -> list[tuple[str, bool]] | None:
    """The answer in pieces, each with whether the reference has the same words in the same order."""
    if answer is None:
        return None
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in SequenceMatcher(None, answer, reference, autojunk=False).get_matching_blocks():
        same = answer[match.a : match.a + match.size]
        if sum(c.isalnum() for c in same) < SHORTEST_MATCH:
            continue
        pieces += [(answer[end : match.a], False), (same, True)]
        end = match.a + match.size
    pieces.append((answer[end:], False))
    return [piece for piece in pieces if piece[0]]


def settings(recipe: dict[str, Any]) -> list[tuple[str, Facts]]:
    """The recipe in groups: what stands at its top, then each section; keys left at null are left out."""
    top = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
    groups = {"run": top, **{key: value for key, value in recipe.items() if isinstance(value, dict)}}
    return [(name, shown) for name, group in groups.items() if (shown := facts(group))]


def facts(values: dict[str, Any], prefix: str = "", *, grouped: bool = False) -> Facts:
    """Nested values as flat pairs of dotted key and text, without those that are null or empty."""
    pairs: Facts = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            pairs += facts(value, f"{name}.", grouped=grouped)
        elif value not in (None, "", []):
            pairs.append((name, as_text(name, value, grouped=grouped)))
    return pairs


def as_text(key: str, value: Any, *, grouped: bool = False) -> str:
    """A value as its key suggests: bytes, shares, numbers, lists.

    Args:
        key: the name of the value; its last word may be `bytes`, `share` or `efficiency`.
        value: what was read from YAML or JSON.
        grouped: write 12,345 for 12345: right for counts of rows and tokens, wrong for a seed.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        if key.endswith("bytes"):
            return byte_size(value)
        if key.endswith(("share", "efficiency")) and 0 <= value <= 1:
            return percent(value)
        if isinstance(value, int):
            return f"{value:,}" if grouped else str(value)
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(as_text("", item, grouped=grouped) for item in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def commands(run: RunFolder) -> list[tuple[str, str]]:
    """What to do next with the run, as `(purpose, command line)`."""
    folder = str(run.path)
    recipe = shlex.quote(f"{folder}/recipe.yaml")
    if run.status != "finished":
        return [("Continue this run", f"python -m finetune run {recipe} --resume")]
    lines = []
    base, adapter = run.result.get("base"), run.result.get("adapter")
    if base and adapter and run.recipe.get("stage") != "reward":  # which is no language model
        model, weights = shlex.quote(str(base)), shlex.quote(str(adapter))
        merged = shlex.quote(f"{folder}/merged")
        lines.append(("Talk to the result", f"python -m finetune chat --model {model} --adapter {weights}"))
        if (run.recipe.get("adapter") or {}).get("method") in ("lora", "ptuning"):
            lines.append(
                (
                    "Merge it into plain weights",
                    f"python -m finetune merge --adapter {weights} --output {merged}",
                )
            )
    lines.append(("Run it again", f"python -m finetune run {recipe} --overwrite"))
    return lines
