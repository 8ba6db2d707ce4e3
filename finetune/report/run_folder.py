"""Everything that a run folder says about its run, read with tolerance for what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.report.files import read_json, read_jsonl
from finetune.report.formatting import is_number
from finetune.report.samples import Sample, read_samples

Points = list[tuple[float, float]]


@dataclass
class RunFolder:
    """What a run folder holds; a file that is not there leaves its part empty.

    Attributes:
        path: the folder.
        recipe: the effective recipe.
        environment: versions, devices and the like.
        result: the outcome, see `finetune.report.build_report`.
        data: what was found in the data (`data_report.json`).
        metrics: the lines of `metrics.jsonl`, in the order of their steps.
        samples: prompts with their answers.
        sections: what the stage adds, see `finetune.report.sections`.
        unreadable: messages about files that are there but broken.
    """

    path: Path
    recipe: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.path.name)

    @property
    def status(self) -> str:
        """`finished`, `interrupted` or `unfinished` (it runs still, or was ended without a word)."""
        return str(self.result.get("status") or "unfinished")

    def series(self, key: str) -> Points:
        """`(step, value)` of every line that has a finite number under `key`."""
        return [(int(row["step"]), float(row[key])) for row in self.metrics if is_number(row.get(key))]

    def logged_keys(self) -> list[str]:
        """All keys under which some line has a number, in order of appearance."""
        return list(dict.fromkeys(key for row in self.metrics for key in row if is_number(row[key])))


def read_run(run_dir: Path) -> RunFolder:
    """Read the run folder `run_dir`.

    Raises:
        UserError: there is no such folder, or it holds no run (no readable `recipe.yaml`).
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(
            f"{run_dir}: no such folder; expected a run folder",
            hint="give the output_dir of a run, for example runs/qlora_medical",
        )
    run = RunFolder(run_dir, _read_recipe(run_dir))
    run.environment = _tolerant(run, "environment.json", read_json) or {}
    run.result = _tolerant(run, "result.json", read_json) or {}
    run.data = _tolerant(run, "data_report.json", read_json) or {}
    run.sections = _tolerant(run, "sections.json", read_json) or {}
    run.metrics = _in_order(_tolerant(run, "metrics.jsonl", read_jsonl) or [])
    run.samples = _tolerant(run, "samples.jsonl", lambda path: read_samples(path.parent)) or []
    return run


def _read_recipe(run_dir: Path) -> dict[str, Any]:
    import yaml

    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise UserError(
            f"{run_dir}: not a run folder, it has no recipe.yaml",
            hint="give the output_dir of a run, for example runs/qlora_medical",
        )
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML ({error})") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: expected a recipe, found {type(recipe).__name__}")
    return recipe


def _tolerant(run: RunFolder, name: str, read: Any) -> Any:
    path = run.path / name
    if not path.is_file():
        return None
    try:
        return read(path)
    except UserError as error:
        # Half a report is worth more than none: say what is missing and go on.
        run.unreadable.append(str(error))
        return None


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by step; of lines of one kind for one step (a resumed run repeats some) keep the newest."""
    newest: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in rows:
        if is_number(row.get("step")):
            is_evaluation = any(key.startswith("eval_") for key in row)
            newest[int(row["step"]), is_evaluation] = row
    return [newest[key] for key in sorted(newest)]
