"""The few numbers that a run is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from finetune.report.formatting import compact, duration, is_number, percent, step_time
from finetune.report.run_folder import RunFolder
from finetune.report.samples import mean_scores
from finetune.sizes import byte_size
from finetune.words import plural


@dataclass
class Card:
    """A number with its name.

    Attributes:
        label: what it is.
        value: the number; of a comparison the one after training.
        before: of a comparison, the one before training.
        change: of a comparison, the difference in words.
        better: of a comparison, whether it went the right way; None if that cannot be said.
        note: one line below.
    """

    label: str
    value: str
    before: str = ""
    change: str = ""
    better: bool | None = None
    note: str = ""


def cards(run: RunFolder) -> list[Card]:
    """The cards that the run's files allow, the most telling first."""
    makers = (_validation_loss, _accuracy, _reward, _char_f1, _trainable, _time, _throughput, _memory)
    return [*_own_cards(run), *(card for maker in makers if (card := maker(run)))]


def _own_cards(run: RunFolder) -> list[Card]:
    """What a stage has put into result.json itself, under `cards`, with the names of a card's attributes."""
    found = run.result.get("cards")
    return [Card(**card) for card in found if isinstance(card, dict)] if isinstance(found, list) else []


def _validation_loss(run: RunFolder) -> Card | None:
    points = run.series("eval_loss")
    before, after = run.result.get("eval_loss_before"), run.result.get("eval_loss_after")
    best = run.result.get("best_step")
    note = f"best at step {best:,}" if is_number(best) else ""
    if not is_number(before) and len(points) > 1:
        first_step, before = points[0]
        note = f"since step {first_step:,}" if first_step else note
    if not is_number(after) and points:
        after = points[-1][1]
    if not is_number(after):
        return None
    if not is_number(before):
        return Card("Validation loss", f"{after:.3f}", note=note)
    change = percent(after / before - 1, signed=True) if before > 0 else ""
    return Card("Validation loss", f"{after:.3f}", f"{before:.3f}", change, after < before, note)


def _accuracy(run: RunFolder) -> Card | None:
    accuracy = run.result.get("eval_accuracy")
    if not is_number(accuracy):
        return None
    return Card("Held-out accuracy", percent(accuracy), note="pairs of responses in the right order")


def _reward(run: RunFolder) -> Card | None:
    """Of PPO: the mean reward of the first and the last iteration, in deviations of the first one's."""
    first, last, spread = (run.result.get(f"reward_{key}") for key in ("first", "last", "std_first"))
    if not is_number(first) or not is_number(last):
        return None
    change = f"{(last - first) / spread:+.1f} deviations" if is_number(spread) and spread > 0 else ""
    kl = run.result.get("kl_last")
    note = f"KL {kl:.2f} nats a response" if is_number(kl) else ""
    return Card("Mean reward", f"{last:.3f}", f"{first:.3f}", change, last > first, note)


def _char_f1(run: RunFolder) -> Card | None:
    means = mean_scores(run.samples)
    before, after = means.get("char_f1_before"), means.get("char_f1_after")
    note = f"mean of {plural(len(run.samples), 'held-out answer')}"
    if after is None:
        return None
    if before is None:
        return Card("Character F1", f"{after:.3f}", note=note)
    change = f"×{after / before:.1f}" if before >= 0.01 else f"+{after - before:.3f}"
    return Card("Character F1", f"{after:.3f}", f"{before:.3f}", change, after > before, note)


def _trainable(run: RunFolder) -> Card | None:
    trainable, total = run.result.get("trainable_parameters"), run.result.get("total_parameters")
    if not is_number(trainable) or not is_number(total) or total <= 0:
        return None
    share = trainable / total
    digits = 1 if share >= 0.1 else 2 if share >= 0.001 else 4
    return Card(
        "Trainable", percent(share, digits), note=f"{compact(trainable)} of {compact(total)} parameters"
    )


def _time(run: RunFolder) -> Card | None:
    seconds = run.result.get("train_seconds")
    if not is_number(seconds):
        return None
    steps = run.result.get("steps")
    epochs = max((row["epoch"] for row in run.metrics if is_number(row.get("epoch"))), default=None)
    parts = [plural(int(steps), "step")] if is_number(steps) else []
    parts += [f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"] if epochs is not None else []
    each, predicted = (run.result.get(key) for key in ("seconds_per_step", "predicted_seconds_per_step"))
    if is_number(each):
        foreseen = f" (predicted {step_time(predicted)})" if is_number(predicted) else ""
        parts.append(f"{step_time(each)} a step{foreseen}")
    return Card("Training time", duration(seconds), note=" · ".join(parts))


def _throughput(run: RunFolder) -> Card | None:
    rates = [rate for _, rate in run.series("tokens_per_second")]
    if not rates:
        return None
    tokens = run.result.get("tokens")
    note = f"{compact(tokens)} tokens seen" if is_number(tokens) else ""
    return Card("Throughput", f"{compact(median(rates))} tokens/s", note=note)


def _memory(run: RunFolder) -> Card | None:
    measured = run.result.get("measured_peak_memory_bytes")
    predicted = run.result.get("predicted_peak_memory_bytes")
    if not is_number(measured):
        measured = max((value for _, value in run.series("peak_memory_bytes")), default=None)
    if is_number(measured):
        note = f"predicted {byte_size(predicted)}" if is_number(predicted) else ""
        return Card("Peak memory", byte_size(measured), note=note)
    return Card("Peak memory", byte_size(predicted), note="predicted") if is_number(predicted) else None
