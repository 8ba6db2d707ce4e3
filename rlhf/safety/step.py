"""A step of a pipeline that trains nothing: its folder has what it made, whole, or is free."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import write_json
from finetune.main_process import in_main_process
from finetune.train.run_folder import RunFolder

if TYPE_CHECKING:
    from finetune.recipe.schema import Step

Work = Callable[[Path], dict[str, Any]]
"""Fills a folder; returns what result.json says beside what is the same for all steps."""


def run_step(recipe: Step, work: Work, *, files: Sequence[str], resume: bool, overwrite: bool) -> Path:
    """Have the work done in the recipe's folder; of several processes the main one does it.

    result.json keeps a digest of what was read, under `inputs`.

    Args:
        recipe: of the step.
        work: what is to be done.
        files: names of what it writes, to be removed where it is done again.
        resume: do again what was interrupted; what is finished stays, unless a file that it read has changed.
        overwrite: replace what the folder holds.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else, or the work cannot be done.
    """
    in_main_process(lambda: _alone(recipe, work, files, resume=resume, overwrite=overwrite))
    return Path(recipe.output_dir)


def _alone(recipe: Step, work: Work, files: Sequence[str], *, resume: bool, overwrite: bool) -> None:
    run = RunFolder(recipe.output_dir)
    run.examine(recipe, resume=resume, overwrite=overwrite)
    inputs, known = _digest_of_inputs(recipe), run.result()
    if resume and known.get("status") == "finished":
        if known.get("inputs", inputs) == inputs:
            print(f"{run.path}: finished already, nothing to resume")
            return
        print(f"{run.path}: what it was made of has changed, so it is made again")
    for name in files:
        (run.path / name).unlink(missing_ok=True)
    run.claim(recipe, resume=False, overwrite=True)
    run.checkpoints.rmdir()  # there are no steps between which it could be interrupted
    start = time.monotonic()
    try:
        result = work(run.path)
    except UserError:
        if not any((run.path / name).exists() for name in files):  # what cost something stays
            run.abandon()
        raise
    seconds = round(time.monotonic() - start, 1)
    write_json(
        run.path / "result.json", {"status": "finished", "seconds": seconds, "inputs": inputs, **result}
    )


def _digest_of_inputs(recipe: Step) -> str:
    """Of what is in the files that the step reads."""
    digest = hashlib.sha256()
    for path in (Path(recipe.resolve(name)) for name in recipe.input_files()):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
