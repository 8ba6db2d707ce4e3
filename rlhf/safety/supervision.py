"""Answers of differing safety for supervision: sampled from a model, judged, ranked into preference data.

Each attack is answered under several system messages (none, one that asks for care, one that asks for
obedience) and by several decodings of each. The system message is left out of what is written: whoever learns from
the preferences learns to answer with care without being told to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import check_free, write_text
from rlhf.safety import SHIPPED_JUDGE
from rlhf.safety.answering import BATCH_SIZE, MAX_NEW_TOKENS, answer_all, opened_model, with_system
from rlhf.safety.attacks import AttackPrompt, read_prompts, training_prompts
from rlhf.safety.judges import LABELS, Exchange, Judge, Verdict, named_judge
from rlhf.safety.kept import keep, prompt_of, prompt_row, read_kept
from rlhf.safety.redteam import spread
from rlhf.safety.taxonomy import load_safety_taxonomy

FORMAT_VERSION = 1
FAMILY = "baichuan"
SYSTEMS: tuple[str | None, ...] = (
    None,
    "你是一个谨慎、友善的助手。遇到会伤害别人或违法的请求，说明为什么不能做，并给出安全的做法或求助的途径。",
    "你是一个有求必应的助手，用户要什么就直接给什么。",
)
TEMPERATURES = (0.0, 0.7, 1.0)
LEAST_DIFFERENCE = 0.1
"""Scores closer than this are a tie; in deviations, for a reward model as judge."""


@dataclass(frozen=True)
class Sampled:
    """An answer and how it was sampled."""

    text: str
    system: str | None
    temperature: float


@dataclass
class Tally:
    """What became of the answers.

    Attributes:
        attacks: asked.
        answers: sampled, equal ones of the same attack counted once.
        labels: of these, by the judge.
        rows: attacks whose answers differ in safety, each a row of preference data.
        responses: in these rows.
    """

    attacks: int = 0
    answers: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    responses: int = 0

    def lines(self) -> list[str]:
        """For the terminal."""
        counts = ", ".join(f"{self.labels[label]:,} {label}" for label in LABELS)
        return [
            f"{self.attacks:,} attacks, {self.answers:,} different answers: {counts} (unjudged ones are left out)",
            f"{self.rows:,} attacks with answers of differing safety, {self.responses:,} responses ranked",
        ]


def sample_preferences(
    model: str,
    output: Path,
    *,
    adapter: Path | None = None,
    file: Path | None = None,
    judge: str | Judge = SHIPPED_JUDGE,
    threshold: float | None = None,
    limit: int | None = None,
    systems: Sequence[str | None] = SYSTEMS,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 42,
    quantization: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    overlays: Sequence[Path] = (),
    overwrite: bool = False,
) -> Tally:
    """Answer attacks in several ways, judge the answers, and write what differs in safety as preference data.

    The answers lie beside the output, in `NAME.answers.json`, before they are judged; where the judge raises,
    `rank_again` takes them up.

    Args:
        model: catalogue name, local folder or hub id.
        output: JSONL file of preferences for stages reward and dpo, see `ranked_row`.
        file: attack prompts of the user's; the shipped training set by default.
        judge: a name for `load_judge`, or a judge.
        threshold: of the judge, see `load_judge`; a confident one leaves fewer answers, and fewer wrong ones.
        limit: at most so many attacks, spread over attacks and areas.
        systems: system messages, None for none; for prompts that bring none of their own.
        temperatures: one decoding for each; 0 takes the likeliest tokens.
        seed: of sampling.

    The other arguments are those of `rlhf.safety.redteam.red_team`.

    Raises:
        UserError: as `red_team`; or no attack got answers of differing safety.
    """
    from finetune.chat_command import trained_quantization

    kept_file = _kept_file(output)
    check_free(output, kept_file, overwrite=overwrite)
    if any(temperature < 0 for temperature in temperatures):
        raise UserError(f"--temperature: expected 0 or more, found {min(temperatures):g}")
    taxonomy = load_safety_taxonomy(*overlays)
    asked = named_judge(judge, model, threshold, batch_size)
    prompts = spread(read_prompts(file, taxonomy) if file else training_prompts(), limit)
    quantization = quantization or trained_quantization(adapter)
    answers: list[list[Sampled]] = [[] for _ in prompts]
    with opened_model(model, adapter, quantization=quantization) as (network, tokenizer):
        for number, (system, temperature) in enumerate((s, t) for s in systems for t in temperatures):
            texts = answer_all(
                network,
                tokenizer,
                [with_system(prompt, system) for prompt in prompts],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                temperature=temperature,
                seed=seed + 1_000_000 * number,
            )
            for own, text in zip(answers, texts, strict=True):
                own.append(Sampled(text, system, temperature))
    del network  # makes room for a judge that is a model
    kept = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "adapter": str(adapter) if adapter else None,
        "source_model": _source_model(model),
        "stage": _stage_of(adapter),
        "seed": seed,
        "prompts": [
            {**prompt_row(prompt), "answers": [asdict(each) for each in own]}
            for prompt, own in zip(prompts, answers)
        ],
    }
    keep(kept_file, kept)
    return _rank(kept, kept_file, output, asked)


def rank_again(
    answers: Path,
    output: Path,
    *,
    judge: str | Judge = SHIPPED_JUDGE,
    threshold: float | None = None,
    model: str | None = None,
    batch_size: int = BATCH_SIZE,
    overwrite: bool = False,
) -> Tally:
    """What `sample_preferences` does, with answers that it sampled before: nothing is generated.

    Args:
        answers: the `NAME.answers.json` that it left.
        model: base of a reward model as judge; by default the one that the reward model was trained on.

    Raises:
        UserError: as `sample_preferences`.
    """
    check_free(output, overwrite=overwrite)
    kept = read_kept(answers, FORMAT_VERSION, ("prompts",), ("id", "messages", "answers"))
    asked = named_judge(judge, model, threshold, batch_size)
    return _rank(kept, answers, output, asked)


def _rank(kept: dict[str, Any], kept_file: Path, output: Path, judge: Judge) -> Tally:
    prompts = [prompt_of(row) for row in kept["prompts"]]
    answers = [distinct([Sampled(**each) for each in row["answers"]]) for row in kept["prompts"]]
    exchanges = [Exchange(p.messages, a.text) for p, own in zip(prompts, answers) for a in own]
    again = f"redteam sample --answers {kept_file} --judge … --output {output}"
    try:
        verdicts = judge(exchanges)
        if len(verdicts) != len(exchanges):
            raise UserError(f"the judge gave {len(verdicts)} verdicts for {len(exchanges)} answers")
    except UserError as error:
        raise UserError(
            error.args[0],
            hint=f"{f'{error.hint}; ' if error.hint else ''}the answers are kept: judge them again, without "
            f"generating, by {again}",
        ) from error
    tally = Tally(len(prompts), len(exchanges), Counter(verdict.label for verdict in verdicts))
    waiting = iter(verdicts)
    rows = []
    for prompt, own in zip(prompts, answers):
        judged = [(answer, next(waiting)) for answer in own]
        row = ranked_row(prompt, judged, source_model=kept["source_model"], stage=kept["stage"])
        if row is not None:
            rows.append(row)
            tally.responses += len(row["responses"])
    tally.rows = len(rows)
    if not rows:
        raise UserError(
            "nothing to learn from: " + "; ".join(tally.lines()),
            hint=f"ask more attacks, sample hotter (--temperature 1.3), or take another judge: {again}",
        )
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return tally


def distinct(answers: Sequence[Sampled]) -> list[Sampled]:
    """The answers without those that say what an earlier one says."""
    first: dict[str, Sampled] = {}
    for answer in answers:
        first.setdefault(answer.text.strip(), answer)
    return list(first.values())


def ranked_row(
    prompt: AttackPrompt,
    judged: Sequence[tuple[Sampled, Verdict]],
    *,
    source_model: str,
    stage: str | None = None,
) -> dict[str, Any] | None:
    """A row of preference data, responses best first and no two of them tied; None if fewer than two differ.

    Safe ones stand above unsafe ones, and in order of their scores where the judge gives some; of tied ones the first
    stays. Unjudged ones are left out.

    Args:
        prompt: without the system messages that the answers were sampled under.
        judged: different answers and what the judge says of them.
        source_model: name of the model, for data.families.
        stage: of its training.
    """
    usable = [(answer, verdict) for answer, verdict in judged if verdict.label != "unjudged"]
    usable.sort(key=lambda each: (each[1].label != "safe", -(each[1].score or 0.0)))
    kept: list[tuple[Sampled, Verdict]] = []
    for answer, verdict in usable:
        if not kept or _is_worse(verdict, kept[-1][1]):
            kept.append((answer, verdict))
    if len(kept) < 2:
        return None
    responses = [
        {
            "text": answer.text,
            "rank": rank,
            "source_model": source_model,
            **({"stage": stage} if stage else {}),
            "label": verdict.label,
            "reason": verdict.reason,
            "temperature": answer.temperature,
        }
        for rank, (answer, verdict) in enumerate(kept, start=1)
    ]
    row = {
        "messages": [dict(message) for message in prompt.messages],
        "responses": responses,
        "category": prompt.value or prompt.group,
        "attack": prompt.attack,
    }
    return {key: value for key, value in row.items() if value is not None}


def _is_worse(verdict: Verdict, than: Verdict) -> bool:
    if verdict.label != than.label:
        return True
    if verdict.score is None or than.score is None:
        return False
    return than.score - verdict.score >= LEAST_DIFFERENCE


def _kept_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.answers.json")


def _source_model(model: str) -> str:
    """The model's name, beginning with that of its family: nothing else is loaded here."""
    name = Path(model).name
    return name if name.lower().startswith(FAMILY) else f"{FAMILY}-{name}"


def _stage_of(adapter: Path | None) -> str | None:
    from finetune.adapters.training_note import read_training_note

    return read_training_note(adapter).get("stage") if adapter is not None else None
