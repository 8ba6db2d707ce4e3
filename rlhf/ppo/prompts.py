"""The prompts that PPO samples responses to.

Any conversation file will do, its last answers are left out; so will preferences, whose responses are, and rows
with nothing but a prompt:

| columns                                      | prompt                                      |
|----------------------------------------------|---------------------------------------------|
| messages, or conversations                   | the turns up to the last of the user        |
| prompt, question, query, instruction or 问题 | a string, or turns as above                 |
| chosen (turns)                               | its turns up to the last of the user        |
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from finetune.data.checking import check_messages
from finetune.data.formats import ROLE_ALIASES
from finetune.data.loading import refuse_bad_rows
from finetune.data.records import BadRow, Location, Message, Row, RowError
from finetune.data.sampling import Candidate, SamplingReport, category_in, choose
from finetune.data.sources import open_source
from finetune.errors import UserError
from rlhf.ppo.recipe import portions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.recipe.schema import Source
    from rlhf.ppo.recipe import PPORecipe

TURN_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "question", "query", "instruction", "问题")
_PLACEHOLDER = {"role": "assistant", "content": "…"}


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        messages: without an answer.
        ids: as the model reads it, ending where the answer begins.
        location: where it was read.
        category: what the column data.sampling.column says.
        source: which one of the recipe's list it was read from, counted from 0.
    """

    messages: list[Message]
    ids: list[int]
    location: Location = field(default_factory=lambda: Location("", 0))
    category: str | None = None
    source: int = 0


@dataclass
class Prompts:
    """What the recipe's `data` section names.

    Attributes:
        train: to sample from.
        held_out: to look at; empty where nothing is held out.
        bad_rows: rows that were left out.
        files: (split, name, rows read, prompts kept).
        sampling: what data.sampling did to the prompts to sample from; None without it.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    bad_rows: list[BadRow] = field(default_factory=list)
    files: list[tuple[str, str, int, int]] = field(default_factory=list)
    sampling: SamplingReport | None = None

    def report(self) -> dict[str, Any]:
        """For data_report.json."""
        return {
            "stage": "ppo",
            "files": [
                {"split": split, "file": name, "rows": rows, "kept": kept}
                for split, name, rows, kept in self.files
            ],
            "bad_rows": [row.as_dict() for row in self.bad_rows],
            **(
                {"sampling": self.sampling.as_dict(), "warnings": self.sampling.warnings()}
                if self.sampling
                else {}
            ),
            **{
                split: {"tokens": _statistics([len(prompt.ids) for prompt in prompts])}
                for split, prompts in (("train", self.train), ("validation", self.held_out))
                if prompts
            },
        }


def _statistics(lengths: list[int]) -> dict[str, int]:
    """Of prompts, in tokens."""
    return {
        "count": len(lengths),
        "total": sum(lengths),
        "min": min(lengths),
        "median": sorted(lengths)[len(lengths) // 2],
        "max": max(lengths),
    }


def load_prompts(recipe: PPORecipe, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read, check and encode the prompts of a recipe. A prompt that occurs twice counts once.

    Raises:
        UserError: a file is missing or unreadable, a row bad (among them prompts too long for
            data.max_length) while data.on_bad_rows is stop, or nothing is left.
    """
    data = recipe.data
    found = Prompts([], [])
    seen: set[tuple[int, ...]] = set()
    for split, sources, target in (
        ("validation", data.validation_sources(), found.held_out),
        ("train", data.train_sources(), found.train),
    ):
        column = data.sampling.column if data.sampling and split == "train" else None
        for number, source in enumerate(sources):
            for name, rows, prompts in _read(source, recipe, tokenizer, found.bad_rows, column):
                before = len(seen)
                for prompt in prompts:
                    if (key := tuple(prompt.ids)) not in seen:
                        seen.add(key)
                        target.append(replace(prompt, source=number))
                found.files.append((split, name, rows, len(seen) - before))
    if data.on_bad_rows == "stop":
        refuse_bad_rows(found.bad_rows, sum(rows for *_, rows, _ in found.files))
    if data.sampling is not None:
        _sample(found, recipe)
    if data.validation_share > 0:
        random.Random(recipe.seed).shuffle(found.train)
        cut = round(data.validation_share * len(found.train))
        found.held_out, found.train = found.train[:cut], found.train[cut:]
    if not found.train:
        raise UserError("data.train: no prompts are left", hint="a data set holds at least one prompt")
    _check_shares(recipe, found.train)
    return found


def _sample(found: Prompts, recipe: PPORecipe) -> None:
    """Leave what data.sampling takes of the prompts to sample from."""
    assert recipe.data.sampling is not None
    candidates = [
        Candidate(
            next(turn["content"] for turn in prompt.messages if turn["role"] == "user"),
            prompt.location,
            prompt.category,
        )
        for prompt in found.train
    ]
    chosen, found.sampling = choose(
        candidates, recipe.data.sampling, seed=recipe.seed, resolve=recipe.resolve
    )
    found.train = [prompt for index, prompt in enumerate(found.train) if index in chosen]


