"""Recipes in a row: each goes on from the last, what is done is skipped, and one page links them all."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.files import write_json

if TYPE_CHECKING:
    from finetune.recipe.schema import Step

STATE_FILE = "pipeline.json"


class Pipeline:
    """Steps and what is known of them from earlier attempts.

    A step is done if it was done with the settings that it has now, on the data files that are there now, after
    the same steps. One that was done after other steps than now is done again.

    Args:
        name: of the pipeline, its file's.
        steps: in order.

    Attributes:
        folder: where state and page are: the folder that all steps write below, or runs/NAME.

    Raises:
        UserError: if a step writes where state and page are.
    """

    def __init__(self, name: str, steps: Sequence[Step]) -> None:
        self.name, self.steps = name, list(steps)
        self.folder = _common_folder([step.output_dir for step in steps]) or Path("runs") / name
        for step in steps:
            if self.folder.absolute().is_relative_to(Path(step.output_dir).absolute()):
                raise UserError(
                    f"output_dir: {step.output_dir} of step {step.name} is where the page of the pipeline would be",
                    hint="rename the pipeline's file, or give the step another output_dir",
                )
        self._done: dict[str, dict[str, str]] = {}  # output folder → digests of when it was done
        path = self.folder / STATE_FILE
        if path.is_file():
            try:
                done = json.loads(path.read_text(encoding="utf-8"))["done"]
                self._done = {
                    str(key): {"own": value["own"], "all": value["all"]} for key, value in done.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError):
                print(f"note: {path} cannot be read: no step is taken for done", file=sys.stderr)

    def run(self, run_step: Callable[..., Path], *, resume: bool, overwrite: bool) -> Iterator[Path]:
        """Do each step that is not done, and yield the folder of every one.

        Args:
            run_step: does a step, given it and the two flags.
            resume: a step that was interrupted continues from its checkpoint.
            overwrite: every step is done again, its folder replaced.

        Raises:
            UserError, KeyboardInterrupt: from a step; the steps before it stay done.
        """
        before = ""
        for number, step in enumerate(self.steps, start=1):
            folder = Path(step.output_dir)
            own = _digest(step, [Path(earlier.output_dir) for earlier in self.steps[: number - 1]])
            now = {"own": own, "all": hashlib.sha256(f"{before}{own}".encode()).hexdigest()}
            known = self._done.get(step.output_dir)
            before = now["all"]
            title = f"[{number}/{len(self.steps)}] {step.name}"
            if known == now and folder.is_dir() and not overwrite:
                _say(f"{title}: done already")
                yield folder
                continue
            # Its own settings are those that it was done with: what it went on from has changed.
            stale = known is not None and known["own"] == own and known["all"] != now["all"]
            _say(
                f"{title}: stage {step.stage}{', again, since a step before it has changed' if stale else ''}"
            )
            if self._done.pop(step.output_dir, None) is not None:
                self._save()  # now: whoever is killed within the step saves nothing any more
            try:
                # A step that had not begun when the chain was interrupted begins now.
                goes_on = resume and not stale and (folder / "recipe.yaml").is_file()
                run_step(step, resume=goes_on, overwrite=overwrite or stale)
                self._done[step.output_dir] = now
            finally:
                self._save()
            yield folder

    def _save(self) -> None:
        """Write the state, and the page as far as there is something to show."""
        from finetune.report.pipeline_page import build_pipeline_page

        if not _is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / STATE_FILE, {"name": self.name, "done": self._done})
        build_pipeline_page(self.folder, self.name, self.steps)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_main():
        print(text, file=sys.stderr)


def _digest(step: Step, made: Sequence[Path]) -> str:
    """Of the settings, and of the data files that they name: a file is told by its size and time.

    Args:
        step: whose settings.
        made: folders of the steps before it. What these wrote is told by their own digests.
    """
    files = []
    for name in step.input_files():
        path = Path(step.resolve(name))
        if path.is_file() and not any(path.absolute().is_relative_to(folder.absolute()) for folder in made):
            files.append(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}")
    return hashlib.sha256("\n".join([step.dump(), *files]).encode()).hexdigest()


def _common_folder(outputs: Sequence[str]) -> Path | None:
    """The folder that all outputs are below, if it is theirs alone: not the current one, runs/ or above."""
    parents = {os.path.dirname(os.path.normpath(output)) for output in outputs}
    if len(parents) != 1:
        return None
    folder = Path(parents.pop())
    here = Path.cwd()
    return None if folder in (Path(), Path("runs")) or here.is_relative_to(folder.absolute()) else folder
