"""Several rewards as one: what is paid, what is learned of the price of harm, and prompts in a set ratio."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from finetune.errors import UserError
from finetune.recipe import load_recipe
from rlhf.ppo.combine import Lagrangian, WeightedSum, make_combination
from rlhf.ppo.prompts import Prompt, iteration_prompts
from rlhf.ppo.recipe import PPORecipe, portions
from rlhf.ppo.reward_sections import Join
from rlhf.safety.joining import update_multiplier

SCORES = {
    "helpful": torch.tensor([2.0, -1.0, 0.5, 3.0]),
    "harmless": torch.tensor([1.0, 0.0, -0.25, -4.0]),
    "short": torch.tensor([1.0, 1.0, 0.0, 0.0]),
}
WEIGHTS = {"helpful": 1.0, "harmless": 1.0, "short": 0.5}
RECIPE = """stage: ppo
model: {base: baichuan2-nano}
data: {train: [a.jsonl, b.jsonl], max_length: 64}
ppo:
  reward: [{name: helpful, path: "m:f"}, {name: harmless, path: "m:g"}]
  max_new_tokens: 16
"""


def test_weighted_gate_and_lagrangian_pay_what_they_say() -> None:
    helpful = [2.5, -0.5, 0.5, 3.0]  # with half of what being short is worth
    weighted = make_combination(Join(), WEIGHTS)(SCORES)
    assert weighted.tolist() == pytest.approx([3.5, -0.5, 0.25, -1.0])
    gated = make_combination(Join(method="gate", threshold=0.5), WEIGHTS)(SCORES)
    assert gated.tolist() == pytest.approx([2.5, -0.5, -0.75, -4.5])
    priced = make_combination(Join(method="lagrangian", multiplier=3.0), WEIGHTS)(SCORES)
    expected = [(a + 3 * b) / 4 for a, b in zip(helpful, SCORES["harmless"].tolist())]
    assert priced.tolist() == pytest.approx(expected)


def test_only_a_lagrangian_learns() -> None:
    for join in (Join(), Join(method="gate")):
        combination = make_combination(join, WEIGHTS)
        assert combination.learn(SCORES, 4, lambda t: t) == {}
        assert combination.state_dict() == {}


def lagrangian() -> Lagrangian:
    return Lagrangian("harmless", WeightedSum({"helpful": 1.0}), multiplier=2.0, cost_limit=0.1, rate=0.5)


def test_the_multiplier_follows_the_moving_average_of_the_cost() -> None:
    price = lagrangian()
    used = price.learn({"harmless": torch.tensor([-1.0, 0.0])}, 2, lambda t: t)
    assert used == {"multiplier": 2.0, "cost": 0.5}, "what the iteration was paid with, not the next price"
    first = update_multiplier(2.0, -0.5, cost_limit=0.1, learning_rate=0.5)
    assert price.multiplier == pytest.approx(first)
    price.learn({"harmless": torch.tensor([1.0, 1.0])}, 2, lambda t: t)
    assert price.average == pytest.approx(0.5 * -0.5 + 0.5 * 1.0)
    assert price.multiplier == pytest.approx(
        update_multiplier(first, price.average, cost_limit=0.1, learning_rate=0.5)
    )


def test_a_saved_multiplier_goes_on_as_if_it_had_not_stopped() -> None:
    generator = torch.Generator().manual_seed(0)
    course = [{"harmless": torch.randn(4, generator=generator) - 0.5} for _ in range(6)]
    straight, stopped, resumed = lagrangian(), lagrangian(), lagrangian()
    expected = [straight.learn(each, 4, lambda t: t) for each in course]
    found = [stopped.learn(each, 4, lambda t: t) for each in course[:3]]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))  # as trainer_state.json holds it
    found += [resumed.learn(each, 4, lambda t: t) for each in course[3:]]
    assert found == expected
    assert resumed.multiplier == straight.multiplier != 2.0


def test_all_processes_learn_the_same_price() -> None:
    whole = torch.tensor([-1.0, 0.5, -2.0, 0.25, -0.5])
    alone = lagrangian()
    alone.learn({"harmless": whole}, 5, lambda t: t)
    shared = lagrangian()
    total = whole.double().sum()
    shared.learn({"harmless": whole[::2]}, 5, lambda _: total)  # what summing over processes gives
    assert shared.multiplier == pytest.approx(alone.multiplier)


# --- prompts ------------------------------------------------------------------------------------------------


def test_portions_add_up_and_are_as_near_as_can_be() -> None:
    assert portions([0.5, 0.5], 9) == [5, 4]
    assert portions([0.7, 0.2, 0.1], 10) == [7, 2, 1]
    assert portions([1 / 3, 1 / 3, 1 / 3], 48) == [16, 16, 16]
    assert portions([0.9, 0.1], 4) == [4, 0]


def test_every_iteration_has_the_shares_and_each_prompt_its_turn() -> None:
    prompts = [
        Prompt([], [source, n], source=source) for source, size in enumerate((5, 30, 7)) for n in range(size)
    ]
    seen: Counter[tuple[int, ...]] = Counter()
    for iteration in range(15):
        chosen = iteration_prompts(prompts, iteration, batch_size=12, seed=3, shares=[0.5, 0.25, 0.25])
        assert [p.source for p in chosen] == [0] * 6 + [1] * 3 + [2] * 3
        again = iteration_prompts(prompts, iteration, batch_size=12, seed=3, shares=[0.5, 0.25, 0.25])
        assert chosen == again, "of the iteration alone: a resumed run takes the same"
        seen.update(tuple(p.ids) for p in chosen)
    for source, size in enumerate((5, 30, 7)):
        counts = [seen[source, n] for n in range(size)]
        assert max(counts) - min(counts) <= 1


# --- recipes ------------------------------------------------------------------------------------------------


def write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_effective_recipe_has_the_keys_of_its_method_and_repeats_the_run(tmp_path: Path) -> None:
    overrides = ["join.method=lagrangian", "join.cost_limit=0.2", "ppo.prompt_shares=[0.6, 0.4]"]
    recipe = load_recipe(write(tmp_path), overrides)
    assert isinstance(recipe, PPORecipe)
    assert recipe.join.cost_limit == 0.2
    assert "threshold" not in recipe.dump()
    assert load_recipe(write(tmp_path, recipe.dump())) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["join.method=gates"], "join.method: expected one of weighted, gate, lagrangian, found 'gates'"),
        (["join.threshold=1"], "join.threshold: has no effect with join.method weighted"),
        (["join.method=gate", "join.multiplier=1"], "join.multiplier: has no effect with"),
        (["join.method=gate", "join.harmless=harmles"], "needs a reward of the name harmles and another one"),
        (["join.method=gate", "ppo.reward=m:harmless"], "needs a reward of the name harmless and another one"),
        (["join.method=lagrangian", "join.multiplier=11"], "join.multiplier: is above"),
        (
            ["join.method=gate", 'ppo.reward=[{path: "m:helpful"}, {path: "m:harmless", weight: 2}]'],
            "ppo.reward: the weight of harmless has no effect",
        ),
        (['ppo.reward=[{path: "m:a", weight: 0}, {path: "m:b", weight: 0}]'], "all weights are 0"),
        (['ppo.reward=[{path: "m:a", weight: much}]'], "ppo.reward[0].weight: expected a number"),
        (["ppo.prompt_shares=[1.0]"], "expected one for each of the 2 sources of data.train, found 1"),
        (["ppo.prompt_shares=[0.5, 0.4]"], "add up to 0.9, expected 1"),
        (["ppo.prompt_shares=[0.999, 0.001]"], "leave a source without prompts in a batch of 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_or_mixed_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path), overrides)
    assert message in str(error.value)
