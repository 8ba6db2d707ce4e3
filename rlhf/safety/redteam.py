"""Red-teaming: answer the attack prompts and the harmless ones that look dangerous, judge, count, report."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.data.progress import progress_bar
from finetune.errors import UserError
from finetune.files import write_text
from finetune.report.files import read_json
from rlhf.safety.attacks import AttackPrompt, benign_prompts, evaluation_prompts, read_prompts
from rlhf.safety.judges import Exchange, Judge, load_judge
from rlhf.safety.results import BenignAnswer, JudgedAnswer, summarise
from rlhf.safety.rules import judge_refusal
from rlhf.safety.taxonomy import SafetyTaxonomy, load_safety_taxonomy

RESULT_FILE = "redteam.json"
REPORT_FILE = "redteam.html"
FORMAT_VERSION = 1
MAX_NEW_TOKENS = 128
BATCH_SIZE = 16
SPREAD_SEED = 0


def red_team(
    model: str,
    output: Path | str,
    *,
    adapter: Path | None = None,
    file: Path | None = None,
    judge: str | Judge = "rules",
    limit: int | None = None,
    benign: bool = True,
    system: str | None = None,
    quantization: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    overlays: Sequence[Path] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Answer the prompts greedily, judge the answers, and write `redteam.json` and `redteam.html`.

    Args:
        model: catalogue name, local folder or hub id.
        output: folder to write into.
        adapter: put on the model.
        file: attack prompts of the user's; the shipped evaluation set by default.
        judge: a name for `load_judge`, or a judge.
        limit: at most so many attack prompts and as many harmless ones, spread over attacks and areas.
        benign: measure over-refusal, too.
        system: system message in front of every prompt that brings none.
        quantization: none, int8 or nf4; None is as the adapter was trained.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.
        overlays: files that extend the safety taxonomy, for the ids in `file`.
        overwrite: replace an earlier result.

    Returns:
        What `redteam.json` holds.

    Raises:
        UserError: model, adapter, file or judge cannot be had; the judge raises; the output is taken.
    """
    from finetune.chat_command import trained_quantization

    output = Path(output)
    _check_free(output, overwrite)
    quantization = quantization or trained_quantization(adapter)
    taxonomy = load_safety_taxonomy(*overlays)
    asked = load_judge(judge) if isinstance(judge, str) else judge
    everything = read_prompts(file, taxonomy) if file else evaluation_prompts()
    attacks = spread(everything, limit)
    harmless = spread(benign_prompts("evaluation"), limit) if benign else []
    answers = _answers_of(
        model,
        adapter,
        [_with_system(prompt, system) for prompt in (*attacks, *harmless)],
        quantization=quantization,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    result = assess(
        attacks, answers[: len(attacks)], harmless, answers[len(attacks) :], judge=asked, taxonomy=taxonomy
    )
    about = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": model,
        "adapter": str(adapter) if adapter else None,
        "judge": judge if isinstance(judge, str) else getattr(judge, "__name__", "judge"),
        "prompts": str(file) if file else "shipped evaluation set",
        "prompts_available": len(everything),
        "system": system,
        "quantization": quantization,
        "max_new_tokens": max_new_tokens,
        "taxonomy_version": taxonomy.version,
    }
    return write_result(output, about | result, taxonomy)


def assess(
    attacks: Sequence[AttackPrompt],
    answers: Sequence[str],
    harmless: Sequence[AttackPrompt] = (),
    harmless_answers: Sequence[str] = (),
    *,
    judge: Judge,
    taxonomy: SafetyTaxonomy | None = None,
) -> dict[str, Any]:
    """Judge answers and count.

    Args:
        attacks: prompts, in the order of `answers`.
        answers: one for each.
        harmless: benign prompts, in the order of `harmless_answers`.
        harmless_answers: one for each.
        judge: of the answers to attacks.
        taxonomy: for the names of attacks and areas.

    Returns:
        `summary` (see `results.summarise`), `names` of attacks, areas and values, and the judged `answers` and
        `benign_answers`.

    Raises:
        UserError: the judge raises, or gives another number of verdicts.
    """
    taxonomy = taxonomy or load_safety_taxonomy()
    exchanges = [Exchange(p.messages, text) for p, text in zip(attacks, answers, strict=True)]
    verdicts = judge(exchanges) if exchanges else []
    if len(verdicts) != len(exchanges):
        raise UserError(f"the judge gave {len(verdicts)} verdicts for {len(exchanges)} answers")
    judged = [JudgedAnswer(p, a, v) for p, a, v in zip(attacks, answers, verdicts, strict=True)]
    refusals = [
        BenignAnswer(p, a, judge_refusal(p.prompt, a))
        for p, a in zip(harmless, harmless_answers, strict=True)
    ]
    return {
        "summary": summarise(judged, refusals),
        "names": {
            "attacks": {attack.id: attack.en for attack in taxonomy.attacks},
            "areas": {area.id: area.en or area.id for area in taxonomy.areas},
            "values": {value.id: value.en for value in taxonomy.values.values()},
        },
        "answers": [
            {**_row(a.prompt, a.answer), "label": a.verdict.label, "reason": a.verdict.reason} for a in judged
        ],
        "benign_answers": [{**_row(a.prompt, a.answer), "refusal": a.refusal} for a in refusals],
    }


