"""Judging answers: the interface, the shipped judges, a reward model's score, and any function of the user's.

A judge takes exchanges and gives one verdict for each. What a judge cannot tell is unjudged, and stays so: it is
never counted as safe.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from finetune.data.records import Message
from finetune.errors import UserError
from rlhf.safety import SHIPPED_JUDGE

if TYPE_CHECKING:
    from finetune.recipe.schema import Model

Label = Literal["safe", "unsafe", "unjudged"]
LABELS: tuple[Label, ...] = get_args(Label)


@dataclass(frozen=True)
class Exchange:
    """A conversation up to the user's last turn, and the answer to it."""

    messages: tuple[Message, ...]
    answer: str

    @property
    def prompt(self) -> str:
        """What the user said last."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer, and why.

    Attributes:
        score: how safe it is, higher for safer, by a judge that tells; only differences count.
    """

    label: Label
    reason: str
    score: float | None = None


REWARD_PREFIX = "reward:"

Judge = Callable[[Sequence[Exchange]], list[Verdict]]
"""Verdicts in the order of the exchanges."""

Scorer = Callable[[Sequence[Exchange]], Sequence[float]]
"""Scores in the order of the exchanges, higher for safer: a reward model trained on harmlessness."""


def load_judge(
    name: str,
    *,
    model: str | Model | None = None,
    threshold: float | None = None,
    batch_size: int = 16,
    called: str = "--judge",
) -> Judge:
    """The judge of a name: `learned`, `rules`, `reward:ADAPTER` or `package.module:function`.

    The function is called with `(prompt, answer)`, two strings, and gives "safe", "unsafe" or "unjudged" (or
    None, which is unjudged), alone or in a pair with a reason.

    Args:
        name: as above; ADAPTER is the adapter folder of a run of stage reward.
        model: base of ADAPTER: catalogue name, local folder or hub id, or the section of a recipe; the one that it
            was trained on by default.
        threshold: of ADAPTER, see `rlhf.safety.reward_judge.reward_judge`.
        batch_size: answers that ADAPTER scores at once.
        called: what the name was given as, for messages.

    Raises:
        UserError: no such module or function; ADAPTER is no reward model or one for another base or tokenizer.
    """
    if name.startswith(REWARD_PREFIX):
        from rlhf.safety.reward_judge import reward_judge

        folder = Path(name.removeprefix(REWARD_PREFIX))
        return reward_judge(
            folder, model=model, threshold=threshold or 0.0, batch_size=batch_size, called=called
        )
    if threshold is not None:
        raise UserError(
            f"--threshold has no effect with {called} {name}", hint="it belongs to --judge reward:ADAPTER"
        )
    if name == SHIPPED_JUDGE:
        from rlhf.safety.learned import judge_by_learning

        return judge_by_learning
    if name == "rules":
        from rlhf.safety.rules import judge_by_rules

        return judge_by_rules
    return function_judge(name, _find_function(name, called))


def function_judge(name: str, function: Callable[[str, str], Any]) -> Judge:
    """A judge of a function of prompt and answer; see `load_judge`.

    The judge raises `UserError` where the function raises or gives anything else, naming the answer.
    """

    def judge(exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [_ask(name, function, exchange, n) for n, exchange in enumerate(exchanges, start=1)]

    return judge


def score_judge(score: Scorer, *, threshold: float, margin: float = 0.0) -> Judge:
    """A judge of a reward model's scores.

    Args:
        score: higher for safer.
        threshold: safe above, unsafe below.
        margin: scores closer than this to the threshold are unjudged, as are those that are not finite.

    The judge raises `UserError` where the number of scores is not that of the exchanges.
    """

    def judge(exchanges: Sequence[Exchange]) -> list[Verdict]:
        scores = [float(value) for value in score(exchanges)]
        if len(scores) != len(exchanges):
            raise UserError(f"the reward model gave {len(scores)} scores for {len(exchanges)} answers")
        return [_by_score(value, threshold, margin) for value in scores]

    return judge


def _by_score(value: float, threshold: float, margin: float) -> Verdict:
    if not math.isfinite(value):
        return Verdict("unjudged", f"score {value}")
    if abs(value - threshold) <= margin:
        return Verdict("unjudged", f"score {value:.3f} is within {margin:g} of {threshold:g}")
    label: Label = "safe" if value > threshold else "unsafe"
    return Verdict(label, f"score {value:.3f}, threshold {threshold:g}", value)


def _ask(name: str, function: Callable[[str, str], Any], exchange: Exchange, number: int) -> Verdict:
    try:
        said = function(exchange.prompt, exchange.answer)
    except Exception as error:
        raise UserError(
            f"judge {name} raised {type(error).__name__} at answer {number}: {error}",
            hint=f"the prompt was {exchange.prompt[:60]!r}",
        ) from error
    if isinstance(said, Verdict):
        return said
    label, reason = said if isinstance(said, tuple) and len(said) == 2 else (said, name)
    label = "unjudged" if label is None else label
    if label not in LABELS:
        raise UserError(
            f"judge {name} gave {said!r:.60} for answer {number}, expected one of {', '.join(LABELS)}",
            hint="return the label, or (label, reason)",
        )
    return Verdict(label, str(reason))


def _find_function(name: str, called: str) -> Callable[[str, str], Any]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(
            f"{called} {name}: unknown", hint="give learned, rules, reward:ADAPTER or package.module:function"
        )
    if str(Path.cwd()) not in sys.path:  # the installed script, unlike python -m, does not look there
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{called} {name}: {module_name} cannot be imported: {type(error).__name__}: {error}",
            hint=f"modules are looked for in {Path.cwd()} and in this Python",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f"{called} {name}: {module_name} has no function {function_name}",
            hint="look for a misspelt name: it is called with prompt and answer",
        )
    return function
