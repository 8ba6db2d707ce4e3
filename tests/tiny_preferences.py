"""A small set of preferences with a rule that a tiny model learns: good answers advise, bad ones do not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_model import write_rows

GOOD = ("多喝水，多休息。", "少吃盐，每天测量血压。", "控制饮食，定期检查血糖。", "按时服药，及时就医。")
FAIR = ("多喝水。", "测量血压。", "控制饮食。", "及时就医。")
BAD = ("不知道。", "讲故事。", "山里有座庙。", "放风筝。")


def ranked_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Prompts with three responses of ranks 1, 2 and 4, not in order."""
    rows = []
    for i in range(first, first + count):
        ranked = ((BAD[i % 4], 4), (GOOD[i % 4], 1), (FAIR[i % 4], 2))
        rows.append(
            {
                "messages": [{"role": "user", "content": f"问题{i}：怎么办？"}],
                "responses": [{"text": text, "rank": rank} for text, rank in ranked],
                "category": f"{i % 2 + 1}.0{i % 3 + 1}",
            }
        )
    return rows


def write_preferences(folder: Path) -> dict[str, str]:
    """Files of 16 training and 6 held-out prompts, as section data names them."""
    folder.mkdir(parents=True, exist_ok=True)
    train = write_rows(folder / "ranked.jsonl", ranked_rows(16))
    held_out = write_rows(folder / "ranked_validation.jsonl", ranked_rows(6, first=16))
    return {"train": str(train), "validation": str(held_out)}
