"""Recipes: what is accepted, what is refused and how it is said, and that a dump repeats the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune.errors import UserError
from finetune.recipe import Recipe, load_pipeline, load_recipe, run_recipe
from finetune.recipe.messages import known_keys, suggest
from finetune.recipe.schema import Adapter, Data, Model, Report, Train
from finetune.recipe.yaml_text import parse_yaml
from finetune.stage_table import STAGES

MINIMAL = "stage: sft\nmodel:\n  base: baichuan2-7b-chat\ndata:\n  train: train.jsonl\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a recipe below a fresh current directory and return its relative path."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "recipes/test.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


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


# --- refusals: the file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty"]),
        ("# only a comment\n", ["empty"]),
        ("- a\n- b\n", ["expected keys and values", "a list of 2"]),
        ("just text\n", ["expected keys and values"]),
        ("stage: [sft\nmodel: {}\n", [":2: not valid YAML"]),
        ("stage: sft\n\tmodel: x\n", [":2: not valid YAML", "spaces, not with tabs"]),
        ("stage: sft\n---\nstage: sft\n", ["not valid YAML"]),
        ("stage: sft\nname: a: b\n", [":2: not valid YAML", "quotes"]),
        ("stage: !!python/object/apply:os.system [ls]\n", [":1: not valid YAML"]),
        ("stage: sft\nname: \x01\n", [":2: not valid YAML"]),
        ("a: " + "[" * 5000, ["nested too deeply"]),
        ("a: 0x_\n", ["not valid YAML", "in quotes"]),
        ("a: &a [*a]\n", [":1: a value that contains itself"]),
        ("1: 2\n", ["keys that are text"]),
    ],
)
def test_files_that_are_no_recipes(write: Write, text: str, parts: list[str]) -> None:
    message = refusal(write(text))
    assert message.startswith("recipes/test.yaml")
    for part in parts:
        assert part in message


def test_missing_file_names_the_nearest(write: Write) -> None:
    write(MINIMAL, "recipes/qlora_medical.yaml")
    assert "did you mean recipes/qlora_medical.yaml?" in refusal(Path("recipes/qlora_medcal.yaml"))
    assert "no such recipe file" in refusal(Path("nowhere/x.yaml"))


def test_folder_in_place_of_a_recipe(write: Write) -> None:
    write(MINIMAL, "runs/x/recipe.yaml")
    assert "runs/x/recipe.yaml" in refusal(Path("runs/x"))


def test_binary_file(write: Write) -> None:
    path = write("")
    path.write_bytes(b"stage: \xff\xfe")
    assert "not UTF-8" in refusal(path)


# --- refusals: keys and values ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "near"),
    [
        (("train", "learning_rat"), ["train.learning_rate"]),
        (("learning_rate",), ["train.learning_rate"]),
        (("learning_rat",), ["train.learning_rate"]),
        (("training", "learning_rate"), ["train.learning_rate"]),
        (("train", "rank"), ["adapter.rank"]),
        (("trian",), ["train"]),
        (("ouput_dir",), ["output_dir"]),
        (("lr",), ["train.learning_rate"]),
        (("model", "load_in_4bit"), ["model.quantization"]),
        (("for_bases",), ["for_base"]),
        (("xyzzy",), []),
    ],
)
def test_nearest_key(key: tuple[str, ...], near: list[str]) -> None:
    assert suggest(key) == near


def test_all_problems_in_one_message_by_line(write: Write) -> None:
    path = write(
        """\
stage: sfft
learning_rate: 3
model:
  base: x
  quantization: int4
  quantization: nf5
  revision: 2023
adapter:
  rank: true
  targets: W_pack
  init: pisa
data:
  train: [a.jsonl, {path: b, weigth: 2}, {path: c, weight: -1}, 5]
  max_length: 3
  validation: v.jsonl
  validation_share: 0.1
train:
  batch_size: 0
  betas: [0.9]
  epochs: "3"
  learning_rate: .nan
