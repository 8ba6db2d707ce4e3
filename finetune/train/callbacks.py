"""What happens beside the training: metrics, the live line, interruption, bad numbers."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from finetune.files import write_text
from finetune.terminal import training_bar
from finetune.train.peak import peak_memory_bytes
from finetune.train.run_folder import RunFolder

if TYPE_CHECKING:
    from finetune.train.trainer import AdapterTrainer

NOT_METRICS = (
    "epoch",
    "eval_model_preparation_time",
    "total_flos",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
)


class MetricsCallback(TrainerCallback):
    """Appends a line to metrics.jsonl and the same to TensorBoard at every logged step and evaluation."""

    def __init__(self, run: RunFolder, *, resumed_step: int = 0) -> None:
        self.run = run
        self.trainer: AdapterTrainer | None = None
        self._writer: Any = None
        self.tokens_per_second = 0.0
        self._start = time.monotonic()
        self._last = (self._start, 0.0)
        self._last_step = resumed_step
        self._step_seconds: list[float] = []
        self._purged_from = resumed_step + 1 if resumed_step else None
        self._tokens_before, self._seconds_before = self._cut(resumed_step)

    def _cut(self, step: int) -> tuple[float, float]:
        """Drop lines past the step that training goes on from; return tokens and seconds until it."""
        path = self.run.metrics
        if not path.is_file():
            return 0.0, 0.0
        kept, tokens, seconds = [], 0.0, 0.0
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # torn by a crash
            if step and record.get("step", 0) <= step:
                kept.append(line)
                tokens = record.get("tokens", tokens)
                seconds = record.get("seconds", seconds)
        if os.environ.get("RANK", "0") == "0":
            write_text(path, "".join(f"{line}\n" for line in kept))
        return tokens, seconds

    @property
    def seconds(self) -> float:
        """Since the run began, evaluation and saving included, interrupted parts up to their last line."""
        return self._seconds_before + time.monotonic() - self._start

    @property
    def seconds_per_step(self) -> float | None:
        """Of an optimiser step, the median over the logged ones of this process; None before the first."""
        return round(statistics.median(self._step_seconds), 4) if self._step_seconds else None

    @property
    def tokens(self) -> float:
        """Tokens trained on, over all processes, interrupted parts included."""
        assert self.trainer is not None
        seen = self.trainer.tokens_seen
        if isinstance(seen, torch.Tensor):
            seen = float(self.trainer.accelerator.reduce(seen.float(), "sum"))
        else:
            seen = seen * self.trainer.accelerator.num_processes
        return self._tokens_before + seen

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = (time.monotonic(), self.tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        record: dict[str, Any] = {"step": state.global_step, "epoch": round(float(state.epoch or 0), 4)}
        measured = {k: v for k, v in (logs or {}).items() if k not in NOT_METRICS and "runtime" not in k}
        record |= {key: value for key, value in measured.items() if not key.endswith("_per_second")}
        if "loss" in record:
            now, tokens = time.monotonic(), self.tokens
            elapsed = max(now - self._last[0], 1e-9)
            self.tokens_per_second = (tokens - self._last[1]) / elapsed
            record["tokens"] = int(tokens)
            record["tokens_per_second"] = round(self.tokens_per_second, 1)
            record["seconds"] = round(self.seconds, 1)
            record["peak_memory_bytes"] = peak_memory_bytes()
            self._last = (now, tokens)
            steps, self._last_step = state.global_step - self._last_step, state.global_step
            if steps:
                self._step_seconds.append(elapsed / steps)
        elif any(key.startswith("eval_") for key in record):
            # Time spent on evaluation is no time spent on tokens.
            self._last = (self._last[0] + (logs or {}).get("eval_runtime", 0.0), self._last[1])
        else:
            return
        if state.is_world_process_zero:
            self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, and its numbers to TensorBoard."""
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.run.path / "tensorboard")
            self._writer = SummaryWriter(folder, purge_step=self._purged_from)  # hides what was cut, too
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                split = "validation" if key.startswith("eval_") else "train"
                self._writer.add_scalar(f"{split}/{key.removeprefix('eval_')}", value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ProgressCallback(TrainerCallback):
    """A live line with loss, tokens per second, time left and memory; plain lines where there is no terminal."""

    def __init__(self, metrics: MetricsCallback) -> None:
        from rich.console import Console

        self.metrics = metrics
        self.console = Console(stderr=True)
        self.live = sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._said = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (self.live and state.is_world_process_zero):
            return
        self._bar, self._task = training_bar(
            self.console, "training", total=state.max_steps, done=state.global_step
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            where = f"step {state.global_step}"
            self.console.print(f"{where:>10}  validation loss {logs['eval_loss']:.4f}", highlight=False)
        elif "loss" in logs:
            memory = peak_memory_bytes() / 2**30
            numbers = (
                f"loss {logs['loss']:.4f}  {self.metrics.tokens_per_second:,.0f} tokens/s  {memory:.1f} GiB"
            )
            if self._bar is not None:
                self._bar.update(self._task, numbers=numbers)
            elif time.monotonic() - self._said > 10 or state.global_step == state.max_steps:
                self._said = time.monotonic()
                self.console.print(f"step {state.global_step}/{state.max_steps}  {numbers}", highlight=False)

    def stop(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()


class InterruptCallback(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) finishes the step, saves and stops; the second stops at once."""

    def __init__(self) -> None:
        self.requested = False  # here or in another process
        self._signalled = False
        self._flags: deque[tuple[torch.Tensor, Any]] = deque()
        self.checkpoint: Path | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptCallback:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not in the main thread: the caller handles signals
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self.requested = self._signalled = True
        print("\nstopping after this step, saving (again to stop at once)", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # the signal reaches processes at different moments: stop at the same step
            self.requested = self._requested_anywhere(args.device)
        if self.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def _requested_anywhere(self, device: torch.device) -> bool:
        """Whether any process had been asked to stop by the step before; this step's answer is under way.

        To wait for it would be to wait for the device.
        """
        flag = torch.full((), int(self._signalled), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        cuda = flag.device.type == "cuda"
        here = torch.empty_like(flag, device="cpu", pin_memory=cuda).copy_(flag, non_blocking=True)
        self._flags.append((here, torch.cuda.current_stream().record_event() if cuda else None))
        if len(self._flags) < 2:
            return False
        before, copied = self._flags.popleft()
        if copied is not None:
            copied.synchronize()
        return bool(before)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # transformers calls this after any stop; only a whole epoch is evaluated.
        whole = abs(state.epoch - round(state.epoch)) < 1e-6
        if control.should_training_stop and self.requested and not whole:
            control.should_save = False
            control.should_evaluate = False


class BaselineCallback(TrainerCallback):
    """Evaluates the base when training is set up and before its first step.

    Not before that: an evaluation on its own has accelerate take the model as prepared, without what keeps
    several processes' gradients together.
    """

    def __init__(self, evaluate: Callable[[], float | None]) -> None:
        self.evaluate = evaluate
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss = self.evaluate()


class AlreadyTrained(Exception):
    """The checkpoint that training was to go on from has all its steps."""


class FiniteCallback(TrainerCallback):
    """Refuses optimiser steps whose loss or gradient is not a number, and one after the last."""

    def __init__(self) -> None:
        self.trainer: AdapterTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # the trainer itself looks after a step only
            raise AlreadyTrained

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.before_optimizer_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.require_finite()