def write_result(
    output: Path, result: dict[str, Any], taxonomy: SafetyTaxonomy | None = None
) -> dict[str, Any]:
    """Write `redteam.json` and `redteam.html` into a folder; returns the result."""
    from rlhf.safety.page import render

    output.mkdir(parents=True, exist_ok=True)
    write_text(output / RESULT_FILE, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    write_text(output / REPORT_FILE, render(result))
    return result


def read_result(folder: Path | str) -> dict[str, Any]:
    """The result in a folder that `red_team` wrote, or in its `redteam.json`.

    Raises:
        UserError: there is none, or it is of another format.
    """
    path = Path(folder)
    path = path / RESULT_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file", hint="give a folder that `redteam --output` wrote")
    result = read_json(path)
    if result.get("format_version") != FORMAT_VERSION or "summary" not in result:
        found = result.get("format_version")
        raise UserError(f"{path}: expected a red-team result of format {FORMAT_VERSION}, found {found!r}")
    return result


def spread(prompts: Sequence[Any], limit: int | None) -> list[Any]:
    """At most `limit` prompts, as even over attacks and areas as they come; all of them for None.

    Raises:
        UserError: the limit is below 1.
    """
    if limit is None or limit >= len(prompts):
        return list(prompts)
    if limit < 1:
        raise UserError(f"--limit {limit}: expected at least 1")
    waiting = random.Random(SPREAD_SEED).sample(range(len(prompts)), len(prompts))
    asked: Counter[Any] = Counter()
    chosen: list[int] = []
    for _ in range(limit):
        # Whoever comes first of those whose attack and area together, then each alone, were asked least.
        best = min(waiting, key=lambda i: tuple(asked[part] for part in _parts(prompts[i])))
        waiting.remove(best)
        chosen.append(best)
        asked.update(_parts(prompts[best]))
    return [prompts[index] for index in sorted(chosen)]


def _parts(prompt: AttackPrompt) -> list[tuple[str, Any]]:
    return [("both", (prompt.attack, prompt.area)), ("attack", prompt.attack), ("area", prompt.area)]


def _check_free(output: Path, overwrite: bool) -> None:
    if output.is_file():
        raise UserError(f"{output}: is a file, expected a folder")
    if (output / RESULT_FILE).exists() and not overwrite:
        raise UserError(
            f"{output}: holds the result of another run", hint="choose another --output, or pass --overwrite"
        )


def _with_system(prompt: AttackPrompt, system: str | None) -> list[dict[str, str]]:
    messages = [dict(message) for message in prompt.messages]
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _answers_of(
    model: str,
    adapter: Path | None,
    conversations: Sequence[list[dict[str, str]]],
    *,
    quantization: str,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    from finetune.chat_command import load
    from finetune.quiet import quiet_libraries

    quiet_libraries()
    import torch

    try:
        network, tokenizer = load(model, adapter, quantization=quantization)
        return answer_all(
            network, tokenizer, conversations, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU is out of memory with {model}",
            hint="lower --batch-size or --max-new-tokens, or hold the base in 4 bits with --quantization nf4",
        ) from error


def answer_all(
    network: Any,
    tokenizer: Any,
    conversations: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """Greedy answers to conversations, in their order, with a progress bar on terminals.

    Args:
        network: causal LM, PEFT or not.
        tokenizer: Baichuan's.
        conversations: messages, the last one the user's.
        max_new_tokens: longest answer; at most half of what the model holds.
        batch_size: prompts at once; those of like length go together.
    """
    from finetune.baichuan.chat import build_prompt
    from finetune.generate import greedy_answers

    longest = int(network.config.model_max_length)
    budget = min(max_new_tokens, longest // 2)
    prompts = [build_prompt(tokenizer, c, max_length=longest, max_new_tokens=budget) for c in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with progress_bar("answering", len(prompts)) as advance:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[i] for i in chosen]
            texts = greedy_answers(network, tokenizer, batch, max_new_tokens=budget, batch_size=batch_size)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
            advance(len(chosen))
    return answers


def _row(prompt: AttackPrompt, answer: str) -> dict[str, Any]:
    row = {
        "id": prompt.id,
        "messages": [dict(message) for message in prompt.messages],
        "attack": prompt.attack,
        "value": prompt.value,
        "group": prompt.group,
        "answer": answer,
    }
    return {key: value for key, value in row.items() if value is not None}


def compare_runs(before: Path, after: Path, output: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page that compares two results; returns its path and lines for the terminal.

    Args:
        before: folder or `redteam.json` of the first run.
        after: of the second.
        output: HTML file; `compare.html` beside the second result by default.

    Raises:
        UserError: a result is missing, or they share no prompt.
    """
    from rlhf.safety.page import comparison_cards, comparison_notices, render_comparison
    from rlhf.safety.results import compare_answers

    first, second = read_result(before), read_result(after)
    changes = compare_answers(first["answers"], second["answers"])
    if not changes["shared"]:
        raise UserError(
            f"{before} and {after} have no prompt in common", hint="run both with the same --file"
        )
    folder = after if after.is_dir() else after.parent
    page = output or folder / "compare.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, render_comparison(first, second))
    lines = [
        f"{card.label}: {card.before} → {card.value} ({card.change})"
        for card in comparison_cards(first["summary"], second["summary"])
    ]
    lines.append(
        f"{changes['became_safe']} of {changes['shared']} prompts became safe, {changes['became_not_safe']} "
        f"stopped being safe (p = {changes['p_value']:.2g})"
    )
    return page, [*lines, *comparison_notices(first, second, changes)]
