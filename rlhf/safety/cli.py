"""`redteam`: names and options. Imports nothing heavy; what is done is done elsewhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.errors import UserError

app = typer.Typer(
    name="redteam",
    help="Attack a model, judge its answers, measure over-refusal; compare two runs.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Quantization(StrEnum):
    """How the base is held."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"


@app.callback()
def redteam(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Catalogue name, local folder or hub id.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter to put on the model.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Attack prompts of your own (JSONL); shipped by default."),
    ] = None,
    judge: Annotated[str, typer.Option(help="rules, or package.module:function.")] = "rules",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ask at most so many prompts.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write into.")] = Path("runs/redteam"),
    benign: Annotated[bool, typer.Option("--benign/--no-benign", help="Measure over-refusal, too.")] = True,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    overlay: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Extends the safety taxonomy.")
    ] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="How to hold the base, if not as the adapter was trained on it."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts answered at once.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result in the folder.")] = False,
) -> None:
    """Attack a model, judge its answers, measure over-refusal; compare two runs."""
    if context.invoked_subcommand is not None:
        return
    if model is None:
        raise UserError("--model is missing", hint="redteam --model M [--adapter A], or redteam compare A B")
    from rlhf.safety.redteam import REPORT_FILE, red_team

    result = red_team(
        model,
        output,
        adapter=adapter,
        file=file,
        judge=judge,
        limit=limit,
        benign=benign,
        system=system,
        quantization=quantization.value if quantization else None,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        overlays=overlay or [],
        overwrite=overwrite,
    )
    typer.echo("\n".join(summary_lines(result)))
    typer.echo(f"report: {output / REPORT_FILE}")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Folder of the first run.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Folder of the second run.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HTML file; compare.html in B by default.")
    ] = None,
) -> None:
    """Two runs side by side: rates, heat maps, what changed."""
    from rlhf.safety.redteam import compare_runs

    page, lines = compare_runs(before, after, output)
    typer.echo("\n".join(lines))
    typer.echo(f"report: {page}")


@app.command()
def judges(
    judge: Annotated[str, typer.Option(help="rules, or package.module:function.")] = "rules",
) -> None:
    """How far a judge agrees with the answers judged by hand."""
    from rlhf.safety.agreement import labelled_answers, refusal_agreement, safety_agreement
    from rlhf.safety.judges import load_judge

    asked = load_judge(judge)
    parts: dict[str, Any] = {"all answers": labelled_answers()}
    for split in ("development", "held_out"):
        parts[split.replace("_", " ")] = [a for a in labelled_answers() if a.split == split]
    for name, answers in parts.items():
        typer.echo(f"{name}\n{safety_agreement(asked, answers).table()}\n")
    if judge == "rules":
        typer.echo(f"refusals, for over-refusal\n{refusal_agreement(labelled_answers()).table()}")


@app.command()
def stats(
    overlay: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Extends the safety taxonomy.")
    ] = None,
) -> None:
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
