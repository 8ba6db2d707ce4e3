"""The command line: what each command passes on, what it says, and its exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_stage import RECIPE, call, fake_stage, raise_
from safetensors import SafetensorError

from finetune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Stand in for a module that a command imports."""
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


# --- start-up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [["--help"], ["run", "--help"], ["--version"], ["run", "missing.yaml"], ["taxonomy", "sample", "--help"]],
)
def test_answers_without_heavy_imports(args: list[str]) -> None:
    """What makes --help fast is what it does not import; seconds would depend on the machine."""
    script = (
        "import sys; sys.orig_argv[1:] = ['-m', 'finetune']\n"
        "from finetune.cli import app\n"
        f"try: app({args!r})\n"
        "except SystemExit: pass\n"
        "print('HEAVY', [name for name in ('torch', 'transformers', 'trl', 'peft', 'datasets', 'matplotlib', "
        "'numpy', 'rich', 'sklearn') if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "HEAVY []", result.stdout


def test_module_is_runnable() -> None:
    command = [sys.executable, "-m", "finetune", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    names = ("run", "check", "merge", "chat", "report", "catalog", "doctor", "export", "convert-adapter")
    for name in (*names, "taxonomy"):
        assert f"\n  {name} " in result.stdout


# --- run --------------------------------------------------------------------------------------------


def test_run_passes_everything_on(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stage(recipe: Any, *, resume: bool, overwrite: bool) -> Path:
        calls.append((recipe.train.learning_rate, recipe.seed, resume, overwrite))
        return Path(recipe.output_dir)

    fake_stage(monkeypatch, stage)
    assert call("run", recipe, "train.learning_rate=1e-4", "--resume", "seed=7").exit_code == 0
    assert call("run", recipe, "--overwrite").exit_code == 0
    assert call("run", recipe, "--processes", "1").exit_code == 0
    assert calls == [(1e-4, 7, True, False), (2e-4, 42, False, True), (2e-4, 42, False, False)]


def test_user_error_is_a_message_and_exit_code_2(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stage(monkeypatch, raise_(UserError("data/[bold]x[/bold].jsonl:3: empty", hint="remove [red]it")))
    result = call("run", recipe)
    assert result.exit_code == 2
    assert result.stderr == "error: data/[bold]x[/bold].jsonl:3: empty\n  → remove [red]it\n"
    assert result.stdout == ""


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_debug_shows_the_traceback_from_any_place(
    recipe: str, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    fake_stage(monkeypatch, raise_(UserError("no data")))
    args = ["run", recipe, "seed=1"]
    args.insert(position, "--debug")
    result = call(*args)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: no data\n")


def test_bug_shows_its_traceback_and_exits_with_1(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stage(monkeypatch, raise_(ZeroDivisionError("by zero")))
    result = call("run", recipe)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error: ZeroDivisionError: by zero" in result.stderr
    assert "bug of the toolkit" in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "/mnt/run"),
            "/mnt/run: Read-only file system\n  → write",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device\n  → free some disk"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a", None, "b"),
            "a → b: Permission denied\n  → ",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "out"), "out: Is a directory\n  → name a file"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/x"), "f/x: Not a directory\n  → part of"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "Error while serializing: I/O error: No space left on device (os error 28)\n  → free some disk",
        ),
    ],
)
def test_what_the_system_refuses_exits_with_2(
    recipe: str, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    fake_stage(monkeypatch, raise_(error))
    result = call("run", recipe)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert "Traceback" not in result.stderr
    assert "Traceback" in call("run", recipe, "--debug").stderr


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        OSError(errno.EPERM, "Operation not permitted"),
        SafetensorError("Error while deserializing file: No such file or directory (os error 2)"),
    ],
)
def test_other_errors_of_the_system_are_bugs(
    recipe: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fake_stage(monkeypatch, raise_(error))
    result = call("run", recipe)
    assert result.exit_code == 1
    assert "bug of the toolkit" in result.stderr


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("cause", ["file", "read-only", "denied"])
def test_an_output_dir_that_cannot_be_made_is_found_first(
    recipe: str, monkeypatch: pytest.MonkeyPatch, command: str, cause: str
) -> None:
    folder = Path(recipe).absolute().parent
    output = folder / "new" / "run"
    if cause == "file":
        (folder / "new").write_text("")
        said = f"{folder / 'new'} is a file, not a folder"
    else:  # whoever is root may write everywhere
        flags = os.ST_RDONLY if cause == "read-only" else 0
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((0,) * 8 + (flags, 255)))
        said = f"{folder}: {'Read-only file system' if flags else 'Permission denied'}"
    before = sorted(folder.iterdir())
    result = call(command, recipe, f"output_dir={output}")
    assert result.exit_code == 2, result.output
    assert result.stderr == (
        f"error: output_dir: {output} cannot be written ({said})\n  → choose another output_dir\n"
    )
    assert sorted(folder.iterdir()) == before


