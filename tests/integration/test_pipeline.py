"""Recipes in a row: each goes on from the last, what is done is skipped, one page links them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import finetune, interrupt_at, metrics, write_recipe

from finetune.pipeline import Pipeline
from finetune.recipe import load_pipeline

TALK = ("--prompt", "问题1：怎么办？", "--greedy", "--max-new-tokens", 12)


def write_chain(folder: Path, base: Path) -> Path:
    """SFT, merge, and SFT again on the merged model; all below one folder."""
    chain = folder / "chain"
    write_recipe(folder / "a", base, train={"max_steps": 4})
    plain: dict[str, Any] = yaml.safe_load((folder / "a" / "recipe.yaml").read_text(encoding="utf-8"))
    model = {**plain["model"], "base": str(chain / "merged")}
    recipes: dict[str, dict[str, Any]] = {
        "first": plain,
        "merged": {"stage": "merge", "merge": {"adapter": str(chain / "first" / "adapter")}},
        "second": {**plain, "model": model},
    }
    for name, recipe in recipes.items():
        text = yaml.safe_dump({**recipe, "name": name, "output_dir": str(chain / name)})
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    path = folder / "pipeline.yaml"
    path.write_text("pipeline: [first.yaml, merged.yaml, second.yaml]\n", encoding="utf-8")
    return path


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def test_a_chain_is_checked_before_it_has_run(tiny_base: Path, tmp_path: Path) -> None:
    """What an earlier step makes is awaited; what none makes is missed."""
    pipeline, chain = write_chain(tmp_path, tiny_base), tmp_path / "chain"
    output = finetune("check", pipeline)
    assert output.count("the recipe can run") == 1
    assert f"note: {chain / 'first' / 'adapter'} is not there yet" in output
    assert f"second: stage sft: {chain / 'merged'} is not there yet" in output
    second = tmp_path / "second.yaml"
    text = second.read_text(encoding="utf-8")
    second.write_text(text.replace(str(chain / "merged"), str(tmp_path / "nowhere")), encoding="utf-8")
    assert "nowhere" in finetune("check", pipeline, expect=2)


def test_a_chain_runs_once(tiny_base: Path, tmp_path: Path) -> None:
    pipeline, chain = write_chain(tmp_path, tiny_base), tmp_path / "chain"
    output = finetune("run", pipeline, "train.max_steps=3")  # merge has no such key, and need not
    assert [line for line in output.splitlines() if line.startswith("[")] == [
        "[1/3] first: stage sft",
        "[2/3] merged: stage merge",
        "[3/3] second: stage sft",
    ]
    assert [len(losses(chain / name)) for name in ("first", "second")] == [3, 3]
    config = json.loads((chain / "second" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(chain / "merged")
    adapted = finetune("chat", "--model", tiny_base, "--adapter", chain / "first" / "adapter", *TALK)
    assert finetune("chat", "--model", chain / "merged", *TALK) == adapted
    page = (chain / "report.html").read_text(encoding="utf-8")
    assert 'href="first/report.html"' in page
    assert 'href="second/report.html"' in page
    assert "3 of 3 steps" in page

    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.is_file()}
    assert finetune("run", pipeline, "train.max_steps=3").count("done already") == 3
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"report.html", "pipeline.json"}

    other = ("train.max_steps=3", "train.learning_rate=0.5")
    assert "holds a run already" in finetune("run", pipeline, *other, expect=2)
    assert "finished already" in finetune("run", chain / "first" / "recipe.yaml", "--resume")
    finetune("run", pipeline, "train.max_steps=2", "--overwrite")
    assert [len(losses(chain / name)) for name in ("first", "second")] == [2, 2]


def test_an_interrupted_chain_goes_on_where_it_stopped(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune("run", write_chain(tmp_path / "straight", tiny_bases["rope"]))
    stopped, chain = write_chain(tmp_path / "stopped", tiny_bases["rope"]), tmp_path / "stopped" / "chain"
    finetune("run", tmp_path / "stopped" / "first.yaml")  # on its own: the chain knows nothing of it
    assert "holds a run already" in finetune("run", stopped, expect=2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert "finished already" in finetune("run", stopped, "--resume", expect=130)
    state = json.loads((chain / "pipeline.json").read_text(encoding="utf-8"))
    assert sorted(Path(folder).name for folder in state["done"]) == ["first", "merged"]
    assert "interrupted" in (chain / "report.html").read_text(encoding="utf-8")
    assert "holds a run already" in finetune("run", stopped, expect=2)
    output = finetune("run", stopped, "--resume")
    assert output.count("done already") == 2
    assert "going on after step 2" in output
    assert losses(chain / "second") == pytest.approx(losses(tmp_path / "straight" / "chain" / "second"))


def test_what_went_on_from_a_changed_step_is_done_again(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    pipeline, chain = write_chain(tmp_path, tiny_bases["rope"]), tmp_path / "chain"
    finetune("run", pipeline)
    merged = (chain / "merged" / "model.safetensors").read_bytes()
    shutil.rmtree(chain / "first")
    recipe = tmp_path / "first.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8") + "seed: 7\n", encoding="utf-8")
    output = finetune("run", pipeline)
    assert output.count("again, since a step before it has changed") == 2
    assert (chain / "merged" / "model.safetensors").read_bytes() != merged
    assert finetune("run", pipeline).count("done already") == 3
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data = Path(settings["data"]["train"])  # other training data is another run
    data.write_text(data.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert "holds a run already" in finetune("run", pipeline, expect=2)


def test_a_merge_step_replaces_only_what_is_whole(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    pipeline, chain = write_chain(tmp_path, tiny_bases["rope"]), tmp_path / "chain"
    finetune("run", pipeline)
    step = tmp_path / "merged.yaml"
    assert "already" in finetune("run", step)  # the same adapter with the same settings
    assert "holds another merge" in finetune("run", step, "merge.dtype=bfloat16", expect=2)
    finetune("run", step, "merge.adapter=nowhere", "--overwrite", expect=2)
    assert (chain / "merged" / "model.safetensors").is_file()
    finetune("run", step, "merge.dtype=bfloat16", "--overwrite")
    record = json.loads((chain / "merged" / "merge.json").read_text(encoding="utf-8"))
    assert record["settings"]["dtype"] == "bfloat16"
    assert [path.name for path in chain.iterdir() if path.name.startswith(".")] == []
    output = finetune("check", step)
    assert "exists already" in output
    assert "0.1% in float32, 1.0% in float16, 5.0% in bfloat16" in output
    assert "logits may differ" not in finetune("check", step, "merge.verify=false")
    finetune("check", step, "merge.max_shard_size=lots", expect=2)


def test_a_finished_run_is_not_resumed_with_other_settings(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    write_recipe(tmp_path, tiny_bases["rope"], train={"max_steps": 2})
    recipe = tmp_path / "recipe.yaml"
    finetune("run", recipe)
    assert "cannot be resumed with other settings" in finetune("run", recipe, "seed=9", "--resume", expect=2)
    assert "finished already" in finetune("run", recipe, "--resume")
    finetune("run", recipe, "train.max_steps=3", "--resume")  # but for longer
    assert len(losses(tmp_path / "run")) == 3


def test_a_step_cannot_write_where_the_page_is(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_chain(tmp_path, tiny_bases["rope"])
    second = tmp_path / "second.yaml"
    text = second.read_text(encoding="utf-8").replace(str(tmp_path / "chain" / "second"), "runs/clash")
    second.write_text(text, encoding="utf-8")
    (tmp_path / "clash.yaml").write_text("pipeline: [first.yaml, second.yaml]\n", encoding="utf-8")
    assert "where the page of the pipeline would be" in finetune("run", tmp_path / "clash.yaml", expect=2)


def test_a_step_that_is_done_again_counts_as_done_when_it_is(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """A process that is killed within it leaves the file as it is then."""
    chain = tmp_path / "chain"
    steps = load_pipeline(write_chain(tmp_path, tiny_bases["rope"]), [])
    done: list[list[str]] = []

    def run_step(step: Any, *, resume: bool, overwrite: bool) -> Path:
        state = chain / "pipeline.json"
        listed = json.loads(state.read_text(encoding="utf-8"))["done"] if state.is_file() else {}
        done.append(sorted(Path(folder).name for folder in listed))
        Path(step.output_dir).mkdir(parents=True, exist_ok=True)
        return Path(step.output_dir)

    list(Pipeline("chain", steps).run(run_step, resume=False, overwrite=False))
    (chain / "merged").rmdir()
    list(Pipeline("chain", steps).run(run_step, resume=False, overwrite=False))
    assert done == [[], ["first"], ["first", "merged"], ["first", "second"]]


def test_the_base_is_where_the_chain_begins(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    pipeline = write_chain(tmp_path, tiny_bases["rope"])
    first, _, second = load_pipeline(pipeline, [f"model.base={tiny_bases['alibi']}"])
    assert first.model.base == str(tiny_bases["alibi"])  # type: ignore[attr-defined]
    assert second.model.base == str(tmp_path / "chain" / "merged")  # type: ignore[attr-defined]


def test_a_mistake_in_any_step_is_told_before_the_first(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    pipeline = write_chain(tmp_path, tiny_bases["rope"])
    assert "train.max_step: unknown key" in finetune("run", pipeline, "train.max_step=3", expect=2)
    recipe = tmp_path / "merged.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("adapter:", "adaptor:"), encoding="utf-8")
    assert "merge.adaptor: unknown key; did you mean merge.adapter?" in finetune("run", pipeline, expect=2)
    assert not (tmp_path / "chain").exists()
