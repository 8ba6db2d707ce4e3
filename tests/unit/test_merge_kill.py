"""A merge that is killed leaves its output complete or absent."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from test_merge import weights, write_adapter

from finetune.adapters import merge_adapter
from finetune.adapters.merge_record import read_record
from finetune.baichuan.load import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

KILLS = 20


def merge(adapter: Path, output: Path) -> None:
    torch.set_num_threads(1)
    merge_adapter(adapter, output, max_shard_size="40KB", verify=False)


def test_twenty_random_kills(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    expected = weights(merge_adapter(tmp_path / "adapter", tmp_path / "expected", max_shard_size="40KB"))
    context = multiprocessing.get_context("forkserver")
    # Loaded once, so that the kills hit the merge and not the imports.
    context.set_forkserver_preload(
        ["test_merge", "finetune.adapters.merge_plan", "finetune.adapters.merge_record"]
    )

    def start(output: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=merge, args=(tmp_path / "adapter", output))
        process.start()
        return process

    start(tmp_path / "warm").join()
    begun = time.perf_counter()
    start(tmp_path / "timed").join()
    duration = time.perf_counter() - begun

    moments = random.Random(0)
    place = tmp_path / "place"
    outcomes = []
    for number in range(KILLS):
        output = place / f"merged-{number % 4}"
        process = start(output)
        process.join(moments.uniform(0.1, 1.1) * duration)
        process.kill()
        process.join()
        outcomes.append(output.exists())
        duration *= 0.9 if output.exists() else 1.15  # to where it ends, however busy the machine has become
        if output.exists():
            found = weights(output)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            assert read_record(output)["base"]["files"]
            assert load_tokenizer(output).encode("血压")
            output.rename(tmp_path / f"done-{number}")
        visible = (
            [path.name for path in place.iterdir() if not path.name.startswith(".")] if place.exists() else []
        )
        assert not visible
    assert any(outcomes)  # else the kills came too early to show anything,
    assert not all(outcomes)  # or too late

    for number in range(4):
        merge_adapter(tmp_path / "adapter", place / f"merged-{number}", verify=False)
    assert sorted(path.name for path in place.iterdir()) == [f"merged-{number}" for number in range(4)]
