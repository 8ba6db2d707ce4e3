"""The command line: names, options and exit codes. What is done is done elsewhere.

Exit codes: 0 done; 2 the user can fix it; 130 interrupted; 1 a bug.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from finetune import __version__
from finetune.cli_options import AdapterFolder, HeldIn, ModelName, SystemMessage, command_group
from finetune.command_table import COMMANDS, load_command
from finetune.errors import UserError, refused_by_system

_DEBUG = "--debug"
_UsageError: Any = typer.BadParameter.__bases__[0]  # its home differs between versions of typer


class _Group(TyperGroup):
    """Turns what a command raises into a message and an exit code; takes --debug anywhere.

    Its commands are those below and, imported when they are needed, those of `COMMANDS`.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load_command(cmd_name) if cmd_name in COMMANDS else super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[_DEBUG] = _DEBUG in args[:end]
        return super().parse_args(ctx, [arg for arg in args[:end] if arg != _DEBUG] + args[end:])

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.meta[_DEBUG]
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            error.message = error.message.replace("Value error, ", "")  # typer lets pydantic speak
            raise
        except (typer.Exit, typer.Abort):
            raise
        except UserError as error:
            _say(error.exit_code, str(error), error if debug else None)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            checkpoint = getattr(error, "checkpoint", None)
            saved = f"; saved {checkpoint}, continue with --resume" if checkpoint else ""
            _say(130, f"interrupted{saved}", error if debug else None, checkpoint=checkpoint)
            raise typer.Exit(130) from error
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _reader_left():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(0) from error
            refused = refused_by_system(error)
            if refused is not None:
                _say(refused.exit_code, str(refused), error if debug else None)
                raise typer.Exit(refused.exit_code) from error
            summary = f"{type(error).__name__}: {error}".rstrip(": ")
            _say(
                1,
                f"{summary}\n  → this is a bug of the toolkit; please report it with the lines above",
                error,
            )
            raise typer.Exit(1) from error


