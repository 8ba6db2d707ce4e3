"""Classification: the figures that the README names, confidence, labelled data, and the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.taxonomy.classifier import (
    MOST_LABELLED,
    Prediction,
    PromptClassifier,
    Tree,
    _capped,
    ngrams,
)
from rlhf.taxonomy.evaluation import score_categories, score_tiers
from rlhf.taxonomy.reading import read_labelled, read_prompts
from rlhf.taxonomy.tree import HELD_OUT_FILE, Taxonomy, load_taxonomy


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


@pytest.fixture(scope="module")
def classifier(taxonomy: Taxonomy) -> PromptClassifier:
    return PromptClassifier(taxonomy)


def test_held_out_accuracy(taxonomy: Taxonomy, classifier: PromptClassifier) -> None:
    prompts, labels = zip(*read_labelled(HELD_OUT_FILE, taxonomy))
    primary, secondary, tertiary = score_tiers(classifier.predict(prompts), labels)
    assert primary.accuracy >= 0.85
    assert secondary.accuracy >= 0.70
    assert tertiary.accuracy >= 0.55
    for tier in (primary, secondary, tertiary):  # what is called unknown is where it would be wrong
        assert tier.precision is not None
        assert tier.precision > tier.accuracy


def test_medical_data_lands_in_medicine(shared: Path, classifier: PromptClassifier) -> None:
    predictions = classifier.predict(read_prompts(shared / "data" / "medical_sft_1k.jsonl").prompts)
    medical = [prediction.at(2) in (None, "2.01") for prediction in predictions]
    assert sum(medical) / len(medical) >= 0.9
    assert sum(prediction.at(2) is None for prediction in predictions) < 100


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("高血压患者平时饮食要注意什么？", "2.01"),
        ("用 Python 写一个快速排序函数", "4.03"),
        ("把这句话翻译成英文：今天天气真好", "3.06"),
        ("公司拖欠工资三个月，我该怎么申请劳动仲裁", "2.02"),
    ],
)
def test_plain_cases(classifier: PromptClassifier, prompt: str, category: str) -> None:
    assert classifier.predict([prompt])[0].at(2) == category


def test_nothing_known_is_unknown(classifier: PromptClassifier) -> None:
    for prediction in classifier.predict(["ΩΨΞ", "ஃ"]):
        assert prediction.category is None
        assert prediction.as_dict()["category"] == "unknown"


def test_foreign_prompts_are_unknown_until_some_are_labelled(
    taxonomy: Taxonomy, classifier: PromptClassifier
) -> None:
    question = "what is the treatment of diabetes?"
    assert classifier.predict([question])[0].category is None
    assert classifier.predict(["TypeError: 'int' 怎么解决"])[0].at(2) == "4.03"
    forms = (
        "what are the symptoms of {}",
        "is there a treatment for {}",
        "how is {} treated",
        "what causes {}",
    )
    labelled = [(form.format(each), "2.01") for form in forms for each in ("asthma", "diabetes", "flu")]
    assert PromptClassifier(taxonomy, labelled).predict([question])[0].at(2) == "2.01"


def test_confidence_is_consistent_between_tiers(taxonomy: Taxonomy, classifier: PromptClassifier) -> None:
    prompts = [prompt for prompt, _ in read_labelled(HELD_OUT_FILE, taxonomy)]
    for prediction in classifier.predict(prompts):
        first, second, third = prediction.path
        assert third.startswith(second)
        assert second.startswith(first)
        assert 0 < prediction.confidence[2] <= prediction.confidence[1] + 1e-9
        assert prediction.confidence[1] <= prediction.confidence[0] + 1e-9 <= 1 + 2e-9


def test_predictions_do_not_depend_on_the_batch(classifier: PromptClassifier) -> None:
    prompts = ["孩子发烧怎么办", "推荐一部电影", "你好"]
    together = classifier.predict(prompts)
    alone = [classifier.predict([prompt])[0] for prompt in prompts]
    assert [each.path for each in together] == [each.path for each in alone]
    np.testing.assert_allclose([e.confidence for e in together], [e.confidence for e in alone], rtol=1e-4)


def test_a_sure_first_tier_survives_an_unsure_third(taxonomy: Taxonomy) -> None:
    tree = Tree(taxonomy)
    law = [index for index, leaf in enumerate(tree.ids[2]) if leaf.startswith("2.02")]
    leaves = np.zeros((1, len(tree.ids[2])))
    leaves[0, law] = 0.9 / len(law)
    leaves[0, tree.index[2]["6.01.01"]] = 0.1
    (prediction,) = tree.predictions(leaves, 0.4)
    assert (prediction.at(1), prediction.at(2), prediction.at(3)) == ("2", "2.02", None)
    assert prediction.category == "2.02"
    assert prediction.confidence == pytest.approx((0.9, 0.9, 0.9 / len(law)))


def test_threshold_moves_what_is_unknown() -> None:
    path, confidence = ("2", "2.01", "2.01.03"), (0.9, 0.6, 0.3)
    expected = {0.2: "2.01.03", 0.5: "2.01", 0.8: "2", 0.95: None}
    for threshold, category in expected.items():
        assert Prediction(path, confidence, threshold).category == category


def test_labelled_prompts_are_learned(taxonomy: Taxonomy, classifier: PromptClassifier) -> None:
    """Words that no example has, labelled in the second tier only."""
    labelled = [(f"锟斤拷烫烫{word}", "5.04") for word in ("屯屯", "葺葺", "铪铪", "铞铞")]
    prompt = "锟斤拷烫烫铪铪"
    assert classifier.predict([prompt])[0].at(2) != "5.04"
    assert PromptClassifier(taxonomy, labelled).predict([prompt])[0].at(2) == "5.04"


def test_labelled_prompts_are_capped_evenly() -> None:
    kept = _capped([(str(i), "1.01") for i in range(1000)] + [("x", "1.02")])
    assert len(kept) == MOST_LABELLED + 1
    assert [int(text) for text, _ in kept[:3]] == [0, 50, 100]


def test_ngrams() -> None:
    assert ngrams("A1。水") == ["a", "0", "a0", "水", "^a0", " 水$"]
    assert ngrams("x=1？")[-3:] == ["=0$", "mark ？", "formula"]
    assert ngrams("……") == ["mark …", "mark …"]
    assert "尾$" not in ngrams("头" + "中" * 1000 + "尾尾")
    assert "尾尾$" in ngrams("头" + "中" * 1000 + "尾尾")
    assert len(ngrams("中" * 100_000)) < 1000


def test_scores_against_hand_counts(taxonomy: Taxonomy) -> None:
    def guess(leaf: str, *confidence: float) -> Prediction:
        return Prediction((leaf[:1], leaf[:4], leaf), confidence, 0.5)  # type: ignore[arg-type]

    predictions = [
        guess("1.01.01", 0.9, 0.9, 0.9),
        guess("1.01.02", 0.9, 0.4, 0.1),
        guess("2.01.01", 0.6, 0.6, 0.6),
    ]
    labels = ["1.01.01", "1.02.01", "2.02"]
    first, second, third = score_tiers(predictions, labels)
    assert (first.rows, first.accuracy, first.known, first.precision) == (3, 1.0, 1.0, 1.0)
    assert (second.accuracy, second.known, second.precision) == (1 / 3, 2 / 3, 0.5)
    assert (third.rows, third.accuracy, third.known, third.precision) == (2, 0.5, 0.5, 1.0)
    scores = {score.id: score for score in score_categories(predictions, labels, taxonomy)}
    assert (scores["1.01"].precision, scores["1.01"].recall) == (0.5, 1.0)
    assert (scores["1.02"].precision, scores["1.02"].recall) == (None, 0.0)
    assert (scores["2.01"].precision, scores["2.01"].recall) == (0.0, None)


# --- the language model ---------------------------------------------------------------------------------------


@pytest.fixture
def by_likelihood(tiny_base: Path, taxonomy: Taxonomy) -> Any:
    from finetune.chat_command import load
    from rlhf.taxonomy.likelihood import LikelihoodClassifier

    return LikelihoodClassifier(*load(str(tiny_base), None, quantization="none"), taxonomy)


def test_likelihood_against_one_name_at_a_time(by_likelihood: Any) -> None:
    """Batching and padding change nothing: each name scored by itself, token by token."""
    import torch

    from finetune.baichuan.chat import build_prompt
    from rlhf.taxonomy.likelihood import QUESTION

    names = ["法律", "知识与百科", "数学"]
    model, tokenizer = by_likelihood._model, by_likelihood._tokenizer
    question = QUESTION.format(prompt="头痛", names="、".join(names))
    context = build_prompt(
        tokenizer, [{"role": "user", "content": question}], max_length=2048, max_new_tokens=64
    )
    for name, score in zip(names, by_likelihood._scores("头痛", names)):
        answer = [*tokenizer.encode_content(name), tokenizer.eos_token_id]
        total = 0.0
        for end, token in enumerate(answer):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context + answer[:end]])).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
        assert score == pytest.approx(total, abs=1e-3)


def test_likelihood_descends_the_tree(by_likelihood: Any, taxonomy: Taxonomy) -> None:
    (prediction,) = by_likelihood.predict(["头痛怎么办<reserved_107>"])
    first, second, third = prediction.path
    assert third in taxonomy.categories
    assert third.startswith(second)
    assert second.startswith(first)
    assert 1 >= prediction.confidence[0] >= prediction.confidence[1] >= prediction.confidence[2] > 0


def test_likelihood_takes_off_what_would_be_said_anyhow(by_likelihood: Any) -> None:
    shares = by_likelihood.choose("", ["法律", "数学"])
    assert shares == pytest.approx([0.5, 0.5], abs=1e-5)
