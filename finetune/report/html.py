"""The report of a run: one HTML file that needs nothing else, neither a network nor another file."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from finetune.files import write_text
from finetune.report import page
from finetune.report.curves import charts
from finetune.report.data_summary import data_section
from finetune.report.headline import cards
from finetune.report.run_folder import RunFolder, read_run
from finetune.report.sections import sections_of
from finetune.report.templating import page_environment, render_page

REPORT_FILE = "report.html"


def build_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run folder, from the files that are in it.

    Needed is `recipe.yaml`; `environment.json`, `metrics.jsonl`, `data_report.json`, `samples.jsonl` and
    `result.json` each add their part where they are there. `result.json` may hold `status` ("finished" or
    "interrupted"), `base`, `adapter` (a path), `trainable_parameters`, `total_parameters`, `train_seconds`,
    `steps`, `tokens`, `eval_loss_before`, `eval_loss_after`, `best_step`, and side by side
    `measured_peak_memory_bytes` and `predicted_peak_memory_bytes`, `seconds_per_step` and
    `predicted_seconds_per_step`.

    Returns:
        The path of the report; an earlier one is replaced in one step.

    Raises:
        UserError: `run_dir` is no run folder.
    """
    run = read_run(Path(run_dir))
    path = run.path / REPORT_FILE
    write_text(path, render(run))
    return path


def render(run: RunFolder) -> str:
    """The report as HTML. All that comes from the run is escaped, and control characters are taken out."""
    import yaml
    from markupsafe import Markup

    script = page_environment().get_template("report.js.j2").render()
    return render_page(
        "report.html.j2",
        run=run,
        subtitle=page.subtitle(run),
        notices=page.notices(run),
        cards=cards(run),
        charts=charts(run),
        metric_rows=page.metric_rows(run.samples),
        samples=page.sample_cards(run.samples),
        data=data_section(run.data),
        sections=sections_of(run.sections),
        settings=page.settings(run.recipe),
        recipe_text=yaml.safe_dump(run.recipe, allow_unicode=True, sort_keys=False),
        environment=page.facts({k: v for k, v in run.environment.items() if k != "earlier"}),
        commands=page.commands(run),
        script=Markup(script),
        # The page may run this script and no other, whatever a sample contains.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
