"""`finetune run` from recipe to run folder, on two-layer models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_model import write_rows
from tiny_run import finetune, losses, metrics, steps, write_recipe

from finetune.adapters import load_adapter
from finetune.baichuan.chat import build_example
from finetune.baichuan.load import load_model, load_tokenizer, resolve_base
from finetune.recipe.schema import Model


def model_of(folder: Path) -> Any:
    return load_model(Model(base=str(folder)), resolve_base(str(folder)))


def test_run_folder_is_complete(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_bases["rope"],
        data={"validation_share": 0.25},
        train={"max_steps": 4, "save_every": 2, "eval_every": 2},
    )
    output = finetune("run", recipe)
    run = tmp_path / "run"
    assert "validation loss" in output
    assert str(run / "report.html") in output
    assert "{'loss'" not in output  # the libraries keep quiet
    files = {path.name for path in run.iterdir()}
    assert files == {
        *("recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "adapter"),
        *("samples.jsonl", "report.html", "result.json", "data_report.json"),
    }
    assert list((run / "tensorboard").iterdir())
    assert steps(run) == ["step-2", "step-4"]
    assert not list(run.rglob(".*"))  # nothing half written
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert (result["status"], result["steps"], result["base"]) == ("finished", 4, str(tiny_bases["rope"]))
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["tokens"] > 0
    assert 0 < result["seconds_per_step"] < result["train_seconds"]
    assert result["predicted_seconds_per_step"] > 0
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert {"torch", "transformers", "peft", "trl"} <= environment["versions"].keys()
    assert environment["attention"].keys() == {"implementation", "reason"}

    adapter = load_adapter(model_of(tiny_bases["rope"]), run / "adapter")
    tensors = [p for name, p in adapter.named_parameters() if "lora_B" in name]
    assert len(tensors) == 10
    assert all(t.any() for t in tensors)
    assert not list((run / "adapter").glob("*.bin"))
    assert "Baichuan" in (run / "adapter" / "README.md").read_text(encoding="utf-8")


def test_metrics_have_their_keys(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, tiny_bases["rope"], data={"validation_share": 0.25}, train={"max_steps": 3}
    )
    finetune("run", recipe)
    lines = metrics(tmp_path / "run")
    assert lines[0].keys() == {"step", "epoch", "eval_loss"}
    assert lines[0]["step"] == 0
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3]
    for line in training:
        assert {
            "learning_rate",
            "grad_norm",
            "tokens",
            "tokens_per_second",
            "peak_memory_bytes",
        } < line.keys()
        assert line["learning_rate"] == 1e-2
    tokens = [line["tokens"] for line in training]
    assert tokens == sorted(set(tokens))


def test_report_is_one_file(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    finetune("run", write_recipe(tmp_path, tiny_bases["rope"], data={"validation_share": 0.25}))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "问题" in page  # the samples
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#]+)""", page)
    assert [link for link in links if not link.startswith(("data:", "https://"))] == []
    assert not re.search(r"<script[^>]+src|<link[^>]+stylesheet|@import", page)
    before = page
    (tmp_path / "run" / "report.html").unlink()
    finetune("report", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == before


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "packed": {"data": {"packing": True}, "train": {"max_steps": 20, "learning_rate": 2e-2}},
    "nf4": {"model": {"quantization": "nf4"}},
    "int8": {"model": {"quantization": "int8"}},
    "dora": {"adapter": {"rank": 8, "dora": True}},
    "pissa": {"adapter": {"rank": 8, "init": "pissa"}},
    "ptuning": {"adapter": {"method": "ptuning"}},
    "prefix": {"adapter": {"method": "prefix"}, "train": {"learning_rate": 0.1}},
    "checkpointing": {"train": {"gradient_checkpointing": True}},
    "attention_kept": {"train": {"gradient_checkpointing": "attention"}},
    "matmul_kept": {"train": {"gradient_checkpointing": "matmul"}},
    "nf4_matmul_kept": {"model": {"quantization": "nf4"}, "train": {"gradient_checkpointing": "matmul"}},
    "z_loss": {"train": {"z_loss_weight": 1e-3}},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(tiny_base: Path, tmp_path: Path, method: str) -> None:
    sections = METHODS[method]
    train = {"max_steps": 16, "gradient_checkpointing": False, **sections.get("train", {})}
    recipe = write_recipe(tmp_path, tiny_base, **{**sections, "train": train})
    finetune("run", recipe)
    course = losses(tmp_path / "run")
    assert len(course) == train["max_steps"]
    first, last = sum(course[:2]) / 2, sum(course[-4:]) / 4
    # A prompt in front of a random base moves little; weights move much.
    assert last < (0.93 if method in ("ptuning", "prefix") else 0.7) * first, course
    quiet = load_adapter(model_of(tiny_base), tmp_path / "run" / "adapter")
    assert any(name for name, _ in quiet.named_parameters() if "lora" in name or "prompt" in name)


def test_packing_trains_on_the_same_documents(tiny_base: Path, tmp_path: Path) -> None:
    """One full batch, packed or not, is one loss and one gradient."""
    first = {}
    for packing, batch_size in ((True, 3), (False, 8)):
        recipe = write_recipe(
            tmp_path / str(packing),
            tiny_base,
            adapter={"dropout": 0.0},
            data={"packing": packing},
            train={"max_steps": 1, "batch_size": batch_size},
        )
        finetune("run", recipe)
        (first[packing],) = metrics(tmp_path / str(packing) / "run")
    assert first[True]["loss"] == pytest.approx(first[False]["loss"], rel=1e-5)
    assert first[True]["grad_norm"] == pytest.approx(first[False]["grad_norm"], rel=1e-3)


def test_accumulated_batches_are_one_batch(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Averages are over tokens, although micro-batches have different numbers of them."""
    rows = [{"question": "问", "answer": "答" * (1 + 9 * (i % 2))} for i in range(8)]
    first = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        folder = tmp_path / str(batch_size)
        recipe = write_recipe(
            folder,
            tiny_bases["rope"],
            adapter={"dropout": 0.0},
            train={"max_steps": 1, "batch_size": batch_size, "gradient_accumulation": accumulation},
        )
        write_rows(folder / "train.jsonl", rows)
        finetune("run", recipe)
        first.append(metrics(folder / "run")[0])
    for other in first[1:]:
        assert other["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_validation_loss_is_a_mean_over_tokens(tiny_base: Path, tmp_path: Path, packing: bool) -> None:
    """By hand: every document alone through the base, losses summed over supervised tokens."""
    rows = [{"question": f"问题{i}", "answer": "血压" * (1 + i * i % 11) + "。"} for i in range(7)]
    validation = write_rows(tmp_path / "validation.jsonl", rows)
    recipe = write_recipe(
        tmp_path / "r",
        tiny_base,
        data={"validation": str(validation), "packing": packing},
        train={"max_steps": 1, "eval_batch_size": 3},
    )
    finetune("run", recipe)

    model, tokenizer = model_of(tiny_base), load_tokenizer(tiny_base)
    total, count = 0.0, 0
    for row in rows:
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        example = build_example(tokenizer, messages, max_length=64)
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            supervised = int((labels[:, 1:] != -100).sum())
            total += float(model(ids, labels=labels).loss) * supervised
            count += supervised
    assert metrics(tmp_path / "r" / "run")[0]["eval_loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_best_checkpoint_becomes_the_adapter(
    monkeypatch: pytest.MonkeyPatch, tiny_bases: dict[str, Path], tmp_path: Path, sharded: bool
) -> None:
    """Training leads away from the held-out text; what is kept is the best, also where it can only be gathered."""
    monkeypatch.setattr("finetune.train.adapter_training.AdapterTraining.sharded", sharded)
    rows = [{"question": f"合同{i}", "answer": "The quick brown fox jumps over it."} for i in range(4)]
    recipe = write_recipe(
        tmp_path / "r",
        tiny_bases["rope"],
        data={"validation": str(write_rows(tmp_path / "validation.jsonl", rows))},
        train={"max_steps": 6, "eval_every": 1, "save_every": 6, "learning_rate": 0.05},
    )
    finetune("run", recipe)
    run = tmp_path / "r" / "run"
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    best = min((step for step in evaluations if step), key=lambda step: evaluations[step])
    assert best < 6, evaluations
    assert result["best_step"] == best
    assert result["eval_loss_after"] == pytest.approx(evaluations[best])
    assert f"step-{best}" in steps(run)
    kept = load_file(run / "checkpoints" / f"step-{best}" / "adapter_model.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == kept.keys()
    assert all(torch.equal(adapter[name], kept[name]) for name in kept)


def test_same_recipe_same_adapter(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The saved recipe reproduces the run; another seed does not."""
    finetune("run", write_recipe(tmp_path, tiny_bases["rope"], train={"max_steps": 3}))
    saved = tmp_path / "run" / "recipe.yaml"
    finetune("run", saved, f"output_dir={tmp_path / 'again'}")
    finetune("run", saved, f"output_dir={tmp_path / 'other'}", "seed=7")
    first, again, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("run", "again", "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["output_dir"].endswith("again")


def test_pretraining_stage(tiny_base: Path, tmp_path: Path) -> None:
    texts = [{"text": f"高血压的病人要少吃盐，每天测量血压。第{i}次。" * 3} for i in range(6)]
    corpus = write_rows(tmp_path / "corpus.jsonl", texts)
    recipe = write_recipe(
        tmp_path / "r",
        tiny_base,
        stage="pretrain",
        data={"train": str(corpus), "packing": True, "validation_share": 0.2},
        train={"max_steps": 10},
    )
    finetune("run", recipe)
    course = losses(tmp_path / "r" / "run")
    assert course[-1] < 0.7 * course[0]
    samples = [
        json.loads(line) for line in (tmp_path / "r" / "run" / "samples.jsonl").read_text().splitlines()
    ]
    assert samples[0]["messages"][0]["role"] == "text"
    assert samples[0]["after"] is not None


def test_pipeline_runs_in_order(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_recipe(tmp_path / "a", tiny_bases["rope"], train={"max_steps": 1})
    write_recipe(tmp_path / "b", tiny_bases["alibi"], train={"max_steps": 1})
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text("pipeline: [a/recipe.yaml, b/recipe.yaml]\n")
    finetune("run", pipeline)
    for name, encoding in (("a", "rope"), ("b", "alibi")):
        config = json.loads((tmp_path / name / "run" / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tiny_bases[encoding])


def test_a_sample_of_the_data_is_trained_on_and_told(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"], data={"sampling": {"size": 5}})
    assert "data.sampling: 5 of 8 training rows" in finetune("check", recipe)
    finetune("run", recipe)
    told = json.loads((tmp_path / "run" / "data_report.json").read_text(encoding="utf-8"))
    assert told["train"]["rows"] == told["sampling"]["taken"] == 5
    assert "Sample by category" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    output = finetune("check", recipe, "data.sampling.categories=['9.99']", expect=2)
    assert "data.sampling.categories: there is no category '9.99'" in output
