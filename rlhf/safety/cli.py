"""`redteam`: names and options. Imports nothing heavy; what is done is done elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli_options import (
    AdapterFolder,
    HeldIn,
    OptionalModelName,
    Overwrite,
    SystemMessage,
    command_group,
    with_options,
)
from finetune.errors import UserError
from rlhf.safety import SHIPPED_JUDGE

app = command_group(
    "redteam",
    "Attack a model, judge its answers, measure over-refusal; compare two runs.",
    invoke_without_command=True,
)

Overlays = Annotated[
    list[Path] | None, typer.Option("--overlay", metavar="FILE", help="Extends the safety taxonomy.")
]
JudgeName = Annotated[
    str,
    typer.Option(
        "--judge",
        help="learned, rules, reward:ADAPTER (a harmlessness reward model of the attacked base; with --answers, of "
        "any base) or package.module:function.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="learned: confidence below which an answer is unjudged, 0.4 by default; reward:ADAPTER: safe above so "
        "many deviations over the mean of held-out responses, 0 by default.",
    ),
]
AtLeast = Annotated[
    float | None,
    typer.Option(
        "--at-least",
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="Exit with 2, everything written, where a smaller share of the answers is safe, such as 0.9.",
    ),
]
Answers = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Judge the answers that an earlier run left, generate none."),
]


@dataclass(frozen=True)
class Asking:
    """Who is asked what."""

    model: OptionalModelName = None
    adapter: AdapterFolder = None
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Attack prompts of your own (JSONL); shipped by default."),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Ask at most so many prompts.")] = None
    overlay: Overlays = None
    quantization: HeldIn = None
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 128
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts answered at once.")] = 16

    def arguments(self) -> dict[str, Any]:
        """For `red_team` and `sample_preferences`, beside the model."""
        return {
            "adapter": self.adapter,
            "file": self.file,
            "limit": self.limit,
            "overlays": self.overlay or [],
            "quantization": self.quantization,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }

    def model_or_refuse(self, usage: str) -> str:
        """The model.

        Raises:
            UserError: none is named.
        """
        if self.model is None:
            raise UserError("--model is missing", hint=usage)
        return self.model

    def refuse_with_answers(self, **others: object) -> None:
        """Refuse options that say how to generate where nothing is generated.

        Raises:
            UserError: naming them.
        """
        own = {
            "adapter": self.adapter,
            "file": self.file,
            "limit": self.limit,
            "quantization": self.quantization,
        }
        given = [f"--{name.replace('_', '-')}" for name, value in (own | others).items() if value]
        if given:
            raise UserError(
                f"--answers: the answers are there, so {', '.join(given)} would have no effect",
                hint="leave out one or the other",
            )


asking = with_options(Asking, "who")


@app.callback()
@asking
def redteam(
    context: typer.Context,
    *,
    who: Asking,
    judge: JudgeName = SHIPPED_JUDGE,
    threshold: Threshold = None,
    at_least: AtLeast = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write into.")] = Path("runs/redteam"),
    benign: Annotated[bool, typer.Option("--benign/--no-benign", help="Measure over-refusal, too.")] = True,
    system: SystemMessage = None,
    answers: Answers = None,
    overwrite: Overwrite = False,
) -> None:
    """Attack a model, judge its answers, measure over-refusal; compare two runs."""
    if context.invoked_subcommand is not None:
        return
    from rlhf.safety.redteam import REPORT_FILE, judge_again, red_team
    from rlhf.safety.summary import shortfall

    if answers is not None:
        who.refuse_with_answers(system=system, no_benign=not benign)
        result = judge_again(
            answers,
            output,
            judge=judge,
            threshold=threshold,
            model=who.model,
            batch_size=who.batch_size,
            overlays=who.overlay or [],
            overwrite=overwrite,
        )
    else:
        result = red_team(
            who.model_or_refuse("redteam --model M [--adapter A], or redteam compare A B"),
            output,
            judge=judge,
            threshold=threshold,
            benign=benign,
            system=system,
            overwrite=overwrite,
            **who.arguments(),
        )
    typer.echo("\n".join(summary_lines(result)))
    typer.echo(f"report: {output / REPORT_FILE}")
    below = shortfall(result, at_least, "--at-least")
    if below:
        raise UserError(f"{output}: {below}", hint=f"see {output / REPORT_FILE}, or ask for less")


@app.command()
@asking
def sample(
    *,
    who: Asking,
    output: Annotated[Path, typer.Option(metavar="JSONL", help="Write the preference data here.")],
    judge: JudgeName = SHIPPED_JUDGE,
    threshold: Threshold = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="System message to answer under; repeatable, '' for none; three by default."
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0, help="One decoding for each; repeatable, 0 is greedy; 0, 0.7 and 1 by default."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 42,
    answers: Answers = None,
    overwrite: Overwrite = False,
) -> None:
    """Answer attacks in several ways and rank the answers by safety: preference data for reward and dpo."""
    from rlhf.safety.supervision import SYSTEMS, TEMPERATURES, rank_again, sample_preferences

    if answers is not None:
        who.refuse_with_answers(system=system, temperature=temperature, overlay=who.overlay)
        tally = rank_again(
            answers,
            output,
            judge=judge,
            threshold=threshold,
            model=who.model,
            batch_size=who.batch_size,
            overwrite=overwrite,
        )
    else:
        tally = sample_preferences(
            who.model_or_refuse("redteam sample --model M [--adapter A] --output JSONL"),
            output,
            judge=judge,
            threshold=threshold,
            systems=[text or None for text in system] if system else SYSTEMS,
            temperatures=temperature or TEMPERATURES,
            seed=seed,
            overwrite=overwrite,
            **who.arguments(),
        )
    typer.echo("\n".join([*tally.lines(), f"preferences: {output}"]))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Folder of the first run.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Folder of the second run.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HTML file; compare.html in B by default.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Two runs side by side: rates, heat maps, what changed."""
    from rlhf.safety.redteam import compare_runs

    page, lines = compare_runs(before, after, output, overwrite=overwrite)
    typer.echo("\n".join(lines))
    typer.echo(f"report: {page}")


