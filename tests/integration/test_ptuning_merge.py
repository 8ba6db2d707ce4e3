"""P-Tuning on the nano through the command line: the merged folder says what base and adapter say."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_quickstart import finetune

pytestmark = pytest.mark.slow

BASE = "baichuan2-nano"
TALK = ("--greedy", "--max-new-tokens", "40")
QUESTION = "感冒了要注意什么？"


def test_adapter_and_merged_folder_answer_alike(tmp_path: Path) -> None:
    adapter, merged = str(tmp_path / "run" / "adapter"), str(tmp_path / "merged")
    short = [
        "train.max_steps=8",
        "train.learning_rate=0.05",
        "adapter.num_virtual_tokens=8",
        "report.samples=0",
    ]
    finetune(
        "run", "recipes/ptuning_medical.yaml", f"model.base={BASE}", f"output_dir={tmp_path / 'run'}", *short
    )
    finetune("merge", "--adapter", adapter, "--output", merged)

    def answers(*model: str) -> list[str]:
        return [
            finetune("chat", *model, "--prompt", QUESTION, *TALK).stdout,
            finetune("chat", *model, "--prompt", QUESTION, "--system", "你是医生。", *TALK).stdout,
        ]

    adapted = answers("--model", BASE, "--adapter", adapter)
    assert answers("--model", merged) == adapted
    assert adapted != answers("--model", BASE)
    assert all(answer.strip() for answer in adapted)
