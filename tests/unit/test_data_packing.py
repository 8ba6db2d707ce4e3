"""Mixing, packing and batches: pure functions, and the proof that packed documents do not see each other."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from finetune.baichuan import BaichuanConfig, BaichuanForCausalLM
from finetune.baichuan.documents import find_documents
from finetune.data.collate import Collator
from finetune.data.mixing import held_out_digests, shuffled, weighted_indices
from finetune.data.packing import best_fit_decreasing, pack_documents, packing_statistics
from finetune.data.statistics import length_statistics

# --- mixing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "times"),
    [(1, {1: 100}), (2, {2: 100}), (0.5, {1: 50}), (2.5, {2: 50, 3: 50}), (0.001, {1: 1})],
)
def test_a_weight_is_how_often_each_row_is_seen(weight: float, times: dict[int, int]) -> None:
    chosen = weighted_indices(100, weight, seed=3)
    assert Counter(Counter(chosen).values()) == times
    assert chosen == weighted_indices(100, weight, seed=3)
    if weight in (0.5, 2.5):
        assert chosen != weighted_indices(100, weight, seed=4)


def test_weights_of_nothing() -> None:
    assert weighted_indices(0, 0.5, seed=1) == []


def test_shuffling_is_decided_by_the_seed() -> None:
    assert shuffled(range(100), seed=1) == shuffled(range(100), seed=1) != shuffled(range(100), seed=2)
    assert sorted(shuffled(range(100), seed=1)) == list(range(100))


def digests(*values: int) -> list[bytes]:
    import hashlib

    return [hashlib.blake2b(str(value).encode(), digest_size=16).digest() for value in values]


@pytest.mark.parametrize(("share", "count"), [(0.1, 10), (0.5, 50), (0.001, 1)])
def test_a_share_is_held_out(share: float, count: int) -> None:
    assert len(held_out_digests(digests(*range(100)), share)) == count


def test_content_alone_decides_what_is_held_out() -> None:
    rows = digests(*range(50))
    assert held_out_digests(rows, 0.2) == held_out_digests(rows[::-1] + rows, 0.2)


def test_something_is_always_left_to_train_on() -> None:
    assert len(held_out_digests(digests(1, 2), 0.5)) == 1
    assert held_out_digests(digests(1, 1, 1), 0.5) == set()


# --- packing --------------------------------------------------------------------------------------------


def test_best_fit_decreasing_by_hand() -> None:
    packs = best_fit_decreasing([2, 5, 4, 7, 1, 3, 8], 10)
    assert [[[2, 5, 4, 7, 1, 3, 8][i] for i in pack] for pack in packs] == [[8, 2], [7, 3], [5, 4, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_every_document_once_and_never_too_much(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 129, size=1000)
    packs = best_fit_decreasing(lengths, 128)
    assert sorted(index for pack in packs for index in pack) == list(range(1000))
    assert all(lengths[pack].sum() <= 128 for pack in packs)
    # best fit leaves no two packs that could have been one
    sums = sorted(int(lengths[pack].sum()) for pack in packs)
    assert sums[0] + sums[1] > 128


def test_edges() -> None:
    assert best_fit_decreasing([], 10) == []
    assert best_fit_decreasing([10, 10], 10) == [[0], [1]]
    assert best_fit_decreasing([1] * 10, 10) == [[*range(10)]]
    with pytest.raises(ValueError, match="11 tokens does not fit into 10"):
        best_fit_decreasing([3, 11], 10)


def test_packing_is_fast() -> None:
    lengths = np.random.default_rng(0).integers(1, 4097, size=200_000)
    begin = time.perf_counter()
    packs = best_fit_decreasing(lengths, 4096)
    assert time.perf_counter() - begin < 10  # about half a second; quadratic search takes minutes
    assert lengths.sum() / (len(packs) * 4096) > 0.99


def documents(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = random.integers(3, 60, size=length).tolist()
        labels = [-100, *(token if random.random() < 0.7 else -100 for token in ids[1:])]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def test_packed_rows_are_the_documents_end_to_end() -> None:
    import pyarrow as pa

    rows = documents([5, 9, 3, 12, 1, 7, 16])
    packed = pack_documents(pa.Table.from_pylist(rows), [*range(7), 1], 16, seed=1)
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]
    unpacked = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 16
        start = 0
        for length in row["seq_lengths"]:
            cut = slice(start, start + length)
            unpacked.append({"input_ids": row["input_ids"][cut], "labels": row["labels"][cut]})
            start += length
    assert all(document["labels"][0] == -100 for document in unpacked)
    assert sorted(map(str, unpacked)) == sorted(map(str, [*rows, rows[1]]))
    statistics = packing_statistics(packed, 16)
    assert (statistics.documents, statistics.tokens) == (8, 62)
    assert statistics.efficiency == pytest.approx(62 / (16 * statistics.packs))


# --- batches --------------------------------------------------------------------------------------------


def test_padded_batches() -> None:
    batch = Collator(pad_token_id=0)([*documents([3, 5])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["input_ids"][0, 3:].tolist() == [0, 0]
    assert batch["labels"][0, 3:].tolist() == [-100, -100]
    assert "position_ids" not in batch
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_packed_batches_have_positions_and_no_mask() -> None:
    rows = [
        {"input_ids": [5] * 6, "labels": [-100] * 6, "seq_lengths": [4, 1, 1]},
        {"input_ids": [6] * 3, "labels": [-100] * 3, "seq_lengths": [3]},
    ]
    batch = Collator(pad_token_id=0, pad_to_multiple_of=8)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["input_ids"].tolist() == [[5] * 6 + [0] * 2, [6] * 3 + [0] * 5]
    assert "attention_mask" not in batch


def test_the_model_finds_exactly_the_documents() -> None:
    from transformers.masking_utils import find_packed_sequence_indices

    rows = [
        {"input_ids": [5] * 6, "labels": [-100] * 6, "seq_lengths": [4, 1, 1]},
        {"input_ids": [6] * 3, "labels": [-100] * 3, "seq_lengths": [3]},
    ]
    positions = Collator(0, pad_to_multiple_of=8)(rows)["position_ids"]
    found = find_packed_sequence_indices(positions)
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 0, 1, 2, 3, 3], [0, 0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("packed", [True, False])
def test_places_are_those_that_the_model_would_find(packed: bool) -> None:
    """So that a GPU need not be asked where labels and documents are."""
    rows: list[dict[str, Any]] = [
        {"input_ids": [5] * 6, "labels": [-100, 7, 7, 7, -100, 7], "seq_lengths": [4, 1, 1]},
        {"input_ids": [6] * 3, "labels": [9, -100, 9], "seq_lengths": [3]},
        {"input_ids": [7] * 8, "labels": [8] * 8, "seq_lengths": [8]},
    ]
    if not packed:
        rows = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    batch = Collator(0, pad_to_multiple_of=8, places=True)(rows)
    positions = batch.get("position_ids", torch.arange(8).expand(3, 8))
    found = find_documents(positions, batch.get("attention_mask"))
    assert found is not None
    assert batch["documents"].lengths == found.lengths
    assert torch.equal(batch["documents"].bounds, found.bounds)
    learned = batch["labels"].flatten()[batch["supervised"] + 1]
    assert learned.tolist() == [7, 7, 7, 7, 9, *[8] * 7]


@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
def test_packed_and_padded_batches_have_the_same_loss_on_every_document(position_embedding: str) -> None:
    import pyarrow as pa

    torch.manual_seed(0)
    config = BaichuanConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        position_embedding=position_embedding,
        max_position_embeddings=64,
    )
    model = BaichuanForCausalLM(config).eval()
    rows = documents([5, 9, 3, 12, 2, 7, 16])
    packed = pack_documents(pa.Table.from_pylist(rows), range(7), 20, seed=1)
    collate = Collator(0, pad_to_multiple_of=8)

    def losses(batch: dict[str, torch.Tensor]) -> list[float]:
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
        )
        return sorted(each[labels[:, 1:] != -100].tolist())

    alone = sorted(loss for row in rows for loss in losses(collate([row])))
    assert losses(collate(list(packed))) == pytest.approx(alone, abs=1e-4)
    assert losses(collate(rows)) == pytest.approx(alone, abs=1e-4)


# --- statistics -----------------------------------------------------------------------------------------


def test_statistics() -> None:
    found = length_statistics(np.array([10, 20, 30, 400]), total=160, supervised=40, truncated=1)
    assert (found.count, found.min, found.median, found.max, found.total) == (4, 10, 25.0, 400, 160)
    assert found.p95 == pytest.approx(344.5)
    assert (found.truncated_share, found.supervised_share) == (0.25, 0.25)


def test_statistics_of_nothing() -> None:
    found = length_statistics(np.zeros(0, dtype=np.int64), total=0, supervised=0, truncated=0)
    assert (found.count, found.max, found.truncated_share, found.supervised_share) == (0, 0, 0.0, 0.0)
