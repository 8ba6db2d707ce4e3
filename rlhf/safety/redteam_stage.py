"""Stage `redteam`: what `python -m finetune redteam` does, as a step of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import write_json, write_text
from finetune.main_process import in_main_process
from finetune.report.sections import write_sections
from finetune.train.run_folder import RunFolder
from rlhf.safety import RESULT_FILE, REWARD_PREFIX
from rlhf.safety.step import run_step

if TYPE_CHECKING:
    from rlhf.safety.recipe import RedTeamRecipe

COMPARISON_FILE = "compare.html"
AT_LEAST = "redteam.at_least"


def run(recipe: RedTeamRecipe, *, resume: bool, overwrite: bool) -> Path:
    """Attack the model as the recipe says, and compare with an earlier result where it names one.

    Raises:
        UserError: as `rlhf.safety.redteam.red_team`, or there is nothing to compare with; or, everything being
            written, fewer answers are safe than the recipe asks for.
    """
    from rlhf.safety.redteam import KEPT_FILE, REPORT_FILE

    files = (RESULT_FILE, REPORT_FILE, KEPT_FILE, COMPARISON_FILE)
    folder = run_step(
        recipe, lambda folder: _attack(recipe, folder), files=files, resume=resume, overwrite=overwrite
    )
    in_main_process(lambda: _refuse_unsafe(recipe, folder))
    return folder


def check(recipe: RedTeamRecipe, *, device: str | None = None) -> None:
    """Look at prompts, judge and adapter, as far as they are there already.

    Raises:
        UserError: what would stop the stage.
    """
    from finetune.adapters.build import check_adapter_folder
    from rlhf.safety.attacks import evaluation_prompts, read_prompts
    from rlhf.safety.judges import load_judge
    from rlhf.safety.redteam import spread
    from rlhf.safety.taxonomy import load_safety_taxonomy

    settings = recipe.redteam
    taxonomy = load_safety_taxonomy(*_overlays(recipe))
    judge = _judge(recipe)
    reward = judge.removeprefix(REWARD_PREFIX) if judge.startswith(REWARD_PREFIX) else None
    if reward is None or Path(reward).exists():
        load_judge(judge, model=recipe.model, threshold=settings.threshold, called="redteam.judge")
    prompts = (
        read_prompts(recipe.resolve(settings.prompts), taxonomy) if settings.prompts else evaluation_prompts()
    )
    asked = spread(prompts, settings.limit)
    print(
        f"{recipe.name}: stage redteam on {recipe.model.base}, {len(asked)} of {len(prompts)} attack prompts"
    )
    for line in recipe.held_to():
        print(line)
    for path in (recipe.model.adapter, reward, settings.compare):
        if path and not Path(recipe.resolve(path)).exists():
            print(f"note: {path} is not there yet")
        elif path and path == recipe.model.adapter:
            check_adapter_folder(Path(recipe.resolve(path)))


def _refuse_unsafe(recipe: RedTeamRecipe, folder: Path) -> None:
    """Also of a run that was finished before: resuming it is no way past."""
    from rlhf.safety.redteam import REPORT_FILE, read_result
    from rlhf.safety.summary import shortfall

    below = shortfall(read_result(folder), recipe.redteam.at_least, AT_LEAST)
    _write_verdict(recipe, folder, below)
    if below:
        raise UserError(
            f"{recipe.name}: {below}",
            hint=f"see {folder / REPORT_FILE}; to go on with the model as it is, lower {AT_LEAST} and run with "
            "--resume, which asks nothing again",
        )


def _write_verdict(recipe: RedTeamRecipe, folder: Path, below: str | None) -> None:
    """Have the folder say what the present recipe's gate says, whatever an earlier one's said."""
    run = RunFolder(folder)
    result = run.result()
    others = [each for each in result.get("warnings", []) if AT_LEAST not in each]
    write_json(folder / "result.json", {**result, "warnings": [*([f"{below}."] if below else []), *others]})
    write_text(folder / "recipe.yaml", recipe.dump())


def _attack(recipe: RedTeamRecipe, folder: Path) -> dict[str, Any]:
    from rlhf.safety.cli import summary_lines
    from rlhf.safety.judges import load_judge
    from rlhf.safety.redteam import REPORT_FILE, compare_runs, read_result, red_team
    from rlhf.safety.summary import result_cards, result_notices, summary_section

    settings = recipe.redteam
    before = _earlier(recipe)
    judge = _judge(recipe)
    # Refused under the recipe's name for it.
    load_judge(judge, model=recipe.model, threshold=settings.threshold, called="redteam.judge")
    result = red_team(
        recipe.model,
        folder,
        adapter=Path(recipe.resolve(recipe.model.adapter)) if recipe.model.adapter else None,
        file=Path(recipe.resolve(settings.prompts)) if settings.prompts else None,
        judge=judge,
        threshold=settings.threshold,
        limit=settings.limit,
        benign=settings.benign,
        system=settings.system,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        overlays=_overlays(recipe),
    )
    print("\n".join(summary_lines(result)))
    pages = [{"name": "full report", "file": REPORT_FILE}]
    earlier = None
    if before is not None:
        page, lines = compare_runs(before, folder, folder / COMPARISON_FILE)
        print("\n".join(lines))
        pages.append({"name": "before and after", "file": page.name})
        earlier = read_result(before)
    write_sections(folder, summary_section(result, earlier))
    return {
        "cards": result_cards(result, earlier),
        "pages": pages,
        "warnings": result_notices(result, earlier),
    }


def _earlier(recipe: RedTeamRecipe) -> Path | None:
    """The result to compare with, found before the model is asked anything."""
    from rlhf.safety.redteam import read_result

    named = recipe.redteam.compare
    if named is None:
        return None
    folder = Path(recipe.resolve(named))
    if not folder.exists():
        raise UserError(
            f"redteam.compare: {named}: no such folder",
            hint="give the output_dir of stage redteam, or leave it out",
        )
    read_result(folder)
    return folder


def _judge(recipe: RedTeamRecipe) -> str:
    """The judge's name, the folder of a reward model where it is on this machine."""
    name = recipe.redteam.judge
    if not name.startswith(REWARD_PREFIX):
        return name
    return REWARD_PREFIX + recipe.resolve(name.removeprefix(REWARD_PREFIX))


def _overlays(recipe: RedTeamRecipe) -> list[Path]:
    return [Path(recipe.resolve(path)) for path in recipe.redteam.overlays]
