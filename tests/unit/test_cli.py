"""The command line: what each command passes on, what it says, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune import doctor, stages
from finetune.cli import app
from finetune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "stage: sft\nmodel: {base: baichuan2-nano}\ndata: {train: train.jsonl}\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A good recipe in a fresh current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv(stages.OUTCOME_VARIABLE, raising=False)
    Path("recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Stand in for a module that a command imports."""
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def fake_stage(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.setattr(stages, "_function", lambda stage: function)


def call(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def raise_(error: BaseException) -> Any:
    def stage(recipe: Any, **_: Any) -> Path:
        raise error

    return stage


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


# --- several processes ------------------------------------------------------------------------------


class FakeLauncher:
    """Stands in for subprocess.Popen: records the command and lets a process tell how it failed."""

    def __init__(self, code: int = 0, outcome: dict[str, Any] | None = None, interrupts: int = 0) -> None:
        self.code, self.outcome, self.interrupts = code, outcome, interrupts
        self.command: list[str] = []

    def __call__(self, command: list[str], env: dict[str, str]) -> FakeLauncher:
        self.command, self.env = command, env
        return self

    def wait(self) -> int:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        if self.outcome:
            Path(self.env[stages.OUTCOME_VARIABLE]).write_text(json.dumps(self.outcome))
        return self.code


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


@pytest.mark.usefixtures("no_gpu")
def test_processes_go_through_accelerate(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = FakeLauncher()
    monkeypatch.setattr(subprocess, "Popen", launcher)
    assert call("run", recipe, "seed=1", "--processes", "2", "--overwrite").exit_code == 0
    assert launcher.command[0] == sys.executable
    assert "from accelerate.commands.launch import main" in launcher.command[2]
    assert launcher.env["ACCELERATE_USE_CPU"] == "true"
    assert launcher.command[launcher.command.index("--num_processes") + 1] == "2"
    assert launcher.command[-5:] == ["finetune", "run", recipe, "seed=1", "--overwrite"]


@pytest.mark.usefixtures("no_gpu")
def test_launched_process_does_not_launch_again(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("launched again"))
    fake_stage(monkeypatch, lambda recipe, **_: ran.append(recipe.name))
    assert call("run", recipe, "--processes", "2").exit_code == 0
    assert ran == ["recipe"]


def test_launched_process_tells_how_it_failed(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome = tmp_path / "outcome.json"
    monkeypatch.setenv(stages.OUTCOME_VARIABLE, str(outcome))
    fake_stage(monkeypatch, raise_(UserError("no data", hint="give some")))
    result = call("run", recipe)
    assert (result.exit_code, result.stderr) == (2, "")
    fake_stage(monkeypatch, raise_(UserError("the second to fail")))
    assert call("run", recipe).exit_code == 2
    assert json.loads(outcome.read_text()) == {
        "exit_code": 2,
        "message": "no data\n  → give some",
        "checkpoint": None,
    }


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("launcher", "code", "part"),
    [
        (FakeLauncher(1, {"exit_code": 2, "message": "no data"}), 2, "error: no data\n"),
        (
            FakeLauncher(1, {"exit_code": 130, "message": "", "checkpoint": "c/step-3"}, 2),
            130,
            "saved c/step-3",
        ),
        (FakeLauncher(1, None, 1), 130, "interrupted"),
        (FakeLauncher(1, {"exit_code": 1, "message": "ValueError"}), 1, "a training process failed"),
    ],
)
def test_failures_of_launched_processes_keep_their_exit_codes(
    recipe: str, monkeypatch: pytest.MonkeyPatch, launcher: FakeLauncher, code: int, part: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", launcher)
    result = call("run", recipe, "--processes", "2")
    assert result.exit_code == code
    assert part in result.stderr


def test_no_more_processes_than_gpus(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    result = call("run", recipe, "--processes", "2")
    assert result.exit_code == 2
    assert "--processes: expected at most 1, the GPUs of this machine, found 2" in result.stderr


# --- the other commands -----------------------------------------------------------------------------


def test_check_checks_every_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    fake_module(monkeypatch, "finetune.check", check=lambda recipe, device: checked.append(recipe.name))
    Path("second.yaml").write_text(RECIPE)
    Path("both.yaml").write_text("pipeline: [recipe.yaml, second.yaml]\n")
    assert call("check", "both.yaml", "seed=2").exit_code == 0
    assert checked == ["recipe", "second"]


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


# --- doctor -----------------------------------------------------------------------------------------


def test_doctor_finds_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    result = call("doctor")
    assert result.exit_code == 0, result.stdout
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["ok", "torch"] for line in lines)
    assert any(line.split() == ["--", "HF_HUB_OFFLINE", "1"] for line in lines)
    assert any(line.split() == ["ok", "TRANSFORMERS_OFFLINE", "0"] for line in lines)


def test_doctor_says_what_is_missing_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": None, "peft": "0.1", "transformers": "6.0"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    findings = {finding.name: finding for finding in doctor.packages()}
    assert findings["torch"].state == "missing"
    assert findings["torch"].advice.startswith("needed for tensors and training: pip install 'torch>=")
    assert findings["peft"].value.startswith("0.1, expected >=")
    assert findings["transformers"].state == "missing"
    assert findings["accelerate"].state == "ok"
    assert call("doctor").exit_code == 2


def test_doctor_knows_every_range_of_the_project() -> None:
    ranges = doctor._requirements()
    assert set(doctor._REQUIRED) <= set(ranges)
    assert all(ranges[name] for name in doctor._REQUIRED)


def test_doctor_notes_what_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    findings = list(doctor.options())
    assert {finding.state for finding in findings} == {"note"}
    assert all(finding.advice.startswith("for ") and "pip install" in finding.advice for finding in findings)


def test_doctor_survives_a_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert [finding.state for finding in doctor.devices()] == ["missing"]


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
