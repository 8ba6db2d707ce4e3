"""What a recipe names as data, turned into files and hub data sets, and those into rows."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.data.reading import SUFFIXES, read_rows
from finetune.data.records import BadRow, Location, Row
from finetune.errors import UserError

HUB_PREFIX = "hub:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.\[\]%+:-]+)?")

RowReader = Callable[[], Iterator[Row | BadRow]]


def open_source(
    path: str, resolve: Callable[[str], str] = str, *, called: str = "data.train or data.validation"
) -> list[tuple[str, RowReader]]:
    """The files behind one entry of `data.train` or `data.validation`, each with its reader.

    Args:
        path: a file, a folder (all data files below it), a glob pattern, or a hub data set:
            `hub:OWNER/NAME[/CONFIG][:SPLIT]` or just `OWNER/NAME` where no such folder exists.
        resolve: where a path of the recipe points on this machine (Recipe.resolve).
        called: what the user gave the path as, for messages.

    Returns:
        (name for messages, function that yields the rows), in a fixed order.

    Raises:
        UserError: nothing is there.
    """
    if path.startswith(HUB_PREFIX):
        return [(path, lambda: _read_hub(path, called))]
    place = Path(resolve(path)).expanduser()
    if place.is_dir():
        return _files_in(place, path)
    if place.exists():
        return [(path, lambda: read_rows(place, path))]
    if glob.has_magic(path):
        found = sorted(file for file in glob.glob(str(place), recursive=True) if Path(file).is_file())
        if not found:
            raise UserError(f"{path}: no file fits the pattern", hint=f"patterns count from {Path.cwd()}")
        return [(file, _reader(Path(file), file)) for file in found]
    if _looks_like_hub_id(path):
        return [(path, lambda: _read_hub(HUB_PREFIX + path, called))]
    raise _missing(path, place, called)


def _reader(path: Path, name: str) -> RowReader:
    return lambda: read_rows(path, name)


def _files_in(folder: Path, name: str) -> list[tuple[str, RowReader]]:
    """Every data file below a folder, hidden ones left out."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
    files = [
        file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(
            f"{name}: no data file in this folder", hint=f"expected names in {', '.join(SUFFIXES)}"
        )
    return [
        (shown, _reader(file, shown))
        for file in files
        for shown in [str(Path(name, file.relative_to(folder)))]
    ]


def _looks_like_hub_id(path: str) -> bool:
    """OWNER/NAME, and neither a data file's name nor something below a folder that exists here."""
    first = Path(path).parts[0] if path else ""
    return (
        _HUB_ID.fullmatch(path) is not None
        and Path(path).suffix.lower() not in SUFFIXES
        and first not in (".", "..")
        and not Path(first).exists()
    )


def _missing(path: str, place: Path, called: str) -> UserError:
    beside = [str(file) for file in Path(path).parent.glob("*")] if Path(path).parent.is_dir() else []
    near = difflib.get_close_matches(path, beside, n=1)
    message = f"{path}: no such file, folder or hub data set (looked in {place.absolute().parent})"
    return UserError(message, hint=f"did you mean {near[0]}?" if near else f"correct {called}")


def _read_hub(path: str, called: str) -> Iterator[Row]:
    """Rows of a hub data set, downloaded or from the local cache.

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    from datasets import load_dataset

    identity, _, split = path.removeprefix(HUB_PREFIX).partition(":")
    owner, name, *config = identity.split("/")[:3] if "/" in identity else ("", identity)
    identity = f"{owner}/{name}" if owner else name
    try:
        dataset = load_dataset(identity, *config, split=split or "train")
    except Exception as error:  # the libraries below raise whatever they like: network, HTTP, format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: the data set cannot be loaded from the hub: {reason}",
            hint=f"`hf download --repo-type dataset {identity} --local-dir DIR` fetches it where there is a "
            f"network; then give DIR (or one of the files in it) as {called}. "
            "hub:OWNER/NAME/CONFIG:SPLIT names a configuration and a split",
        ) from error
    for number, columns in enumerate(dataset, start=1):
        yield Row(dict(columns), Location(path, number, "row"))
