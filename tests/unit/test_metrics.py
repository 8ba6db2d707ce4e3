"""The `evaluate` modules that ship with the project."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.report.metrics import METRICS, load_metric, metric_path, score, score_items


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection or looks up a name fails the test, environment variables or not."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"network access: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def char_f1(prediction: str, reference: str, **options: Any) -> float:
    return load_metric("char_f1").compute(predictions=[prediction], references=[reference], **options)[
        "char_f1"
    ]


def rouge_l(prediction: str, reference: str, **options: Any) -> float:
    return load_metric("rouge_l").compute(predictions=[prediction], references=[reference], **options)[
        "rouge_l"
    ]


@pytest.mark.parametrize("name", METRICS)
def test_evaluate_loads_each_module_by_its_path(name: str) -> None:
    import evaluate

    module = evaluate.load(str(metric_path(name)))
    assert isinstance(module, evaluate.Metric)
    assert module.name.replace("_", "") == name.replace("_", "")
    assert module.description
    assert module.citation
    assert "Example" in module.inputs_description


def test_loading_and_scoring_take_no_time() -> None:
    load_metric.cache_clear()
    import evaluate  # noqa: F401  # importing it takes seconds and is not what is measured

    started = time.monotonic()
    score(["水"] * 100, ["水"] * 100)
    assert time.monotonic() - started < 2, "a look-up that times out?"


def test_unknown_metric_names_those_that_exist() -> None:
    with pytest.raises(KeyError, match="char_f1, rouge_l, distinct"):
        metric_path("bleu")


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("多喝水", "多喝水", 1.0),
        ("多喝水", "多喝水,休息", 0.75),  # shared 3, lengths 3 and 5
        ("休息多喝水", "多喝水休息", 1.0),  # order does not count
        ("水水水水", "水", 0.4),  # a repetition is shared once: 2 · 1 / (4 + 1)
        ("头痛", "发烧", 0.0),
        ("多 喝\n水", "多喝　水", 1.0),  # whitespace, the ideographic too
        ("", "多喝水", 0.0),
        ("多喝水", "", 0.0),
        ("", "", 1.0),
        ("。，！", "多喝水", 0.0),  # nothing is left of it
    ],
)
def test_char_f1(prediction: str, reference: str, expected: float) -> None:
    assert char_f1(prediction, reference) == pytest.approx(expected)
    assert char_f1(reference, prediction) == pytest.approx(expected)


def test_punctuation_counts_when_asked_for() -> None:
    assert char_f1("好。", "好！") == 1.0
    assert char_f1("好。", "好！", ignore_punctuation=False) == 0.5
    assert rouge_l("好。", "好！") == 1.0
    assert rouge_l("好。", "好！", ignore_punctuation=False) == 0.5
    # Signs that carry meaning are no punctuation.
    assert char_f1("37℃", "37") < 1


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("多喝水", "多喝水", 1.0),
        ("水喝多", "多喝水", 1 / 3),
        ("建议休息", "建议多喝水休息", 8 / 11),
        ("hba1c 偏高", "HbA1c偏高", 1.0),
        ("血糖75", "血糖7", 2 / 3),  # numbers are whole or wrong
        ("", "", 1.0),
        ("", "水", 0.0),
    ],
)
def test_rouge_l(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_rouge_l_agrees_with_the_textbook_table() -> None:
    def textbook(a: str, b: str) -> int:
        above = [0] * (len(b) + 1)
        for x in a:
            row = [0]
            for j, y in enumerate(b):
                row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
            above = row
        return above[-1]

    draw = random.Random(3)
    pairs = [["".join(draw.choices("甲乙丙丁戊", k=draw.randint(1, 90))) for _ in "ab"] for _ in range(200)]
    predictions, references = map(list, zip(*pairs))
    compute = load_metric("rouge_l").compute
    items = compute(predictions=predictions, references=references, per_item=True)["rouge_l_items"]
    for (a, b), item in zip(pairs, items, strict=True):
        assert item == pytest.approx(2 * textbook(a, b) / (len(a) + len(b)))


def test_distinct() -> None:
    compute = load_metric("distinct").compute
    assert compute(predictions=["好好好好"]) == {"distinct_1": 0.25, "distinct_2": pytest.approx(1 / 3)}
    # The same answer to everything is no variety, though each answer by itself has it.
    scores = compute(predictions=["多喝水"] * 4, per_item=True)
    assert scores["distinct_2"] == 0.25
    assert scores["distinct_2_items"] == [1.0] * 4
    assert compute(predictions=["好"], sizes=[3]) == {"distinct_3": 0.0}


def test_scores_of_all_are_the_means_of_the_items() -> None:
    predictions, references = ["多喝水", "头痛", ""], ["多喝水,休息", "头疼", "发烧"]
    items = score_items(predictions, references)
    total = score(predictions, references)
    assert set(total) == {"char_f1", "rouge_l", "distinct_1", "distinct_2"}
    for name in ("char_f1", "rouge_l"):
        assert total[name] == pytest.approx(sum(item[name] for item in items) / 3)
    assert items[0] == {"char_f1": 0.75, "rouge_l": 0.75, "distinct_2": 1.0}


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        score([], [])
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        score_items(["a", "b"], ["a"])


def test_computing_leaves_no_files_but_the_cached_code(tmp_path: Path) -> None:
    code = (
        "from finetune.report.metrics import score\n"
        "score(['多喝水'], ['多喝水']); score(['头痛'], ['头疼'])\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, timeout=300)
    cache = tmp_path / ".cache" / "huggingface"
    files = [
        path.relative_to(cache)
        for path in tmp_path.rglob("*")
        if path.is_file() and path.is_relative_to(cache)
    ]
    left = [path for path in files if path.parts[:2] != ("modules", "evaluate_modules")]
    assert left == [Path("modules/__init__.py")]