def _check_shares(recipe: PPORecipe, prompts: Sequence[Prompt]) -> None:
    if recipe.ppo.prompt_shares is None:
        return
    left = {prompt.source for prompt in prompts}
    for number, source in enumerate(recipe.data.train_sources()):
        if number not in left:
            raise UserError(
                f"ppo.prompt_shares: no prompts are left of {source.path} "
                "(repeated ones count once, where they come first)",
                hint="leave the source and its share out, or give it other prompts",
            )


def _read(
    source: Source,
    recipe: PPORecipe,
    tokenizer: PreTrainedTokenizerBase,
    bad_rows: list[BadRow],
    column: str | None,
) -> list[tuple[str, int, list[Prompt]]]:
    """(name, rows, prompts) of each file of a source; rows that cannot be used go to ``bad_rows``."""
    files = []
    left = recipe.data.max_rows
    for name, read in open_source(source.path, recipe.resolve):
        prompts: list[Prompt] = []
        rows = list(islice(read(), left))
        left = None if left is None else left - len(rows)
        for row in rows:
            if isinstance(row, BadRow):
                bad_rows.append(row)
                continue
            try:
                messages, category = _messages_of(row, recipe.data.system), category_in(row.columns, column)
                ids = _encode(messages, recipe, tokenizer)
                prompts.append(Prompt(messages, ids, row.location, category))
            except RowError as error:
                bad_rows.append(BadRow(row.location, str(error)))
        files.append((name, len(rows), prompts))
    return files


def _encode(messages: list[Message], recipe: PPORecipe, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    from finetune.baichuan.chat import build_prompt

    room = recipe.data.max_length - recipe.ppo.max_new_tokens
    ids = build_prompt(tokenizer, messages, max_length=2**31, max_new_tokens=0)
    if len(ids) > room:
        raise RowError(
            f"the prompt has {len(ids):,} tokens, and data.max_length {recipe.data.max_length:,} less "
            f"ppo.max_new_tokens {recipe.ppo.max_new_tokens:,} leaves {room:,}"
        )
    return ids


def _messages_of(row: Row, system: str | None) -> list[Message]:
    columns = row.columns
    if isinstance(columns.get("chosen"), list) and not any(columns.get(c) for c in PROMPT_COLUMNS):
        turns: Any = columns["chosen"]
    else:
        turns = next((columns[c] for c in (*TURN_COLUMNS, *PROMPT_COLUMNS) if columns.get(c)), None)
    if isinstance(turns, str):
        extra = columns.get("input") if "instruction" in columns else None
        turns = [{"role": "user", "content": f"{turns}\n{extra}" if extra else turns}]
    if not isinstance(turns, list):
        names = ", ".join(repr(name) for name in columns) or "none"
        raise RowError(
            f"no prompt: expected a column {', '.join((*TURN_COLUMNS[:2], *PROMPT_COLUMNS))}; found {names}"
        )
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    check_messages([*messages, _PLACEHOLDER])
    front = columns.get("system") or system
    if messages[0]["role"] != "system" and isinstance(front, str):
        messages.insert(0, {"role": "system", "content": front})
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number}: expected an object with role and content, found {turn!r:.40}")
    role = str(turn.get("role", turn.get("from")))
    content = turn.get("content", turn.get("value"))
    return {"role": ROLE_ALIASES.get(role.strip().lower(), role), "content": content}  # type: ignore[dict-item]


def iteration_prompts(
    prompts: Sequence[Prompt],
    iteration: int,
    *,
    batch_size: int,
    seed: int,
    shares: Sequence[float] | None = None,
) -> list[Prompt]:
    """The prompts of an iteration, a function of the iteration alone.

    Args:
        prompts: to take from.
        iteration: counted from 0.
        batch_size: so many are taken.
        seed: decides the order.
        shares: of each source, in every iteration; None takes from all prompts alike.
    """
    if shares is None:
        return [prompts[i] for i in prompt_order(len(prompts), iteration, batch_size, seed)]
    chosen: list[Prompt] = []
    for source, portion in enumerate(portions(shares, batch_size)):
        own = [prompt for prompt in prompts if prompt.source == source]
        chosen += [own[i] for i in prompt_order(len(own), iteration, portion, f"{seed}/{source}")]
    return chosen


def prompt_order(count: int, iteration: int, batch_size: int, seed: int | str) -> list[int]:
    """Which prompts an iteration takes: each once before any comes again, in an order of its own each time round.

    A function of the iteration alone, so that a resumed run takes the prompts that it would have taken.
    """
    chosen: list[int] = []
    place = iteration * batch_size
    while len(chosen) < batch_size:
        cycle, start = divmod(place, count)
        order = random.Random(f"{seed}:{cycle}").sample(range(count), count)
        part = order[start : start + batch_size - len(chosen)]
        chosen += part
        place += len(part)
    return chosen


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` of the prompts, evenly spread."""
    count = min(count, len(prompts))
    return [prompts[(2 * i + 1) * len(prompts) // (2 * count)] for i in range(count)]
