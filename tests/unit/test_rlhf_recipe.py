"""Recipes of stages that bring their own sections: read, checked and written back like all others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune.errors import UserError
from finetune.recipe import load_recipe
from rlhf.dpo.recipe import DPORecipe
from rlhf.reward.recipe import RewardRecipe

ROOT = Path(__file__).resolve().parents[2]
REWARD = "stage: reward\nmodel: {base: baichuan2-nano}\ndata:\n  train: t.jsonl\nreward:\n  margin: 0.1\n"
DPO = "stage: dpo\nmodel: {base: baichuan2-nano}\ndata: {train: t.jsonl}\n"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = Path("recipe.yaml")
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_stage_has_its_own_class_and_sections(write: Write) -> None:
    recipe = load_recipe(write(REWARD), ["reward.mean_score_coef=0.01", "model.adapter=runs/sft/adapter"])
    assert isinstance(recipe, RewardRecipe)
    assert (recipe.reward.margin, recipe.reward.mean_score_coef) == (0.1, 0.01)
    assert recipe.model.adapter == "runs/sft/adapter"
    assert isinstance(load_recipe(write(DPO)), DPORecipe)


def test_the_command_line_chooses_the_stage(write: Write) -> None:
    recipe = load_recipe(write(DPO), ["stage=reward", "reward.margin=1"])
    assert isinstance(recipe, RewardRecipe)


def test_dump_repeats_the_run(write: Write) -> None:
    recipe = load_recipe(write(REWARD), ["data.families=[baichuan, ours]"])
    again = load_recipe(write(recipe.dump()))
    assert again == recipe
    assert list(yaml.safe_load(recipe.dump()))[-2:] == ["reward", "output_dir"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (REWARD.replace("margin", "margn"), [], "recipe.yaml:6: reward.margn: unknown key; did you mean reward.marg"),
        (REWARD.replace("0.1", "-1"), [], "recipe.yaml:6: reward.margin: expected at least 0, found -1"),
        (REWARD, ["reward.margn=1"], "command line: reward.margn: unknown key; did you mean reward.margin?"),
        (REWARD, ["reward=1"], "command line: reward: expected a section"),
        (REWARD, ["data.familes=[a]"], "command line: data.familes: unknown key; did you mean data.families?"),
        (REWARD, ["data.format=alpaca"], "command line: data.format: preferences are recognised"),
        (REWARD, ["adapter.method=prefix"], "command line: adapter.method: stage reward switches adapters"),
        (REWARD, ["adapter.init=pissa"], "command line: adapter.init: pissa changes the base"),
        (DPO, ["model.embeddings=int8", "model.quantization=nf4"], "stage dpo multiplies by the head in 16 bits"),
        (REWARD, ["train.z_loss_weight=1e-4"], "command line: train.z_loss_weight: stage reward has no max-z"),
        (DPO, ["dpo.loss=hinge"], "command line: dpo.loss: expected one of sigmoid, ipo, robust, found 'hinge'"),
        (DPO, ["dpo.loss=robust"], "dpo.label_smoothing: dpo.loss robust corrects for wrong labels"),
        (DPO, ["dpo.loss=ipo", "dpo.label_smoothing=0.1"], "dpo.label_smoothing: has no effect"),
        (DPO, ["data.packing=true"], "command line: data.packing: stage dpo does not pack"),
        (DPO, ["reward.margin=1"], "command line: reward.margin: unknown key"),
        (DPO.replace("train: t.jsonl", "max_rows: 3"), [], "data.train: required, and not given"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(write: Write, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(text), overrides)
    assert message in str(error.value)


def test_problems_of_a_stage_are_told_beside_wrong_values(write: Write) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(DPO), ["dpo.loss=robust", "train.epochs=-1"])
    assert "dpo.label_smoothing: dpo.loss robust" in str(error.value)
    assert "train.epochs: expected more than 0" in str(error.value)


def test_sections_of_a_stage_in_blocks_for_other_bases_are_checked(write: Write) -> None:
    with pytest.raises(
        UserError, match=r"for_base.other.reward.margn: unknown key; did you mean reward.margin"
    ):
        load_recipe(write(REWARD + "for_base:\n  other:\n    reward: {margn: 1}\n"))


def test_plain_stages_do_not_take_the_keys(write: Write) -> None:
    with pytest.raises(UserError, match=r"model.adapter: unknown key"):
        load_recipe(write(DPO.replace("dpo", "sft")), ["model.adapter=x"])


def test_reading_a_recipe_imports_nothing_heavy(write: Write) -> None:
    path = write(REWARD).resolve()
    script = (
        "import sys; sys.orig_argv[1:] = ['-m', 'finetune']\nfrom finetune.recipe import load_recipe\n"
        f"load_recipe({str(path)!r})\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'peft', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
