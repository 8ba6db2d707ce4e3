"""PPO runs on the tiny models that take seconds, and rewards that misbehave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tiny_model import write_rows

PROMPTS = [
    f"问题{number}：{word}怎么办？"
    for number, word in enumerate(("头痛", "发热", "感冒", "咳嗽", "失眠", "血糖"))
]


def write_ppo_recipe(folder: Path, base: Path | str, **sections: dict[str, Any] | str) -> str:
    """Four iterations of six responses of at most ten tokens; the run goes to ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    train = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    recipe: dict[str, Any] = {
        "stage": "ppo",
        "model": {"base": str(base)},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(train), "max_length": 64},
        "ppo": {
            "reward": "tiny_ppo:digits",
            "iterations": 4,
            "batch_size": 6,
            "minibatch_size": 3,
            "epochs": 2,
            "critic_warmup": 1,
            "max_new_tokens": 10,
            "samples_every": 2,
        },
        "train": {"batch_size": 2, "learning_rate": 1e-2, "save_every": 2},
        "report": {"samples": 2},
        "output_dir": str(folder / "run"),
    }
    for key, value in sections.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return str(path)


def ppo_metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = ("seconds", "per_second", "bytes")
    return [{k: v for k, v in line.items() if not k.endswith(measured)} for line in lines]


# --- rewards ----------------------------------------------------------------------------------------------------


def digits(conversations: list[list[dict[str, str]]]) -> list[float]:
    """Share of characters that are a digit or Latin."""
    texts = [messages[-1]["content"] for messages in conversations]
    return [sum(c.isascii() and c.isalnum() for c in text) / max(len(text), 1) for text in texts]


def always_one(conversations: list[list[dict[str, str]]]) -> list[float]:
    return [1.0] * len(conversations)


def one_too_few(conversations: list[list[dict[str, str]]]) -> list[float]:
    return [0.0] * (len(conversations) - 1)


def nan(conversations: list[list[dict[str, str]]]) -> list[float]:
    return [float("nan")] * len(conversations)


def thirds(conversations: list[list[dict[str, str]]]) -> list[float]:
    """Equal, and not exact in float32."""
    return [1 / 3] * len(conversations)


def spoils_its_arguments(conversations: list[list[dict[str, str]]]) -> list[float]:
    found = digits(conversations)
    for messages in conversations:
        for message in messages:
            message["content"] = "spoilt"
        messages.clear()
    return found


def fails_when_read(conversations: list[list[dict[str, str]]]) -> Iterator[float]:
    yield 1.0
    raise ZeroDivisionError("no good")


def words(conversations: list[list[dict[str, str]]]) -> list[str]:
    return ["good"] * len(conversations)


def raises(conversations: list[list[dict[str, str]]]) -> list[float]:
    raise ZeroDivisionError("no good")


def infinite_later(conversations: list[list[dict[str, str]]]) -> list[float]:
    """Huge numbers, which the optimiser cannot take, from the third iteration on (calls: samples, 1, 2, 3)."""
    infinite_later.calls += 1  # type: ignore[attr-defined]
    scale = 1e30 if infinite_later.calls > 3 else 1.0  # type: ignore[attr-defined]
    return [scale * (1 + row) for row in range(len(conversations))]


def raises_later(conversations: list[list[dict[str, str]]]) -> list[float]:
    """Well for the samples and two iterations."""
    raises_later.calls += 1  # type: ignore[attr-defined]
    if raises_later.calls > 3:  # type: ignore[attr-defined]
        raise ConnectionError("the judge has left")
    return digits(conversations)


raises_later.calls = infinite_later.calls = 0  # type: ignore[attr-defined]
