"""Recipes that are refused: which file, line and key is named, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_recipe import MINIMAL, Write, refusal

from finetune.recipe import load_recipe
from finetune.recipe.messages import suggest
from finetune.stage_table import STAGES

# --- the file ---------------------------------------------------------------------------------------


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


# --- keys and values --------------------------------------------------------------------------------


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


# --- combinations -----------------------------------------------------------------------------------


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
        (
            ["train.activation_offloading=true", "train.gradient_checkpointing=matmul"],
            "train.activation_offloading",
            "it is matmul: set it to true",
        ),
        (
            ["train.gradient_checkpointing=attention", "model.attention=flex_attention"],
            "train.gradient_checkpointing",
            "or model.attention to auto",
        ),
        (
            ["train.activation_offloading=true", "train.compile=true"],
            "train.compile",
            "set one of the two to false",
        ),
        (
            ["train.compile=true", "model.attention=flash_attention_2"],
            "model.attention",
            "model.attention to auto",
        ),
        (["train.compile=true", "train.kernels=liger"], "train.kernels", "train.kernels to auto"),
        (["model.embeddings=int8"], "model.embeddings", "model.quantization to nf4 or int8"),
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
        ["train.gradient_checkpointing=attention"],
        ["train.activation_offloading=true"],
        ["model.embeddings=int8", "model.quantization=nf4"],
    ],
)
def test_combinations_that_work(write: Write, overrides: list[str]) -> None:
    load_recipe(write(MINIMAL), overrides)


@pytest.mark.parametrize("found", ["1", "most", "'true'", "0.5", "[]"])
def test_what_checkpointing_keeps_is_one_of_four(write: Write, found: str) -> None:
    message = refusal(write(MINIMAL), [f"train.gradient_checkpointing={found}"])
    assert "train.gradient_checkpointing: expected true, false, attention or matmul, found" in message


def test_combinations_are_told_beside_wrong_values(write: Write) -> None:
    message = refusal(write(MINIMAL), ["train.epochs=x", "adapter.method=ptuning", "data.packing=true"])
    assert "train.epochs" in message
    assert "data.packing" in message
