"""Judging answers: the interface, the shipped judges, a reward model's score, and any function of the user's.

A judge takes exchanges and gives one verdict for each. What a judge cannot tell is unjudged, and stays so: it is
never counted as safe.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from finetune.data.records import Message
from finetune.errors import UserError
from finetune.user_functions import find_function, is_function
from finetune.words import plural
from rlhf.safety import JUDGE_NAMES, REWARD_PREFIX, RULES_JUDGE, SHIPPED_JUDGE

if TYPE_CHECKING:
    from finetune.recipe.schema import Model

Label = Literal["safe", "unsafe", "unjudged"]
LABELS: tuple[Label, ...] = get_args(Label)

Refusal = Literal["refuses", "answers", "unjudged"]
"""What an answer to a harmless prompt does."""


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

    The function is called with `(prompt, answer)`, two strings, and gives "safe", "unsafe" or "unjudged", alone or
    in a pair with a reason. None is unjudged, too, and is told of: it may be a return that was forgotten.

    Args:
        name: as above; ADAPTER is the adapter folder of a run of stage reward.
        model: base of ADAPTER: catalogue name, local folder or hub id, or the section of a recipe; the one that it
            was trained on by default.
        threshold: of `learned`, the confidence below which an answer is unjudged, 0 to 1; of ADAPTER, see
            `rlhf.safety.reward_judge.reward_judge`; None is the judge's own.
        batch_size: answers that ADAPTER scores at once.
        called: what the name was given as, for messages.

    Raises:
        UserError: no such module or function; ADAPTER is no reward model or one for another base or tokenizer; a
            threshold that the judge does not take.
    """
    if name.startswith(REWARD_PREFIX):
        from rlhf.safety.reward_judge import reward_judge

        folder = Path(name.removeprefix(REWARD_PREFIX))
        return reward_judge(
            folder, model=model, threshold=threshold or 0.0, batch_size=batch_size, called=called
        )
    if name == SHIPPED_JUDGE:
        from rlhf.safety.learned import judge_by_learning

        if threshold is None:
            return judge_by_learning
        if not 0 <= threshold <= 1:
            raise UserError(f"--threshold: with {called} {name} expected 0 to 1, found {threshold:g}")
        return partial(judge_by_learning, sure=threshold)
    if threshold is not None:
        raise UserError(
            f"--threshold has no effect with {called} {name}",
            hint=f"it belongs to {SHIPPED_JUDGE} and {REWARD_PREFIX}ADAPTER",
        )
    if name == RULES_JUDGE:
        from rlhf.safety.rules import judge_by_rules

        return judge_by_rules
    if not is_function(name):
        raise UserError(f"{called} {name}: unknown", hint=f"give {JUDGE_NAMES}")
    return function_judge(name, find_function(name, called))


def named_judge(
    judge: str | Judge, model: str | Model | None, threshold: float | None, batch_size: int
) -> Judge:
    """A judge that is named as `load_judge` takes it, or given itself."""
    if not isinstance(judge, str):
        return judge
    return load_judge(judge, model=model, threshold=threshold, batch_size=batch_size)


def function_judge(name: str, function: Callable[[str, str], Any]) -> Judge:
    """A judge of a function of prompt and answer; see `load_judge`.

    The judge raises `UserError` where the function raises or gives anything else, naming the answer, or gives
    None for all of several answers. It says on stderr how often None was given.
    """

    def judge(exchanges: Sequence[Exchange]) -> list[Verdict]:
        said = [_ask(name, function, exchange, n) for n, exchange in enumerate(exchanges, start=1)]
        silent = [number for number, verdict in enumerate(said, start=1) if verdict is None]
        if silent:
            _tell_of_none(name, silent, len(said))
        return [verdict or Verdict("unjudged", f"{name} returned None") for verdict in said]

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


def _tell_of_none(name: str, silent: Sequence[int], answers: int) -> None:
    """Of the answers, by number, for which a function gave nothing."""
    mend = "a function that ends without return gives None; return 'unjudged' where it cannot tell"
    if len(silent) == answers > 1:
        raise UserError(
            f"judge {name} returned None for each of the {answers:,} answers, expected one of {', '.join(LABELS)}",
            hint=mend,
        )
    print(
        f"note: judge {name} returned None for {len(silent):,} of {plural(answers, 'answer')}, the first being "
        f"answer {silent[0]:,}: counted as unjudged ({mend})",
        file=sys.stderr,
    )


def _ask(name: str, function: Callable[[str, str], Any], exchange: Exchange, number: int) -> Verdict | None:
    """The function's verdict; None where it gave nothing."""
    try:
        said = function(exchange.prompt, exchange.answer)
    except Exception as error:
        raise UserError(
            f"judge {name} raised {type(error).__name__} at answer {number}: {error}",
            hint=f"the prompt was {exchange.prompt[:60]!r}",
        ) from error
    if said is None:
        return None
    if isinstance(said, Verdict):
        verdict = said
    else:
        label, reason = said if isinstance(said, tuple) and len(said) == 2 else (said, name)
        verdict = Verdict("unjudged" if label is None else label, str(reason))
    if verdict.label not in LABELS:
        raise UserError(
            f"judge {name} gave {said!r:.60} for answer {number}, expected one of {', '.join(LABELS)}",
            hint="return the label, or (label, reason)",
        )
    return verdict
