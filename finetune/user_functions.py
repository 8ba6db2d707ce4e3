"""Functions of the user's own, named ``package.module:function``. Imports nothing heavy itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.recipe.schema import Step


def is_function(name: str) -> bool:
    """Whether a text is of the form ``package.module:function``."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def find_function(name: str, called: str) -> Callable[..., Any]:
    """Import ``package.module:function``; modules in the current directory are found too.

    Args:
        name: of the function.
        called: the option or key that named it, for messages.

    Raises:
        UserError: there is no such module or function.
    """
    if str(Path.cwd()) not in sys.path:  # the installed script, unlike python -m, does not look there
        sys.path.insert(0, str(Path.cwd()))
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise UserError(
            f"{called} {name}: {module_name} cannot be imported: {type(error).__name__}: {error}",
            hint=f"modules are looked for in {Path.cwd()} and in this Python",
        ) from error
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    if function is not None:
        raise UserError(
            f"{called} {name}: {function_name} is no function but {type(function).__name__}",
            hint=f"name a function of {module_name}",
        )
    known = [each for each, value in vars(module).items() if callable(value)]
    near = get_close_matches(function_name, known, n=1)
    raise UserError(
        f"{called} {name}: {module_name} has no function {function_name}",
        hint=f"did you mean {module_name}:{near[0]}?" if near else "look for a misspelt name",
    )


def check_functions(steps: Iterable[Step]) -> None:
    """Find the functions that recipes name, before anything is loaded or run for any of them.

    Raises:
        UserError: see `find_function`.
    """
    for step in steps:
        for key, name in step.user_functions():
            find_function(name, key)