""",
    )
    message = refusal(path, ["train.seed=1", "nonsense", "train.log_every=[1", "pipeline=x"])
    lines = message.splitlines()
    assert lines[0] == f"recipes/test.yaml: {len(lines) - 1} problems"
    at = "recipes/test.yaml"
    expected = [
        f"{at}:1: stage: expected one of {', '.join(STAGES)}, found 'sfft'",
        f"{at}:2: learning_rate: unknown key; did you mean train.learning_rate?",
        f"{at}:6: model.quantization: given twice, first in line 5",
        f"{at}:6: model.quantization: expected one of none, int8, nf4, found 'nf5' (text); did you mean nf4?",
        f"{at}:7: model.revision: expected text, found 2023; put it in quotes if it is meant as text",
        f"{at}:9: adapter.rank: expected a whole number, found true (a truth value)",
        f"{at}:10: adapter.targets: expected all-linear or a list such as [W_pack, o_proj], found 'W_pack'",
        f"{at}:13: data.train[1].weigth: unknown key; did you mean weight?",
        f"{at}:13: data.train[2].weight: expected more than 0, found -1",
        f"{at}:13: data.train[3]: expected a path or {{path: ..., weight: ..., format: ...}}, found 5",
        f"{at}:14: data.max_length: expected at least 16, found 3",
        f"{at}:16: data.validation_share: data.validation names held-out data already: remove one of the two",
        f"{at}:18: train.batch_size: expected a number of at least 1, or auto, found 0",
        f"{at}:19: train.betas: expected 2 entries, found a list of 1",
        f"{at}:20: train.epochs: expected a number, found '3' (text)",
        f"{at}:21: train.learning_rate: expected a finite number, found nan",
        "command line: train.seed: unknown key; did you mean seed?",
        "command line: expected key=value, found 'nonsense'",
        "command line: pipeline: can only stand in a file",
    ]
    for text in expected:
        assert f"  {text}" in lines, text
    assert any(line.startswith("  command line: train.log_every: '[1' is not a YAML value") for line in lines)
    assert any(
        line.startswith("  recipes/test.yaml:11: adapter.init: expected one of default") for line in lines
    )
    assert len(lines) == len(expected) + 3


def test_missing_keys_say_what_they_are_for(write: Write) -> None:
    message = refusal(write("model: {}\n"))
    assert "stage: required, and not given: what to do: pretrain, sft" in message
    assert "recipes/test.yaml:1: model.base: required, and not given: catalogue name" in message
    assert "data: required, and not given: it holds data.train" in message


def test_one_problem_is_one_line(write: Write) -> None:
    message = refusal(write(MINIMAL + "train:\n  learning_rat: 1\n"))
    assert (
        message == "recipes/test.yaml:7: train.learning_rat: unknown key; did you mean train.learning_rate?"
    )


def test_blocks_for_other_bases_are_checked_too(write: Write) -> None:
    message = refusal(
        write(
            MINIMAL
            + "for_base:\n  nano*:\n    train: {epoch: 3}\n    adapter: {rank: x}\n"
            + "  other*: 3\n  third*:\n    model: {base: y}\n"
        )
    )
    assert (
        "recipes/test.yaml:8: for_base.nano*.train.epoch: unknown key; did you mean train.epochs?" in message
    )
    assert (
        "recipes/test.yaml:9: for_base.nano*.adapter.rank: expected a whole number, found 'x' (text)"
        in message
    )
    assert "recipes/test.yaml:10: for_base.other*: expected settings, found 3" in message
    assert "recipes/test.yaml:12: for_base.third*.model.base: cannot change the base" in message


def test_problem_in_a_matching_block_names_its_line(write: Write) -> None:
    message = refusal(write(MINIMAL + "for_base:\n  baichuan2*:\n    train:\n      epochs: -1\n"))
    assert message == "recipes/test.yaml:9: train.epochs: expected more than 0, found -1"


@pytest.mark.parametrize("name", ["a/b", "", "a\\b"])
def test_names_are_no_paths(write: Write, name: str) -> None:
    assert "name: expected" in refusal(write(MINIMAL), [f"name='{name}'"])


# --- refusals: combinations -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        (["adapter.method=ptuning", "data.packing=true"], "data.packing", "set data.packing to false"),
        (["adapter.method=prefix", "data.packing=true"], "data.packing", "set data.packing to false"),
        (
            ["adapter.method=prefix", "train.gradient_checkpointing=true"],
            "train.gradient_checkpointing",
            "key/value cache",
        ),
        (["adapter.dora=true", "model.quantization=int8"], "adapter.dora", "nf4 or none"),
        (["adapter.dora=true", "adapter.init=olora"], "adapter.dora", "adapter.init to default"),
        (["adapter.init=pissa", "model.quantization=nf4"], "adapter.init", "olora"),
        (["adapter.init=pissa_niter_4", "model.quantization=int8"], "adapter.init", "olora"),
        (["adapter.init=loftq", "model.quantization=nf4"], "adapter.init", "model.quantization to none"),
        (["adapter.init=orthogonal", "model.quantization=nf4"], "adapter.init", "adapter.init to default"),
        (["adapter.init=orthogonal", "adapter.rank=3"], "adapter.rank", "set it to 4"),
        (["adapter.method=prefix", "adapter.encoder_hidden_size=8"], "adapter.encoder_hidden_size", "true"),
        (["adapter.method=ptuning", "adapter.encoder_layers=3"], "adapter.encoder_layers", "lstm"),
        (
            ["adapter.method=ptuning", "adapter.encoder=none", "adapter.encoder_hidden_size=8"],
            "adapter.encoder_hidden_size",
            "mlp or lstm",
        ),
        (["adapter.num_virtual_tokens=3"], "adapter.num_virtual_tokens", "method ptuning and prefix"),
        (["data.validation=v", "data.validation_share=0.1"], "data.validation_share", "one of the two"),
        (["train.eval_every=5"], "train.eval_every", "data.validation_share"),
        (["train.warmup_ratio=0.1"], "train.warmup_ratio", "constant_with_warmup"),
        (["stage=pretrain", "data.system=x"], "data.system", "remove this key"),
    ],
)
def test_combinations_that_cannot_work(write: Write, overrides: list[str], key: str, remedy: str) -> None:
    message = refusal(write(MINIMAL), overrides)
    assert message.startswith(f"command line: {key}: ")
    assert remedy in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.init=olora", "model.quantization=nf4"],
        ["adapter.init=olora", "model.quantization=int8"],
        ["adapter.dora=true", "model.quantization=nf4"],
        ["adapter.init=pissa"],
        ["adapter.init=loftq"],
        ["adapter.method=ptuning", "adapter.encoder=lstm", "adapter.encoder_layers=3"],
        ["adapter.method=ptuning", "adapter.encoder=none"],
        ["adapter.method=prefix", "adapter.prefix_projection=true", "adapter.encoder_hidden_size=8"],
        ["data.validation_share=0.1", "train.eval_every=5"],
        ["train.schedule=cosine", "train.warmup_ratio=0.1"],
    ],
)
def test_combinations_that_work(write: Write, overrides: list[str]) -> None:
    load_recipe(write(MINIMAL), overrides)


def test_combinations_are_told_beside_wrong_values(write: Write) -> None:
    message = refusal(write(MINIMAL), ["train.epochs=x", "adapter.method=ptuning", "data.packing=true"])
    assert "train.epochs" in message
    assert "data.packing" in message


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
