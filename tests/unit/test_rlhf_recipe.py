"""Recipes of stages that bring their own sections: read, checked and written back like all others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune.errors import UserError
from finetune.recipe import load_pipeline, load_recipe
from rlhf.dpo.recipe import DPORecipe
from rlhf.ppo.recipe import PPORecipe
from rlhf.reward.recipe import RewardRecipe

ROOT = Path(__file__).resolve().parents[2]
REWARD = "stage: reward\nmodel: {base: baichuan2-nano}\ndata:\n  train: t.jsonl\nreward:\n  margin: 0.1\n"
JOINED = """\
stage: ppo
model: {base: baichuan2-7b-chat}
data: {train: t.jsonl}
ppo: {reward: [{name: helpful, path: a}, {name: harmless, path: b}]}
join: {method: lagrangian, harmless: harmless, cost_limit: 0.5}
for_base:
  baichuan2-nano*:
    join: {multiplier: 4.0, cost_limit: -0.8}
"""
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


@pytest.mark.parametrize("base", ["baichuan2-7b-chat", "baichuan2-nano"])
@pytest.mark.parametrize("method", ["gate", "weighted"])
def test_another_way_of_joining_replaces_the_settings_of_the_first(
    write: Write, base: str, method: str
) -> None:
    recipe = load_recipe(write(JOINED), [f"model.base={base}", f"join.method={method}"])
    assert isinstance(recipe, PPORecipe)
    assert recipe.join.method == method
    assert load_recipe(write(recipe.dump())) == recipe
    with pytest.raises(UserError, match=r"command line: join.multiplier: has no effect with join.method"):
        load_recipe(write(JOINED), [f"model.base={base}", f"join.method={method}", "join.multiplier=2"])


def test_the_same_way_of_joining_keeps_its_settings(write: Write) -> None:
    recipe = load_recipe(write(JOINED), ["model.base=baichuan2-nano", "join.method=lagrangian"])
    assert isinstance(recipe, PPORecipe)
    assert (recipe.join.multiplier, recipe.join.cost_limit) == (4.0, -0.8)


@pytest.mark.parametrize("more", [[], ["join.threshold=much"]])
def test_of_a_misspelt_choice_only_that_is_told(write: Write, more: list[str]) -> None:
    """Not that keys have no effect with the default, which is not what was meant."""
    with pytest.raises(UserError) as caught:
        load_recipe(write(JOINED), ["join.method=lagrangain", *more])
    assert "join.method: expected one of weighted, gate, lagrangian" in str(caught.value)
    assert "has no effect" not in str(caught.value)
    assert str(caught.value).count("\n") == (2 if more else 0)


@pytest.mark.parametrize(
    ("rewards", "names"),
    [
        ("runs/a/adapter", ["a"]),
        ("[runs/a/adapter, old/a/adapter, b:a]", ["a", "a_2", "a_3"]),
        ("[runs/a/adapter, {path: x, name: a}]", ["a_2", "a"]),
        ("[x/a, y/a, {path: z, name: a_2}]", ["a", "a_3", "a_2"]),
        ("[{path: x, name: a.b}, {path: y, name: a_b}]", ["a.b", "a_b"]),
    ],
)
def test_rewards_without_names_get_some_of_their_own(write: Write, rewards: str, names: list[str]) -> None:
    recipe = load_recipe(write(JOINED), [f"ppo.reward={rewards}", "join.method=weighted"])
    assert isinstance(recipe, PPORecipe)
    assert [part.name for part in recipe.reward_parts()] == names


def test_another_choice_replaces_what_only_the_first_reads(write: Write) -> None:
    dpo = load_recipe(write(DPO + "dpo: {loss: robust, label_smoothing: 0.1}\n"), ["dpo.loss=ipo"])
    assert isinstance(dpo, DPORecipe)
    assert dpo.dpo.label_smoothing == 0
    sampling = "data: {train: t.jsonl, sampling: {size: 9, method: temperature, temperature: 0.5}}"
    text = DPO.replace("data: {train: t.jsonl}", sampling)
    drawn = load_recipe(write(text), ["data.sampling.method=quota"]).data.sampling
    assert drawn is not None
    assert (drawn.size, drawn.temperature) == (9, None)


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
        (DPO, ["reward.margin=1"], "reward.margin: unknown key here; it belongs to stage reward"),
        (DPO, ["model.adaptr=x"], "model.adaptr: unknown key; did you mean model.adapter?"),
        (JOINED, ["ppo.join.method=gate"], "ppo.join.method: unknown key; did you mean join.method?"),
        (JOINED, ["ppo.jion.threshhold=1"], "ppo.jion.threshhold: unknown key; did you mean join.threshold?"),
        (JOINED, ["join_method=gate"], "join_method: unknown key; did you mean join.method?"),
        (JOINED, ["join.clip=1"], "join.clip: unknown key; did you mean ppo.clip?"),
        (JOINED, ["method=gate"], "did you mean adapter.method or data.sampling.method or join.method?"),
        (JOINED, ["reward.path=x"], "reward.path: unknown key; did you mean ppo.reward?"),
        (JOINED, ["ppo.reward.weight=2"], "ppo.reward.weight: unknown key; ppo.reward is set as a whole"),
        (JOINED, ["ppo.reward=[{pth: a}]"], "ppo.reward[0].pth: unknown key; did you mean path?"),
        (JOINED, ["ppo.reward=[{name: a, path: x}, {name: a, path: y}, z]", "join.method=weighted"],
         "command line: ppo.reward: 2 rewards have the name a, by which metrics and section join know them"),
        (JOINED, ["train.kl=1"], "command line: train.kl: unknown key"),
        (JOINED.replace("join:", "jion:"), [], "recipe.yaml:5: jion: unknown key; did you mean join?"),
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


def test_a_reward_judge_with_a_plain_name_is_no_function_of_the_user(write: Write) -> None:
    recipe = load_recipe(write("stage: redteam\nmodel: {base: b}\nredteam: {judge: 'reward:harmless'}\n"))
    assert not recipe.user_functions()


def test_plain_stages_do_not_take_the_keys(write: Write) -> None:
    with pytest.raises(UserError, match=r"model.adapter: unknown key"):
        load_recipe(write(DPO.replace("dpo", "sft")), ["model.adapter=x"])


def test_a_key_that_no_step_of_a_pipeline_has_is_looked_for_in_all(write: Write) -> None:
    Path("sft.yaml").write_text(DPO.replace("dpo", "sft"), encoding="utf-8")
    Path("ppo.yaml").write_text(JOINED, encoding="utf-8")
    path = write("pipeline: [sft.yaml, ppo.yaml]\n")
    with pytest.raises(UserError) as error:
        load_pipeline(path, ["ppo.join.method=gate", "dpo.beta=1", "nonsense"])
    assert str(error.value).splitlines()[1:] == [
        "  command line: ppo.join.method: unknown key; did you mean join.method?",
        "  command line: dpo.beta: unknown key here; it belongs to stage dpo",
        "  command line: expected key=value, found 'nonsense'",
    ]


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
