"""Recipes: what is accepted and what it becomes, that a dump repeats the run, and pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune.errors import UserError
from finetune.recipe import Recipe, load_pipeline, load_recipe, run_recipe
from finetune.recipe.keys import known_keys
from finetune.recipe.schema import Adapter, Data, Model, Report, Train
from finetune.recipe.yaml_text import parse_yaml
from finetune.stage_table import STAGES

MINIMAL = "stage: sft\nmodel:\n  base: baichuan2-7b-chat\ndata:\n  train: train.jsonl\n"

Write = Callable[..., Path]
"""What the fixture `write` gives: writes a recipe and returns its relative path."""


def refusal(path: Path, overrides: list[str] | None = None) -> str:
    """The message with which a recipe is refused."""
    with pytest.raises(UserError) as caught:
        load_pipeline(path, overrides or [])
    return str(caught.value)


# --- what a good recipe becomes ---------------------------------------------------------------------


def test_defaults_are_those_of_the_working_agreement(write: Write) -> None:
    recipe = load_recipe(write(MINIMAL))
    assert (recipe.name, recipe.seed, recipe.output_dir) == ("test", 42, "runs/test")
    assert (recipe.model.quantization, recipe.model.dtype, recipe.model.attention) == (
        "none",
        "bfloat16",
        "auto",
    )
    assert (recipe.adapter.method, recipe.adapter.rank, recipe.adapter.alpha) == ("lora", 64, 16)
    assert (recipe.data.max_length, recipe.data.packing, recipe.data.on_bad_rows) == (2048, True, "stop")
    assert (recipe.train.learning_rate, recipe.train.betas, recipe.train.weight_decay) == (
        2e-4,
        [0.9, 0.98],
        1e-4,
    )
    assert recipe.train.gradient_checkpointing
    assert recipe.report.samples == 8


def test_every_setting_says_what_it_is_for() -> None:
    for section in (Model, Adapter, Data, Train, Report):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert "\n" not in field.description


def test_empty_section_takes_defaults(write: Write) -> None:
    assert load_recipe(write(MINIMAL + "adapter:\n  # rank: 8\ntrain:\n")).adapter.rank == 64


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2E5", 2e5), ("+1e3", 1e3), ("1.5e-3", 1.5e-3), (".5", 0.5), ("3", 3), ("1_000", 1000)],
)
def test_numbers(text: str, value: float) -> None:
    data = parse_yaml(f"a: {text}", "x").data
    assert data == {"a": value}
    assert type(data["a"]) is type(value)


@pytest.mark.parametrize("text", ["v1e4", "e4", "1e", "2023-09-06", "1.2.3", "1e4f", "4bits"])
def test_text_that_looks_like_a_number(text: str) -> None:
    assert parse_yaml(f"revision: {text}", "x").data == {"revision": text}


def test_overrides_win_and_are_yaml(write: Write) -> None:
    recipe = load_recipe(
        write(MINIMAL + "train:\n  learning_rate: 0.1\n  max_steps: 5\n"),
        [
            "train.learning_rate=1e-4",
            "train.max_steps=null",
            "adapter.targets=[W_pack, o_proj]",
            "data.packing=false",
            "data.system=你是医生，请回答。",
            "name=other",
            "train.epochs=1",
            "train.epochs=2",
        ],
    )
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.max_steps is None
    assert recipe.adapter.targets == ["W_pack", "o_proj"]
    assert not recipe.data.packing
    assert recipe.data.system == "你是医生，请回答。"
    assert recipe.output_dir == "runs/other"
    assert recipe.train.epochs == 2


def test_override_of_a_value_with_an_equals_sign(write: Write) -> None:
    assert load_recipe(write(MINIMAL), ["data.train=a=b.jsonl"]).data.train == "a=b.jsonl"


def test_for_base_stands_between_file_and_command_line(write: Write) -> None:
    path = write(
        MINIMAL
        + "train: {epochs: 1, batch_size: 1, log_every: 1}\n"
        + 'for_base:\n  "baichuan2-NANO*":\n    train: {epochs: 12, batch_size: 8}\n'
        + "    model: {quantization: none}\n"
    )
    assert load_recipe(path).train.epochs == 1
    nano = load_recipe(path, ["model.base=baichuan2-nano", "train.batch_size=2"])
    assert (nano.train.epochs, nano.train.batch_size, nano.train.log_every) == (12, 2, 1)
    assert "for_base" not in nano.dump()


def test_another_method_replaces_the_settings_of_the_first(write: Write) -> None:
    path = write(MINIMAL + "adapter: {method: lora, rank: 8, dropout: 0}\n")
    recipe = load_recipe(path, ["adapter.method=ptuning", "adapter.num_virtual_tokens=5"])
    assert recipe.adapter.num_virtual_tokens == 5
    message = refusal(path, ["adapter.rank=4", "adapter.method=ptuning"])
    assert "command line: adapter.rank: belongs to method lora" in message


def test_prompt_methods_choose_their_own_defaults(write: Write) -> None:
    path = write(MINIMAL)
    ptuning = load_recipe(path, ["adapter.method=ptuning"])
    assert (ptuning.data.packing, ptuning.train.gradient_checkpointing) == (False, True)
    prefix = load_recipe(path, ["adapter.method=prefix"])
    assert (prefix.data.packing, prefix.train.gradient_checkpointing) == (False, False)


def test_sources_come_with_weights_and_formats(write: Write) -> None:
    recipe = load_recipe(
        write(MINIMAL),
        ["data.train=[a.jsonl, {path: b.csv, weight: 2, format: alpaca}]", "data.format=sharegpt"],
    )
    sources = recipe.data.train_sources()
    assert [(source.path, source.weight, source.format) for source in sources] == [
        ("a.jsonl", 1.0, "sharegpt"),
        ("b.csv", 2.0, "alpaca"),
    ]
    assert recipe.data.validation_sources() == []


def test_paths_are_looked_for_beside_the_recipes_folder(write: Write, tmp_path: Path) -> None:
    path = write(MINIMAL, "project/recipes/x.yaml")
    write("", "project/train.jsonl")
    recipe = load_recipe(path)
    assert Path(recipe.resolve("train.jsonl")) == (tmp_path / "project/train.jsonl").resolve()
    write("", "train.jsonl")
    assert recipe.resolve("train.jsonl") == "train.jsonl"
    assert recipe.resolve("someone/data-set") == "someone/data-set"
    assert recipe.data.train == "train.jsonl"


# --- the dump ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "ptuning", "prefix"])
def test_dump_repeats_the_run(write: Write, method: str) -> None:
    recipe = load_recipe(
        write(MINIMAL),
        [
            f"adapter.method={method}",
            "train.learning_rate=1e-5",
            "train.weight_decay=1e-20",
            "model.revision='1234e5'",
            "data.system='null'",
            "data.train=[a.jsonl, {path: 'b: c.csv', weight: 2}]",
        ],
    )
    text = recipe.dump()
    again = load_recipe(write(text, "runs/test/recipe.yaml"))
    assert again.model_dump() == recipe.model_dump()
    assert again.dump() == text
    plain = yaml.safe_load(text)  # plain PyYAML reads floats and quoted text alike
    assert plain["train"]["learning_rate"] == 1e-5
    assert plain["train"]["weight_decay"] == 1e-20
    assert plain["model"]["revision"] == "1234e5"
    assert plain["data"]["system"] == "null"


def test_dump_is_in_schema_order_with_the_methods_own_keys(write: Write) -> None:
    plain = yaml.safe_load(load_recipe(write(MINIMAL), ["adapter.method=prefix"]).dump())
    assert list(plain) == [*(name for name in Recipe.model_fields if name != "output_dir"), "output_dir"]
    assert set(plain["adapter"]) == {
        "method",
        "num_virtual_tokens",
        "prefix_projection",
        "encoder_hidden_size",
    }


# --- pipelines --------------------------------------------------------------------------------------

FIRST = "name: first\nstage: pretrain\nmodel: {base: baichuan2-7b-base}\ndata: {train: a.txt}\n"
SECOND = (
    "name: second\nstage: sft\nmodel: {base: runs/first/merged}\ndata: {train: b.jsonl}\n"
    "for_base:\n  '*nano*': {train: {epochs: 9}}\n"
)


def test_pipeline_chains_recipes(write: Write) -> None:
    write(FIRST, "recipes/first.yaml")
    write(SECOND, "recipes/second.yaml")
    path = write("pipeline: [first.yaml, recipes/second.yaml]\n", "recipes/both.yaml")
    first, second = load_pipeline(path, ["model.base=baichuan2-nano", "adapter.rank=4"])
    assert (first.model.base, second.model.base) == ("baichuan2-nano", "runs/first/merged")
    assert (first.adapter.rank, second.adapter.rank) == (4, 4)
    assert second.train.epochs == 9  # its chain begins with a nano model
    assert [recipe.name for recipe in load_pipeline(Path("recipes/first.yaml"))] == ["first"]
    with pytest.raises(UserError, match="a pipeline of recipes"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "overrides", "part"),
    [
        ("pipeline: first.yaml\n", [], "both.yaml:1: pipeline: expected a list"),
        ("pipeline: []\n", [], "expected a list"),
        ("pipeline: [first.yaml]\nseed: 3\n", [], "no settings, found seed"),
        ("pipeline: [first.yaml, first.yaml]\n", [], "write into runs/first"),
        ("pipeline: [both.yaml]\n", [], "cannot hold another pipeline"),
        ("pipeline: [fist.yaml]\n", [], "did you mean recipes/first.yaml?"),
        ("pipeline: [first.yaml]\n", ["output_dir=x"], "command line: output_dir"),
    ],
)
def test_pipelines_that_are_refused(write: Write, text: str, overrides: list[str], part: str) -> None:
    write(FIRST, "recipes/first.yaml")
    assert part in refusal(write(text, "recipes/both.yaml"), overrides)


# --- running ----------------------------------------------------------------------------------------


def test_run_recipe_runs_the_function_of_the_stage(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path:
        calls.append((recipe.name, resume, overwrite))
        return Path(recipe.output_dir)

    monkeypatch.setattr("finetune.stages._function", lambda stage: record)
    write(FIRST, "recipes/first.yaml")
    path = write("pipeline: [first.yaml, test.yaml]\n", "recipes/both.yaml")
    write(MINIMAL)
    assert run_recipe(path, overwrite=True) == [Path("runs/first"), Path("runs/test")]
    assert run_recipe(load_recipe(Path("recipes/test.yaml")), resume=True) == [Path("runs/test")]
    assert calls == [("first", False, True), ("test", False, True), ("test", True, False)]


def test_run_recipe_refuses_contradictions(write: Write) -> None:
    path = write(MINIMAL)
    with pytest.raises(UserError, match="exclude each other"):
        run_recipe(path, resume=True, overwrite=True)
    with pytest.raises(UserError, match="overrides need a recipe file"):
        run_recipe(load_recipe(path), ["seed=1"])
    with pytest.raises(UserError, match="need a recipe file that each can read"):
        run_recipe(load_recipe(path), processes=2)


def test_stages_name_modules_and_functions() -> None:
    assert {"pretrain", "sft", "reward", "dpo", "ppo"} <= set(STAGES)
    for stage in STAGES.values():
        assert all(target.count(":") == 1 for target in (stage.run, stage.recipe, stage.check))


def test_known_keys_are_complete() -> None:
    keys = known_keys()
    assert keys["train"]
    assert not keys["train.learning_rate"]
    assert {"seed", "model.base", "report.samples", "output_dir"} <= set(keys)
