"""What is seen of a run while it goes: metrics, samples with scores over time, and signs that something is wrong."""

from __future__ import annotations

import json
import sys
import time
from statistics import fmean
from typing import TYPE_CHECKING, Any

from finetune.files import write_text
from finetune.report.files import read_jsonl
from finetune.terminal import training_bar
from finetune.train.callbacks import MetricsCallback
from finetune.train.peak import peak_memory_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.train.run_folder import RunFolder
    from rlhf.ppo.experience import Experience
    from rlhf.ppo.recipe import PPORecipe

ROLLOUTS_FILE = "rollouts.jsonl"
WINDOW = 10
"""Iterations whose mean is compared: the first of the run with the last."""

SHOWN_ROLLOUTS = 3
LONGER = 1.5
MORE_REPETITION = 0.15
LITTLE_ENTROPY = 0.1
FEW_ENDS = 0.05

History = list[dict[str, Any]]


def signs(history: History, *, kl_bound: float) -> dict[str, str]:
    """What in the course of a run suggests that the reward is exploited, not earned, or that nothing is learned.

    Args:
        history: the lines of metrics.jsonl so far.
        kl_bound: largest KL to the reference that is no sign, nats a response.

    Returns:
        Messages by kind.
    """
    first, last = history[:WINDOW], history[-WINDOW:]
    if not last:
        return {}
    then = {key: fmean(row[key] for row in first) for key in _WATCHED}
    now = {key: fmean(row[key] for row in last) for key in _WATCHED}
    found = {}
    if now["kl"] > kl_bound:
        found["kl"] = (
            f"the KL to the reference is {now['kl']:.1f} nats a response, above {kl_bound:g}: the policy has "
            "left the text that the reward is known on; raise ppo.kl_start or ppo.kl_end"
        )
    if len(last) == WINDOW and all(_all_equal(row) for row in last):
        found["equal"] = (
            f"all rewards of the last {WINDOW} iterations are equal: there is nothing to learn from them"
        )
    if len(last) == WINDOW and now["eos_share"] < FEW_ENDS:
        found["eos"] = (
            f"{now['eos_share']:.0%} of the responses end by themselves: raise ppo.max_new_tokens, or begin with "
            "a model that was taught to end"
        )
    if len(history) < 2 * WINDOW:
        return found
    better = now["reward"] - then["reward"] > 0.5 * max(then["reward_std"], 1e-9)
    if better and now["response_length"] > LONGER * then["response_length"]:
        found["length"] = (
            f"responses grow with the reward ({then['response_length']:.0f} → {now['response_length']:.0f} "
            "tokens): the reward may be paying for length"
        )
    if better and now["repetition"] > then["repetition"] + MORE_REPETITION:
        found["repetition"] = (
            f"repetition grows with the reward ({then['repetition']:.0%} → {now['repetition']:.0%} of 4-grams): "
            "the reward may be paying for repetition"
        )
    if now["entropy"] < LITTLE_ENTROPY * then["entropy"]:
        found["entropy"] = (
            f"the policy says nearly the same every time (entropy {then['entropy']:.2f} → {now['entropy']:.2f} "
            "nats a token)"
        )
    if now["eos_share"] < 0.5 and now["eos_share"] < then["eos_share"] - 0.2:
        found["eos"] = (
            f"responses stop ending ({then['eos_share']:.0%} → {now['eos_share']:.0%} with EOS): raise "
            "ppo.missing_eos_penalty or ppo.max_new_tokens"
        )
    return found


def _all_equal(row: dict[str, Any]) -> bool:
    """But for rounding: sums of equal float32 numbers differ in their last bits."""
    return row["reward_std"] <= 1e-6 * max(1.0, abs(row["reward"]))


_WATCHED = ("kl", "reward", "reward_std", "response_length", "repetition", "entropy", "eos_share")