@app.command()
def judges(
    judge: JudgeName = SHIPPED_JUDGE,
    threshold: Threshold = None,
    model: OptionalModelName = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answers that you labelled: prompt, answer, label (JSONL)."),
    ] = None,
) -> None:
    """How far a judge agrees with the answers judged by hand."""
    from rlhf.safety.agreement import (
        blind_answers,
        labelled_answers,
        read_answers,
        refusal_agreement,
        safety_agreement,
    )
    from rlhf.safety.judges import load_judge
    from rlhf.safety.learned import SURE, cross_validated, refusals_by_learning

    asked = load_judge(judge, model=model, threshold=threshold)
    if file is not None:
        typer.echo(f"{file}\n{safety_agreement(asked, read_answers(file)).table()}")
        return
    blind = blind_answers()
    typer.echo(
        "blind: written by somebody who saw neither the rules nor the model, nothing learned from them"
    )
    typer.echo(f"{safety_agreement(asked, blind).table()}\n")
    typer.echo(
        f"the same, refusals (for over-refusal)\n{refusal_agreement(refusals_by_learning, blind).table()}\n"
    )
    known = labelled_answers()
    if judge == SHIPPED_JUDGE:
        typer.echo("the others, each judged by a model that did not learn from its prompt")
        asked = cross_validated(sure=SURE if threshold is None else threshold)
    else:
        typer.echo("the others")
    typer.echo(safety_agreement(asked, known).table())


@app.command()
def stats(overlay: Overlays = None) -> None:
    """Counts of attack types, areas, values and prompts."""
    from rlhf.safety.attacks import benign_prompts, evaluation_prompts, templates, training_prompts
    from rlhf.safety.taxonomy import load_safety_taxonomy

    taxonomy = load_safety_taxonomy(*(overlay or []))
    wordings = {
        split: sum(len(by[split]) for by in templates().values()) for split in ("train", "evaluation")
    }
    reach = {split: count * len(taxonomy.values) for split, count in wordings.items()}
    typer.echo(
        f"{len(taxonomy.attacks)} attack types, {len(taxonomy.areas)} areas, {len(taxonomy.values)} values"
    )
    for area in taxonomy.areas:
        typer.echo(f"  {area.id}  {area.zh}  {area.en}: {len(area.values)}")
    typer.echo(f"templates: {wordings['train']} for training, {wordings['evaluation']} for evaluation")
    typer.echo(f"generated prompts: up to {reach['train']} and {reach['evaluation']}")
    typer.echo(f"fixed prompts: {len(training_prompts())} and {len(evaluation_prompts())}")
    typer.echo(f"harmless prompts: {len(benign_prompts('train'))} and {len(benign_prompts('evaluation'))}")


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The headline numbers of a result, for the terminal."""
    from rlhf.safety.page import interval

    overall, benign = result["summary"]["overall"], result["summary"]["benign"]
    share = overall["safe_rate"]
    lines = [
        f"safe      {100 * share['rate']:5.1f} % of {interval(share)}",
        f"unsafe    {overall['unsafe']}, unjudged {overall['unjudged']} (both count as not safe)",
    ]
    for name, counts in result["summary"]["attacks"].items():
        rate = counts["safe_rate"]
        lines.append(
            f"  {result['names']['attacks'].get(name, name):32} {100 * rate['rate']:5.1f} % of {interval(rate)}"
        )
    if benign:
        refusals = benign["refusal_rate"]
        lines.append(f"over-refusal {100 * refusals['rate']:.1f} % of {interval(refusals)}")
    return lines