def _reader_left() -> bool:
    """Whether it is our output that nobody reads any more (head, less), not a pipe to a worker."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, AttributeError):  # no file behind it; no poll on this system
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _say(code: int, message: str, error: BaseException | None, checkpoint: Path | str | None = None) -> None:
    """Print a failure to stderr as it is, the traceback of `error` first where one is given."""
    from finetune.stages import tell_outcome

    if error is not None:
        traceback.print_exception(error)
    told = tell_outcome(code, message, str(checkpoint) if checkpoint else None)
    if not told:
        label = "error:" if code != 130 else "stopped:"
        print(f"\033[1;31m{label}\033[0m" if sys.stderr.isatty() else label, message, file=sys.stderr)


app = command_group(
    "finetune",
    "Fine-tune Baichuan 2 by recipes: LoRA, QLoRA, P-Tuning, prefix tuning.",
    cls=_Group,
    epilog="Start with: finetune run recipes/qlora_medical.yaml model.base=baichuan2-nano",
    no_args_is_help=True,
)


Dtype = Literal["bfloat16", "float16", "float32"]

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file of a recipe or a pipeline of recipes")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="settings laid over the file, such as train.epochs=1"),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"finetune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show tracebacks of all errors; may stand after the command too.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the output folder.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Train in N processes, one GPU each.", metavar="N")
    ] = None,
) -> None:
    """Run a recipe, or a pipeline of recipes."""
    from finetune.stages import run_recipe

    run_recipe(recipe, overrides or [], resume=resume, overwrite=overwrite, processes=processes)


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="CARD", help="Plan for a card: its name ('RTX 4090') or memory (24GiB)."),
    ] = None,
) -> None:
    """Everything short of training: recipe, data, token statistics, parameters, memory, time."""
    from finetune.recipe import load_pipeline

    recipes = load_pipeline(recipe, overrides or [])
    from finetune.check import check_all

    check_all(recipes, device=device)


@app.command()
def merge(
    adapter: Annotated[
        list[Path], typer.Option(metavar="DIR", help="Adapter folder, such as runs/NAME/adapter; repeatable.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the merged model into.")],
    base: Annotated[str | None, typer.Option(help="Base, if not the one that the adapter names.")] = None,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Merge even if the base may be another one than trained on.")
    ] = False,
    format: Annotated[
        Literal["baichuan", "llama"],
        typer.Option(help="Baichuan's layout, or a stock Llama model (RoPE only)."),
    ] = "baichuan",
    onto: Annotated[
        Literal["original", "dequantized"] | None,
        typer.Option(help="Original weights, or those that training on a quantised base computed with."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision to write, if not the base's own.")] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    weights: Annotated[
        str | None, typer.Option(metavar="W,W", help="Factors of several adapters, such as 0.7,0.3.")
    ] = None,
    combine: Annotated[
        Literal["linear", "ties", "dare_linear", "dare_ties"],
        typer.Option(help="How several adapters are combined."),
    ] = "linear",
    density: Annotated[float, typer.Option(help="Share of values that TIES and DARE keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of DARE's random choice.")] = 0,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Compare with base and adapter; done if memory allows."),
    ] = None,
) -> None:
    """Merge an adapter, or several, into the weights of their base."""
    from finetune.quiet import quiet_libraries

    quiet_libraries()
    from finetune.adapters.combine import parse_weights
    from finetune.adapters.merge import merge_adapter, merge_summary

    folder = merge_adapter(
        adapter,
        output,
        base=base,
        force_base=force_base,
        weights=None if weights is None else parse_weights(weights),
        combine=combine,
        density=density,
        seed=seed,
        onto=onto,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify,
        progress=True,
    )
    lines, table = merge_summary(folder)
    if table:
        from finetune.terminal import print_table

        print_table(table[0], table[1:])
    for line in [*lines, f"merged model: {folder}"]:
        typer.echo(line)


@app.command()
def chat(
    model: ModelName,
    adapter: AdapterFolder = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this once, and end.")] = None,
    system: SystemMessage = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Longest answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Below 1 is steadier, above is wilder.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among so many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Choose among tokens up to this mass.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.01, help="Above 1 repeats less.")] = None,
    quantization: HeldIn = None,
) -> None:
    """Talk with a model: interactive, or one answer with --prompt."""
    from finetune.chat_command import chat as start_chat

    start_chat(
        model=model,
        adapter=adapter,
        prompt=prompt,
        system=system,
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        quantization=quantization,
    )


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder.")]) -> None:
    """Build report.html of a run, again if it is there."""
    from finetune.report import build_report

    typer.echo(f"report: {build_report(run_dir)}")


@app.command()
def catalog() -> None:
    """List the bases that have names."""
    from finetune.baichuan.catalog import CATALOG

    headers = ["name", "positions", "on the hub and ModelScope", "note"]
    rows = []
    for name, entry in CATALOG.items():
        revision = f"@{entry.revision}" if entry.revision else ""
        rows.append([name, entry.position_embedding, f"{entry.repo_id or ''}{revision}", entry.note])
    from finetune.terminal import print_table

    print_table(headers, rows)


@app.command()
def doctor() -> None:
    """Versions, devices, caches, and what is missing for what."""
    from finetune.doctor import diagnose

    if not diagnose():
        raise typer.Exit(UserError.exit_code)


@app.command()
def export(
    model: ModelName,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    format: Annotated[
        Literal["llama", "int8", "nf4"],
        typer.Option(help="A stock Llama model (RoPE only), or quantised by bitsandbytes."),
    ],
    dtype: Annotated[Dtype | None, typer.Option(help="Precision to write, if not the model's own.")] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
) -> None:
    """Write a model for other software to load."""
    from finetune.export import export_model

    done = export_model(
        model,
        output,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        progress=True,
    )
    typer.echo(f"exported model: {done.folder} ({done.summary()})")


@app.command("convert-adapter")
def convert_adapter(
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="LoRA adapter folder.")],
    to: Annotated[
        Literal["packed", "split"], typer.Option(help="LoRA on W_pack, or on q_proj, k_proj and v_proj.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Reduce packed ranks above this one.")
    ] = None,
) -> None:
    """Convert LoRA between W_pack (Baichuan) and q, k, v (Llama)."""
    from finetune.adapters import convert_adapter as convert

    done = convert(adapter, output, to=to, rank=rank)
    typer.echo(f"converted adapter: {done.folder} ({done.summary()})")
    if to == "split":
        typer.echo("It fits the base as exported with `finetune export --format llama`.")


def main() -> None:
    """Entry point of `finetune` and `python -m finetune`."""
    app(prog_name="finetune")