class Monitor:
    """Writes what happened, on the main process, and says what should be known.

    Attributes:
        warnings: all that were given, in order.
    """

    def __init__(
        self, run: RunFolder, recipe: PPORecipe, console: Console, *, main: bool, iteration: int
    ) -> None:
        self.run, self.recipe, self.console, self.main = run, recipe, console, main
        self.metrics = MetricsCallback(run, resumed_step=iteration)  # drops what is past the iteration
        self.history: History = read_jsonl(run.metrics) if run.metrics.is_file() else []
        self._cut_rollouts(iteration)
        self._told: dict[str, str] = {}
        for end in range(1, len(self.history) + 1):
            for kind, message in signs(self.history[:end], kl_bound=recipe.ppo.kl_warning).items():
                self._told.setdefault(kind, message)
        self._said = 0.0
        self._bar: Any = None

    @property
    def warnings(self) -> list[str]:
        """All that were given."""
        return list(self._told.values())

    def record(self, iteration: int, tokens: int, numbers: dict[str, float], experience: Experience) -> None:
        """One iteration is done."""
        if not self.main:
            return
        spent = sum(numbers[f"{phase}_seconds"] for phase in ("rollout", "scoring", "update"))
        before = self.history[-1]["tokens"] if self.history else 0
        line = {
            "step": iteration,
            **{key: float(f"{value:.7g}") for key, value in numbers.items()},
            "tokens": tokens,
            "tokens_per_second": round((tokens - before) / max(spent, 1e-9), 1),
            "seconds": round(self.metrics.seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self.history.append(line)
        last = iteration == self.recipe.ppo.iterations
        self.metrics.write(line)
        if iteration == 1 or iteration % self.recipe.ppo.samples_every == 0 or last:
            self._write_rollouts(iteration, experience)
        for kind, message in signs(self.history, kl_bound=self.recipe.ppo.kl_warning).items():
            if kind not in self._told:
                self._told[kind] = message
                self.console.print(f"iteration {iteration}: {message}", style="yellow", markup=False)
        self._show(line)

    def _write_rollouts(self, iteration: int, experience: Experience) -> None:
        """The worst, the middle and the best response of the iteration."""
        order = experience.scores.argsort().tolist()
        count = min(SHOWN_ROLLOUTS, len(order))
        chosen = [order[round(i * (len(order) - 1) / max(count - 1, 1))] for i in range(count)]
        with (self.run.path / ROLLOUTS_FILE).open("a", encoding="utf-8") as file:
            for row in chosen:
                messages = experience.messages[row]
                record = {
                    "step": iteration,
                    "messages": messages[:-1],
                    "response": messages[-1]["content"],
                    "score": round(float(experience.scores[row]), 4),
                    "parts": {name: round(float(s[row]), 4) for name, s in experience.raw.items()},
                    "kl": round(float(experience.kl[row]), 3),
                    "ended": bool(experience.rollout.ended[row]),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _cut_rollouts(self, iteration: int) -> None:
        path = self.run.path / ROLLOUTS_FILE
        if self.main and path.is_file():
            rows = [
                row for row in read_jsonl(path) if row["step"] <= iteration
            ]  # without one torn by a crash
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    # ---- terminal ----

    def _show(self, line: dict[str, Any]) -> None:
        iterations = self.recipe.ppo.iterations
        numbers = (
            f"reward {line['reward']:+.3f}  KL {line['kl']:.2f}  length {line['response_length']:.0f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s"
        )
        if sys.stderr.isatty():
            self._progress().update(self._task, completed=line["step"], numbers=numbers)
        elif time.monotonic() - self._said > 10 or line["step"] == iterations:
            self._said = time.monotonic()
            self.console.print(f"iteration {line['step']}/{iterations}  {numbers}", highlight=False)

    def _progress(self) -> Any:
        if self._bar is None:
            self._bar, self._task = training_bar(self.console, "PPO", total=self.recipe.ppo.iterations)
        return self._bar

    def close(self) -> None:
        """Give the terminal back."""
        self.metrics.close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
