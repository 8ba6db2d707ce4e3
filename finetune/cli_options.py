"""What commands of this and other packages share on the command line: groups, options, sets of options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

ModelName = Annotated[str, typer.Option("--model", help="Catalogue name, local folder or hub id.")]
OptionalModelName = Annotated[
    str | None, typer.Option("--model", help="Catalogue name, local folder or hub id.")
]
AdapterFolder = Annotated[
    Path | None, typer.Option("--adapter", metavar="DIR", help="Adapter to put on the model.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
SystemMessage = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")]
HeldIn = Annotated[
    Literal["none", "int8", "nf4"] | None,
    typer.Option("--quantization", help="How to hold the base, if not as the adapter was trained on it."),
]


def command_group(name: str, help: str, **settings: Any) -> typer.Typer:
    """A group of commands as those of the toolkit are: plain help, -h, errors left to the toolkit."""
    return typer.Typer(
        name=name,
        help=help,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def with_options(kind: type, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a set of options as one argument.

    Args:
        kind: dataclass whose fields, Annotated as a command's parameters are, become options of the command.
        name: parameter of the command that takes an instance of it; the options stand in its place.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        fields = list(inspect.signature(kind).parameters.values())
        taken = [
            each
            for parameter in inspect.signature(command).parameters.values()
            for each in (fields if parameter.name == name else [parameter])
        ]
        hints |= get_type_hints(kind, include_extras=True)

        @functools.wraps(command)
        def called(**given: Any) -> None:
            chosen = {field.name: given.pop(field.name) for field in fields}
            command(**given, **{name: kind(**chosen)})

        del hints[name]
        parameters = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[each.name]) for each in taken
        ]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = hints
        return called

    return decorate
