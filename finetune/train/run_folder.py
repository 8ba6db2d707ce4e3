"""The run folder: who may write into it, where things lie, and what is enough to resume."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune.errors import UserError
from finetune.files import check_writable, write_text
from finetune.sizes import byte_size

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe, Step

TRAINABLE_FILE = "trainable.safetensors"
OURS = (
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "data_report.json",
    "result.json",
    "samples.jsonl",
    "rollouts.jsonl",
    "sections.json",
    "evaluation.json",
    "report.html",
    "tensorboard",
    "checkpoints",
    "initial_adapter",
    ".adapter",
    "adapter",
)
MAY_CHANGE_ON_RESUME = (
    "name",
    "output_dir",
    "train.epochs",
    "train.max_steps",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.eval_batch_size",
    "report.samples",
    "report.max_new_tokens",
    "data.workers",
)


class RunFolder:
    """Paths of one run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of ``step-N`` folders, each complete."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result."""
        return self.path / "adapter"

    @property
    def initial_adapter(self) -> Path:
        """The adapter before training, kept for initialisations that change the base."""
        return self.path / "initial_adapter"

    @property
    def metrics(self) -> Path:
        """A line a logged step."""
        return self.path / "metrics.jsonl"

    def examine(self, recipe: Step, *, resume: bool, overwrite: bool) -> Path | None:
        """Whether this recipe may have the folder; nothing is touched.

        Returns:
            The checkpoint to resume from, if there is one.

        Raises:
            UserError: if the folder holds another run, or something that is no run, or cannot be resumed.
        """
        if not (self.refuse_taken(resume=resume, overwrite=overwrite) and resume):
            return None
        self._refuse_changed_recipe(recipe)
        return self.last_checkpoint()

    def refuse_taken(self, *, resume: bool, overwrite: bool) -> bool:
        """The part of `examine` that needs no recipe.

        Returns:
            Whether the folder holds a run, which may be resumed or overwritten.

        Raises:
            UserError: if the folder holds another run, or something that is no run, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir: {self.path} is a file", hint="choose another output_dir")
        check_writable(self.path, called="output_dir")
        holds_run = (self.path / "recipe.yaml").is_file()
        if not holds_run and self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(
                f"output_dir: {self.path} is not empty and holds no run of this toolkit",
                hint="choose another output_dir; nothing was touched",
            )
        if resume and not holds_run:
            raise UserError(
                f"output_dir: {self.path} holds no run that could be resumed",
                hint="look for a misspelt output_dir, or leave --resume out to start anew",
            )
        if holds_run and not resume and not overwrite:
            raise UserError(
                f"output_dir: {self.path} holds a run already",
                hint="continue it with --resume, replace it with --overwrite, or set another output_dir",
            )
        return holds_run

    def claim(self, recipe: Step, *, resume: bool, overwrite: bool) -> Path | None:
        """Take the folder for this recipe, if `examine` allows it; an overwritten run is gone after."""
        checkpoint = self.examine(recipe, resume=resume, overwrite=overwrite)
        if not resume:
            self.clear()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "recipe.yaml", recipe.dump())
        return checkpoint

    @contextlib.contextmanager
    def writing(self, needed: int) -> Iterator[Path]:
        """The folder that a checkpoint is written into, to be renamed when it is whole; removed if that fails.

        Args:
            needed: bytes of the checkpoint, about.

        Raises:
            UserError: it failed, and the disk had less than that free. torch and safetensors each raise an
                error of their own then, so it is not told by its kind.
        """
        staging = self.checkpoints / ".writing"
        try:
            yield staging
        except Exception as error:
            free = shutil.disk_usage(self.path).free
            shutil.rmtree(staging, ignore_errors=True)
            if free >= needed:
                raise
            kept = any(self.checkpoints.glob("step-*"))
            raise UserError(
                f"no space left in {self.path}: a checkpoint takes {byte_size(needed)}, {byte_size(free)} were free",
                hint=f"free some, then {'continue with --resume' if kept else 'start again'}; "
                "train.keep_checkpoints says how many are kept",
            ) from error

    def abandon(self) -> None:
        """Leave nothing behind of a run that has taken no step; what is not ours stays."""
        if not any(self.checkpoints.glob("step-*")):
            self.clear()
            with contextlib.suppress(OSError):  # not empty
                self.path.rmdir()

    def clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        unfinished = [path.name for path in self.path.glob(".adapter.*")]  # of a killed save
        for name in (*OURS, *unfinished):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _refuse_changed_recipe(self, recipe: Step) -> None:
        before = _flatten(self._saved_recipe())
        now = _flatten(yaml.safe_load(recipe.dump()))
        changed = sorted(
            key
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key) and key not in {*MAY_CHANGE_ON_RESUME, *recipe.changeable}
        )
        if changed:
            shown = "".join(f"\n  {k}: was {before.get(k)!r}, now {now.get(k)!r}" for k in changed[:8])
            raise UserError(
                f"{self.path}: cannot be resumed with other settings:{shown}",
                hint="restore them, or start again with --overwrite",
            )

    def _saved_recipe(self) -> dict[str, Any]:
        path = self.path / "recipe.yaml"
        try:
            saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            saved = " ".join(str(error).split())
        if not isinstance(saved, dict):
            raise UserError(
                f"{path}: is no recipe any more, so the run cannot be resumed (found {saved!r:.120})",
                hint="restore the file, or start again with --overwrite",
            )
        return saved

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether the run in the folder has all the steps that the recipe, which may have it, asks for."""
        if self.result().get("status") != "finished":
            return False
        saved = self._saved_recipe().get("train") or {}
        return all(saved.get(key) == getattr(recipe.train, key) for key in ("epochs", "max_steps"))

    def batch_size(self) -> dict[str, int] | None:
        """What the run that the folder holds decided for ``train.batch_size: auto``; None if there is none."""
        if not (self.path / "recipe.yaml").is_file():
            return None
        train = self._saved_recipe().get("train") or {}
        keys = ("batch_size", "gradient_accumulation")
        return (
            {key: train[key] for key in keys}
            if all(isinstance(train.get(key), int) for key in keys)
            else None
        )

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, verified.

        Raises:
            UserError: if it has been damaged.
        """
        folders = sorted(self.checkpoints.glob("step-*"), key=step_of)
        if not folders:
            return None
        _check_checkpoint(folders[-1])
        return folders[-1]

    def result(self) -> dict[str, Any]:
        """result.json, empty if there is none yet."""
        path = self.path / "result.json"
        if not path.is_file():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{path}: not valid JSON ({error})", hint="remove it; --resume goes on from the checkpoints"
            ) from error


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name, -1 if it has none."""
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _check_checkpoint(folder: Path) -> None:
    from finetune.baichuan.checkpoints import check_weight_file

    older = sorted(f.name for f in folder.parent.glob("step-*") if f != folder)
    hint = "remove that folder to continue from " + (older[-1] if older else "the beginning")
    state = folder / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{state}: cannot be read, the checkpoint is damaged ({error})", hint=hint) from error
    sharded = any(p.is_dir() or p.name == "pytorch_model_fsdp.bin" for p in folder.iterdir())
    random_states = sorted(folder.glob("rng_state*.pth"))  # one a process
    files = [folder / name for name in (TRAINABLE_FILE, "optimizer.pt", "scheduler.pt")]
    for path in [*files, *(random_states or [folder / "rng_state.pth"])]:
        if path.is_file():
            try:
                check_weight_file(path)
            except UserError as error:
                raise UserError(f"the checkpoint is damaged: {error.args[0]}", hint=hint) from error
        elif not sharded:
            raise UserError(f"{folder}: {path.name} is missing, the checkpoint is damaged", hint=hint)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
