"""Recipes are run: what their `stage` names, in this process, or in several through accelerate."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.stage_table import STAGES
from finetune.train.peak import reset_peak_memory
from finetune.user_functions import check_functions

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe, Step

OUTCOME_VARIABLE = "FINETUNE_OUTCOME"
"""Environment variable that names the file in which a launched process says how it failed."""

# `accelerate launch`, without its own account of a process that has told how it failed.
_LAUNCHER = f"""
import logging, os, sys
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
try:
    main()
except (SignalException, KeyboardInterrupt):
    sys.exit(1)
except ChildFailedError:
    if os.path.exists(os.environ["{OUTCOME_VARIABLE}"]):
        sys.exit(1)
    raise
"""


def run_recipe(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    processes: int | None = None,
) -> list[Path]:
    """Run a recipe, or each recipe of a pipeline in turn, those that are done already left alone.

    Args:
        recipe: a recipe, or the file of a recipe or pipeline.
        overrides: `key=value` texts laid over the file.
        resume: continue an interrupted run from its last checkpoint.
        overwrite: replace the run that the output folder holds.
        processes: how many processes train together (data parallel), each with its own device.
            None or 1 trains in this one. In a process that accelerate or torchrun started, the
            number is already decided and this one is not looked at.

    Returns:
        The run folders, in order.

    Raises:
        UserError: the recipe, the data or the machine does not allow it.
        KeyboardInterrupt: interrupted; attribute `checkpoint` names the saved state if there is one.
    """
    from finetune.recipe.loading import load_pipeline

    if resume and overwrite:
        raise UserError(
            "resume and overwrite exclude each other", hint="--resume continues, --overwrite starts again"
        )
    if isinstance(recipe, (str, Path)):
        recipes = load_pipeline(recipe, overrides)
    elif overrides:
        raise UserError(
            "overrides need a recipe file, and a recipe was given", hint="use load_recipe(path, overrides)"
        )
    else:
        recipes = [recipe]
    if processes is not None and processes > 1 and "LOCAL_RANK" not in os.environ:
        if not isinstance(recipe, (str, Path)):
            raise UserError("several processes need a recipe file that each can read, and a recipe was given")
        flags = ["--resume"] * resume + ["--overwrite"] * overwrite
        launch(["run", str(recipe), *overrides, *flags], processes)
        return [Path(each.output_dir) for each in recipes]
    check_functions(recipes)
    if len(recipes) == 1:
        return [_run_step(recipes[0], resume=resume, overwrite=overwrite)]
    from finetune.pipeline import Pipeline

    pipeline = Pipeline(Path(str(recipe)).stem, recipes)
    return list(pipeline.run(_run_step, resume=resume, overwrite=overwrite))


def _run_step(step: Step, *, resume: bool, overwrite: bool) -> Path:
    """Do one step; what follows in a pipeline needs the memory that its model held, and tells its own peak."""
    reset_peak_memory()
    try:
        return _function(step.stage)(step, resume=resume, overwrite=overwrite)
    finally:
        _release_memory()


def _function(stage: str) -> Any:
    return STAGES[stage].load("run")


def _release_memory() -> None:
    """The next recipe of a pipeline needs the memory that this one's model held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run `python -m finetune ARGUMENTS` in several processes at once, as `accelerate launch` does.

    The first process to fail says how in a file, because the launcher answers every failure with 1.

    Raises:
        UserError: fewer GPUs than processes; or raised in a process.
        KeyboardInterrupt: the processes were interrupted and have ended.
        RuntimeError: a process failed in another way; it has shown its traceback.
    """
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(
            f"command line: --processes: expected at most {gpus}, the GPUs of this machine, found {processes}"
        )
    command = [sys.executable, "-c", _LAUNCHER, "--multi_gpu", "--module"]
    command += ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "finetune", *arguments]
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        outcome = Path(folder) / "outcome.json"
        # Interrupted processes get ten minutes to finish their step and save, in place of 30 seconds.
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600", **os.environ, OUTCOME_VARIABLE: str(outcome)}
        if gpus == 0:  # without this the processes would train apart from each other
            environment["ACCELERATE_USE_CPU"] = "true"
        process = subprocess.Popen(command, env=environment)
        code = _wait(process)
        told = json.loads(outcome.read_text(encoding="utf-8")) if outcome.exists() else {}
    if told.get("exit_code") == UserError.exit_code:
        raise UserError(told["message"])
    if told.get("exit_code") == 130 or code == 130:
        interrupt = KeyboardInterrupt()
        interrupt.checkpoint = told.get("checkpoint")  # type: ignore[attr-defined]
        raise interrupt
    if code != 0:
        first_line = told.get("message", f"exit code {code}").partition("\n")[0]
        raise RuntimeError(f"a training process failed ({first_line}), see above")


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait to the end. Ctrl-C reaches the processes too: they save their state, which takes a while.

    SIGTERM reaches this process alone and is passed on.
    """
    interrupted = False

    def pass_on(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        process.send_signal(signal.SIGTERM)

    try:
        previous = signal.signal(signal.SIGTERM, pass_on)
    except ValueError:  # not in the main thread: the caller handles signals
        previous = None
    try:
        while True:
            try:
                code = process.wait()
                return 130 if interrupted else code
            except KeyboardInterrupt:
                interrupted = True
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def tell_outcome(exit_code: int, message: str, checkpoint: str | None = None) -> bool:
    """In a launched process, tell the launching one how this one failed; the first to tell counts.

    Returns:
        Whether this process was launched, so that the launching one speaks to the user.
    """
    path = os.environ.get(OUTCOME_VARIABLE)
    if not path:
        return False
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump({"exit_code": exit_code, "message": message, "checkpoint": checkpoint}, file)
    except OSError:  # another process was first
        pass
    return True
