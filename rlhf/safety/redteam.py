"""Red-teaming: answer the attack prompts and the harmless ones that look dangerous, judge, count, report."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import check_free, check_writable, write_text
from finetune.report.files import read_json
from rlhf.safety import RESULT_FILE, SHIPPED_JUDGE
from rlhf.safety.answering import BATCH_SIZE, MAX_NEW_TOKENS, answer_all, opened_model, with_system
from rlhf.safety.attacks import AttackPrompt, benign_prompts, evaluation_prompts, read_prompts
from rlhf.safety.judges import Exchange, Judge, named_judge
from rlhf.safety.kept import KEPT_FILE, keep, prompt_of, prompt_row, read_kept
from rlhf.safety.learned import refusals_by_learning
from rlhf.safety.results import BenignAnswer, JudgedAnswer, summarise
from rlhf.safety.taxonomy import SafetyTaxonomy, load_safety_taxonomy

if TYPE_CHECKING:
    from finetune.recipe.schema import Model

REPORT_FILE = "redteam.html"
FORMAT_VERSION = 1
SPREAD_SEED = 0


def red_team(
    model: str | Model,
    output: Path | str,
    *,
    adapter: Path | None = None,
    file: Path | None = None,
    judge: str | Judge = SHIPPED_JUDGE,
    threshold: float | None = None,
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

    The answers lie in `answers.json` before they are judged; where the judge raises, `judge_again` takes them up.

    Args:
        model: catalogue name, local folder or hub id; or the section of a recipe, whose own quantization holds.
        output: folder to write into.
        adapter: put on the model.
        file: attack prompts of the user's; the shipped evaluation set by default.
        judge: a name for `load_judge`, or a judge.
        threshold: of the judge, see `load_judge`.
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
    _check_free(output, overwrite, RESULT_FILE, KEPT_FILE)
    if isinstance(model, str):
        name, quantization = model, quantization or trained_quantization(adapter)
    else:
        name, quantization = model.base, model.quantization
    taxonomy = load_safety_taxonomy(*overlays)
    asked = named_judge(judge, model, threshold, batch_size)
    everything = read_prompts(file, taxonomy) if file else evaluation_prompts()
    attacks = spread(everything, limit)
    harmless = spread(benign_prompts("evaluation"), limit) if benign else []
    with opened_model(model, adapter, quantization=quantization) as (network, tokenizer):
        answers = answer_all(
            network,
            tokenizer,
            [with_system(prompt, system) for prompt in (*attacks, *harmless)],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    del network  # makes room for a judge that is a model
    kept = {
        "format_version": FORMAT_VERSION,
        "model": name,
        "adapter": str(adapter) if adapter else None,
        "prompts": str(file) if file else "shipped evaluation set",
        "prompts_available": len(everything),
        "system": system,
        "quantization": quantization,
        "max_new_tokens": max_new_tokens,
        "taxonomy_version": taxonomy.version,
        "answers": [_row(p, a) for p, a in zip(attacks, answers)],
        "benign_answers": [_row(p, a) for p, a in zip(harmless, answers[len(attacks) :], strict=True)],
    }
    keep(output / KEPT_FILE, kept)
    return _judge_kept(kept, output / KEPT_FILE, output, asked, _name_of(judge, threshold), taxonomy)


def judge_again(
    answers: Path,
    output: Path | str,
    *,
    judge: str | Judge = SHIPPED_JUDGE,
    threshold: float | None = None,
    model: str | None = None,
    batch_size: int = BATCH_SIZE,
    overlays: Sequence[Path] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """What `red_team` does, with answers that it gave before: nothing is generated.

    Args:
        answers: `answers.json` or `redteam.json` of a run.
        output: folder to write into, which may be that of the answers.
        model: base of a reward model as judge; by default the one that the reward model was trained on.

    Raises:
        UserError: the file holds no answers; judge or output as in `red_team`.
    """
    output = Path(output)
    _check_free(output, overwrite, RESULT_FILE)
    kept = read_kept(answers, FORMAT_VERSION, ("answers", "benign_answers"), ("id", "messages", "answer"))
    taxonomy = load_safety_taxonomy(*overlays)
    asked = named_judge(judge, model, threshold, batch_size)
    return _judge_kept(kept, answers, output, asked, _name_of(judge, threshold), taxonomy)


def _name_of(judge: str | Judge, threshold: float | None) -> str:
    name = judge if isinstance(judge, str) else getattr(judge, "__name__", "judge")
    return f"{name}, threshold {threshold:g}" if threshold is not None else name


def _judge_kept(
    kept: dict[str, Any], file: Path, output: Path, judge: Judge, name: str, taxonomy: SafetyTaxonomy
) -> dict[str, Any]:
    """Judge answers that lie in a file, and write the result."""
    answers, harmless = kept["answers"], kept["benign_answers"]
    try:
        result = assess(
            [prompt_of(row) for row in answers],
            [row["answer"] for row in answers],
            [prompt_of(row) for row in harmless],
            [row["answer"] for row in harmless],
            judge=judge,
            taxonomy=taxonomy,
        )
    except UserError as error:
        raise UserError(
            error.args[0],
            hint=f"{f'{error.hint}; ' if error.hint else ''}the answers are kept: judge them again, without "
            f"generating, by redteam --answers {file} --judge … --output {output}",
        ) from error
    about = {key: value for key, value in kept.items() if key not in ("answers", "benign_answers")}
    about |= {"created": datetime.now().astimezone().isoformat(timespec="seconds"), "judge": name}
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
    pairs = [(p.prompt, a) for p, a in zip(harmless, harmless_answers, strict=True)]
    refused = refusals_by_learning(pairs) if pairs else []
    refusals = [BenignAnswer(p, a, r) for p, a, r in zip(harmless, harmless_answers, refused)]
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
    path = _result_file(Path(folder))
    again = _made_again(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file", hint=f"give a folder that `redteam --output` wrote{again}")
    result = read_json(path, hint=f"repair it, or have it written again{again}")
    if result.get("format_version") != FORMAT_VERSION:
        found = result.get("format_version")
        raise UserError(
            f"{path}: expected a red-team result of format {FORMAT_VERSION}, found {found!r}",
            hint=f"have it written again{again}",
        )
    missing = [name for name in ("summary", "names", "answers", "benign_answers") if name not in result]
    if missing:
        raise UserError(
            f"{path}: expected a red-team result, found one without {', '.join(missing)}",
            hint=f"give a folder that `redteam --output` wrote{again}",
        )
    return result


def _result_file(path: Path) -> Path:
    return path / RESULT_FILE if path.is_dir() else path


def _made_again(path: Path) -> str:
    """The end of a hint: how a result is made of the answers beside it; empty where there are none."""
    answers = path.parent / KEPT_FILE
    if not answers.is_file():
        return ""
    again = f"redteam --answers {answers} --output {path.parent} --overwrite"
    return f"; {again} judges the answers again and writes the result"


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


def _check_free(output: Path, overwrite: bool, *names: str) -> None:
    if output.is_file():
        raise UserError(f"{output}: is a file, expected a folder")
    check_writable(output, called="--output")
    if overwrite:
        return
    if (output / RESULT_FILE).exists():
        raise UserError(
            f"{output}: holds the result of another run", hint="choose another --output, or pass --overwrite"
        )
    taken = next((output / name for name in names if (output / name).exists()), None)
    if taken is not None:
        raise UserError(
            f"{taken}: answers that nobody has judged yet",
            hint=f"judge them with redteam --answers {taken}, or pass --overwrite",
        )


def _row(prompt: AttackPrompt, answer: str) -> dict[str, Any]:
    return {**prompt_row(prompt), "answer": answer}


def compare_runs(
    before: Path, after: Path, output: Path | None = None, *, overwrite: bool = False
) -> tuple[Path, list[str]]:
    """Write the page that compares two results; returns its path and lines for the terminal.

    Args:
        before: folder or `redteam.json` of the first run.
        after: of the second.
        output: HTML file; `compare.html` beside the second result by default.
        overwrite: replace a file that is no such page, too.

    Raises:
        UserError: a result is missing, or they share no prompt; the page may not be written there.
    """
    from rlhf.safety.page import COMPARISON_TITLE, comparison_cards, comparison_notices, render_comparison
    from rlhf.safety.results import compare_answers

    files = [_result_file(before), _result_file(after)]
    page = output or files[1].parent / "compare.html"
    check_free(page, overwrite=overwrite, others=files, page=f"<title>{COMPARISON_TITLE}")
    first, second = read_result(before), read_result(after)
    changes = compare_answers(first["answers"], second["answers"])
    if not changes["shared"]:
        raise UserError(
            f"{before} and {after} have no prompt in common", hint="run both with the same --file"
        )
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
