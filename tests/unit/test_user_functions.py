"""Functions of the user's: found in the current directory, and missed before anything heavy is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.errors import UserError
from finetune.user_functions import find_function, is_function

ROOT = Path(__file__).resolve().parents[2]


def test_which_paths_are_functions() -> None:
    assert is_function("package.module:function")
    assert not any(map(is_function, ("runs/x/adapter", "C:\\runs\\x", "module:", "a-b:c", "runs/x:y")))


def test_modules_of_the_current_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "found_here.py").write_text("def twice(x):\n    return 2 * x\n")
    assert find_function("found_here:twice", "--judge")(3) == 6


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("def polite(x): ...", "polit", "ppo.reward MODULE:polit: MODULE has no function polit"),
        ("def polite(x): ...", "polit", "did you mean MODULE:polite?"),
        ("polite = 1", "polite", "ppo.reward MODULE:polite: polite is no function but int"),
        ("def polite(x:", "polite", "MODULE cannot be imported: SyntaxError"),
        ("import no_such_module", "polite", "No module named 'no_such_module'"),
        ("raise SystemExit('run me')", "polite", "MODULE cannot be imported: SystemExit: run me"),
    ],
)
def test_what_is_missing_is_named(
    content: str, name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = f"mine_{abs(hash((content, said)))}"
    (tmp_path / f"{module}.py").write_text(content + "\n")
    with pytest.raises(UserError) as caught:
        find_function(f"{module}:{name}", "ppo.reward")
    assert said.replace("MODULE", module) in str(caught.value)


BEFORE = "recipes/safety_alignment/before.yaml"
PPO = "recipes/ppo_helpful.yaml"


@pytest.mark.parametrize(
    "command",
    [
        ["redteam", "--model", "baichuan2-nano", "--judge", "json:judge"],
        ["redteam", "sample", "--model", "baichuan2-nano", "--output", "p.jsonl", "--judge", "json:judge"],
        ["run", BEFORE, "redteam.judge=json:judge"],
        ["check", BEFORE, "redteam.judge=json:judge"],
        ["run", PPO, "ppo.reward=json:reward"],
        ["check", PPO, "ppo.reward=json:reward"],
        ["run", "PIPELINE"],
        ["check", "PIPELINE"],
    ],
)
def test_misspelt_ones_are_told_before_anything_is_loaded_or_run(command: list[str], tmp_path: Path) -> None:
    """Seconds would depend on the machine: what has not been imported has cost none."""
    for name, key in (("first", "rules"), ("last", "json:judge")):
        recipe = {"stage": "redteam", "model": {"base": "baichuan2-nano"}, "redteam": {"judge": key}}
        text = yaml.safe_dump({**recipe, "output_dir": str(tmp_path / name)})
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "pipeline.yaml").write_text("pipeline: [first.yaml, last.yaml]\n")
    arguments = [str(tmp_path / "pipeline.yaml") if part == "PIPELINE" else part for part in command]
    script = (
        "import sys; sys.orig_argv[1:] = ['-m', 'finetune']\n"
        "from finetune.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: print('CODE', end.code)\n"
        "print('HEAVY', [m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["CODE 2", "HEAVY []"], done.stdout + done.stderr
    assert "json has no function" in done.stderr
    assert not (tmp_path / "first").exists()