def test_interrupt_exits_with_130_and_names_the_checkpoint(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt = KeyboardInterrupt()
    interrupt.checkpoint = Path("runs/recipe/checkpoints/step-7")  # type: ignore[attr-defined]
    fake_stage(monkeypatch, raise_(interrupt))
    result = call("run", recipe)
    assert result.exit_code == 130
    assert (
        result.stderr
        == "stopped: interrupted; saved runs/recipe/checkpoints/step-7, continue with --resume\n"
    )
    fake_stage(monkeypatch, raise_(KeyboardInterrupt()))
    assert call("run", recipe).stderr == "stopped: interrupted\n"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["run"], "Missing argument 'RECIPE'"),
        (["runn", "x"], "No such command 'runn'"),
        (["run", "recipe.yaml", "--resum"], "No such option"),
        (["run", "recipe.yaml", "--processes", "0"], "--processes"),
        (["merge", "--output", "x"], "--adapter"),
        (
            ["merge", "--adapter", "a", "--output", "x", "--format", "gguf"],
            "'--format': 'gguf' is not one of",
        ),
        (["run", "missing.yaml"], "missing.yaml: no such recipe file"),
        (["run", "recipe.yaml", "train.learning_rat=1"], "did you mean train.learning_rate?"),
        (["run", "recipe.yaml", "--resume", "--overwrite"], "exclude each other"),
        (["check", "missing.yaml"], "missing.yaml: no such recipe file"),
    ],
)
def test_wrong_command_lines_exit_with_2(recipe: str, args: list[str], part: str) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert part in result.stderr
    assert "Traceback" not in result.stderr


# --- the other commands -----------------------------------------------------------------------------


def test_check_checks_every_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    fake_module(monkeypatch, "finetune.check", check_all=lambda recipes, device: checked.extend(recipes))
    Path("second.yaml").write_text(RECIPE)
    Path("both.yaml").write_text("pipeline: [recipe.yaml, second.yaml]\n")
    assert call("check", "both.yaml", "seed=2").exit_code == 0
    assert [each.name for each in checked] == ["recipe", "second"]


def test_merge_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def merge_adapter(*args: Any, **options: Any) -> Path:
        calls.append((args, options))
        return Path("merged")

    def merge_summary(folder: Path) -> tuple[list[str], list[list[str]]]:
        return [f"verified {folder}"], [["compared with", "mean KL"], ["base + adapter", "0"]]

    fake_module(
        monkeypatch, "finetune.adapters.merge", merge_adapter=merge_adapter, merge_summary=merge_summary
    )
    result = call("merge", "--adapter", "a", "--output", "merged", "--dtype", "float16")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "compared with   mean KL",
        "base + adapter  0",
        "verified merged",
        "merged model: merged",
    ]
    options = {
        "base": None,
        "force_base": False,
        "weights": None,
        "combine": "linear",
        "density": 0.5,
        "seed": 0,
        "onto": None,
        "format": "baichuan",
        "dtype": "float16",
        "max_shard_size": "5GB",
        "verify": None,
        "progress": True,
    }
    assert calls == [(([Path("a")], Path("merged")), options)]
    several = ["--adapter", "a", "--adapter", "b", "--weights", "0.7,0.3", "--combine", "ties"]
    others = ["--onto", "dequantized", "--format", "llama", "--no-verify", "--force-base"]
    assert call("merge", "--output", "m", *several, *others).exit_code == 0
    (adapters, _), changed = calls[1]
    assert adapters == [Path("a"), Path("b")]
    assert changed == {
        **options,
        "dtype": None,
        "weights": (0.7, 0.3),
        "combine": "ties",
        "onto": "dequantized",
        "format": "llama",
        "verify": False,
        "force_base": True,
    }
    assert call("merge", "--adapter", "a", "--output", "m", "--dtype", "int4").exit_code == 2
    wrong = call("merge", "--output", "m", *several[:4], "--weights", "half")
    assert wrong.exit_code == 2
    assert "--weights: found 'half'" in wrong.stderr


def test_chat_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    fake_module(monkeypatch, "finetune.chat_command", chat=lambda **options: calls.append(options))
    assert (
        call("chat", "--model", "m", "--prompt", "你好", "--greedy", "--max-new-tokens", "5").exit_code == 0
    )
    assert calls == [
        {
            "model": "m",
            "adapter": None,
            "prompt": "你好",
            "system": None,
            "greedy": True,
            "max_new_tokens": 5,
            "temperature": None,
            "top_k": None,
            "top_p": None,
            "repetition_penalty": None,
            "quantization": None,
        }
    ]
    assert call("chat").exit_code == 2


def test_report_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, "finetune.report", build_report=lambda folder: folder / "report.html")
    assert call("report", "runs/x").stdout == "report: runs/x/report.html\n"


def test_catalog_lists_names_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Entry:
        repo_id: str | None
        position_embedding: str = "rope"
        revision: str | None = None
        note: str = ""

    entries = {
        "small": Entry(None, note="built [here]"),
        "baichuan2-7b-chat": Entry("org/name", revision="v1"),
    }
    fake_module(monkeypatch, "finetune.baichuan.catalog", CATALOG=entries)
    header, *rows = call("catalog").stdout.splitlines()
    assert header.split("  ")[0] == "name"
    assert rows[0].startswith("small              rope")
    assert rows[0].endswith("built [here]")
    assert rows[1].split() == ["baichuan2-7b-chat", "rope", "org/name@v1"]


# --- output that nobody reads -----------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="pipes of a POSIX shell")
def test_closed_pipe_is_no_error() -> None:
    script = (
        "import sys; sys.orig_argv[1:] = ['-m', 'finetune']\n"
        "import types; module = types.ModuleType('finetune.report')\n"
        "def build_report(folder):\n"
        "    for _ in range(100_000): print('x' * 80)\n"
        "module.build_report = build_report; sys.modules['finetune.report'] = module\n"
        "from finetune.cli import main; sys.argv[1:] = ['report', 'x']; main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, b"")


def test_broken_pipe_of_a_worker_is_a_bug(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stage(monkeypatch, raise_(BrokenPipeError("worker")))
    assert call("run", recipe).exit_code == 1
