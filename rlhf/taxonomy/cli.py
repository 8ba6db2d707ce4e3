"""`finetune taxonomy …`: names and options. What is done is done elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli_options import AdapterFolder, Overwrite, command_group, with_options
from finetune.errors import UserError
from finetune.files import check_free

if TYPE_CHECKING:
    from rlhf.taxonomy.classifier import Prediction
    from rlhf.taxonomy.reading import PromptFile
    from rlhf.taxonomy.tree import Taxonomy

app = command_group(
    "taxonomy",
    "What prompts ask: the three-tier taxonomy, coverage of data, balanced samples.",
    no_args_is_help=True,
)


class SampleMethod(StrEnum):
    """How the size of a sample is shared among categories."""

    quota = "quota"
    temperature = "temperature"


File = Annotated[str, typer.Argument(metavar="FILE", help="Data file, folder, pattern or hub data set.")]
Overlays = Annotated[
    list[Path] | None,
    typer.Option("--overlay", metavar="YAML", help="Categories of your own; may be repeated."),
]
Labelled = Annotated[
    Path | None,
    typer.Option(metavar="JSONL", help="More prompts to learn from, with a column `category`."),
]
Threshold = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Confidence below which a category is unknown.")
]
ModelOption = Annotated[
    str | None, typer.Option(metavar="M", help="Let this language model choose among the names instead.")
]


@dataclass(frozen=True)
class Classification:
    """How prompts are classified: by the classifier, or by a language model where one is named."""

    overlay: Overlays = None
    labelled: Labelled = None
    threshold: Threshold = 0.4
    model: ModelOption = None
    adapter: AdapterFolder = None


classifying = with_options(Classification, "how")


@app.command()
def stats(overlay: Overlays = None) -> None:
    """Count the categories, of prompts and of safety."""
    from rlhf.taxonomy.commands import show_stats

    show_stats(overlay or [])


@app.command()
@classifying
def classify(
    file: File,
    output: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="Write prompt and category of each row here.")
    ] = None,
    overwrite: Overwrite = False,
    *,
    how: Classification,
) -> None:
    """Find the category of each prompt."""
    from rlhf.taxonomy.commands import show_classes, write_classes

    if output:
        check_free(output, overwrite=overwrite, others=_read(file, how))
    found, taxonomy, predictions = _classified(file, how)
    if output:
        write_classes(output, found, predictions)
    show_classes(found, predictions, taxonomy)
    if output:
        typer.echo(f"categories: {output}")


@app.command()
@classifying
def evaluate(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Labelled prompts; the shipped held-out set by default."),
    ] = None,
    *,
    how: Classification,
) -> None:
    """Measure the classification of a labelled set."""
    from rlhf.taxonomy.commands import show_evaluation

    show_evaluation(file, how.overlay or [], how.labelled, how.threshold, how.model, how.adapter)


@app.command()
@classifying
def coverage(
    file: File,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="HTML",
            help="Page to write, in place of the last one; by default FILE.coverage.html in the current folder.",
        ),
    ] = None,
    json_output: Annotated[
        Path | None, typer.Option("--json", metavar="JSON", help="Write the numbers here too.")
    ] = None,
    overwrite: Overwrite = False,
    *,
    how: Classification,
) -> None:
    """Show how prompts are spread over the categories, as a table and as a page, whose path is printed last."""
    from rlhf.taxonomy.commands import coverage_page, show_coverage
    from rlhf.taxonomy.page import MARK

    page, read = output or coverage_page(file), _read(file, how)
    check_free(page, overwrite=overwrite, others=read, page=MARK)
    if json_output:
        check_free(json_output, overwrite=overwrite, called="--json", others=[*read, page])
    found, taxonomy, predictions = _classified(file, how)
    show_coverage(found, taxonomy, predictions, page, json_output)
    typer.echo(f"page: {page}")


@app.command()
@classifying
def sample(
    file: File,
    size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows wanted.")],
    output: Annotated[Path, typer.Option(metavar="JSONL", help="Write the rows here, as they are.")],
    seed: Annotated[int, typer.Option(help="Decides which rows of a category are taken.")] = 42,
    method: Annotated[
        SampleMethod, typer.Option(help="Even shares, or rows to the power of --temperature.")
    ] = SampleMethod.quota,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="0 is the same for all categories, 1 leaves the mix; 0.3 by default."
        ),
    ] = None,
    overwrite: Overwrite = False,
    *,
    how: Classification,
) -> None:
    """Draw a sample that is balanced over the categories and free of near-duplicates."""
    from rlhf.taxonomy.commands import write_sample
    from rlhf.taxonomy.sampling import TEMPERATURE

    if temperature is not None and method is not SampleMethod.temperature:
        raise UserError(
            f"--temperature: would have no effect with --method {method.value}",
            hint="leave it out, or pass --method temperature",
        )
    check_free(output, overwrite=overwrite, others=_read(file, how))
    found, _, predictions = _classified(file, how)
    write_sample(
        found,
        predictions,
        output,
        size=size,
        seed=seed,
        method=method.value,
        temperature=TEMPERATURE if temperature is None else temperature,
    )


def _read(file: str, how: Classification) -> list[Path]:
    """The files that a command reads.

    Raises:
        UserError: nothing is there.
    """
    from finetune.data.sources import open_source

    data = [Path(name) for name, _ in open_source(file, called="FILE")]
    return [*data, *(how.overlay or []), *([how.labelled] if how.labelled else [])]


def _classified(file: str, how: Classification) -> tuple[PromptFile, Taxonomy, list[Prediction]]:
    """The prompts of a file, and the category of each."""
    from rlhf.taxonomy.commands import predict
    from rlhf.taxonomy.reading import read_prompts
    from rlhf.taxonomy.tree import load_taxonomy

    taxonomy = load_taxonomy(*(how.overlay or []))
    found = read_prompts(file)
    note = found.note()
    if note:
        typer.echo(f"note: {note}", err=True)
    predictions = predict(found.prompts, taxonomy, how.labelled, how.threshold, how.model, how.adapter)
    return found, taxonomy, predictions
