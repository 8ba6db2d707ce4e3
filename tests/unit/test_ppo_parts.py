"""Prompts, rewards, signs of trouble, and an update that does not depend on how it is shared out."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, local
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_model import tiny_model, write_rows
from tiny_ppo import write_ppo_recipe

from finetune.baichuan.load import load_tokenizer, resolve_base
from finetune.errors import UserError
from finetune.recipe import load_recipe
from finetune.train.run_folder import RunFolder
from rlhf.ppo.build import build_models
from rlhf.ppo.errors import NotFinite, RunStopped
from rlhf.ppo.monitor import Monitor, signs
from rlhf.ppo.processes import Processes
from rlhf.ppo.prompts import load_prompts, prompt_order, spread
from rlhf.ppo.reward_functions import numeral_share
from rlhf.ppo.rewards import Answered, Part, Rewards, WeightedSum
from rlhf.ppo.rollout import as_rollout
from rlhf.ppo.trainer import PPOTrainer

EOS = 2

# --- prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "头痛"}, ["头痛"]),
        ({"question": "头痛", "answer": "休息"}, ["头痛"]),
        ({"instruction": "翻译", "input": "你好", "output": "hello"}, ["翻译\n你好"]),
        ({"messages": [{"role": "user", "content": "头痛"}]}, ["头痛"]),
        (
            {"messages": [{"role": "user", "content": "头痛"}, {"role": "assistant", "content": "休息"}]},
            ["头痛"],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "头痛"},
                    {"from": "gpt", "value": "休息"},
                    {"from": "human", "value": "还痛"},
                ]
            },
            ["头痛", "休息", "还痛"],
        ),
        (
            {"messages": [{"role": "user", "content": "头痛"}], "responses": [{"text": "休息", "rank": 1}]},
            ["头痛"],
        ),
        ({"prompt": "头痛", "chosen": "休息", "rejected": "不管"}, ["头痛"]),
        ({"prompt": "头痛", "system": "你是医生"}, ["你是医生", "头痛"]),
        (
            {
                "chosen": [{"role": "user", "content": "头痛"}, {"role": "assistant", "content": "休息"}],
                "rejected": [{"role": "user", "content": "头痛"}, {"role": "assistant", "content": "不管"}],
            },
            ["头痛"],
        ),
    ],
)
def test_prompts_of_any_layout(
    tiny_bases: dict[str, Path], tmp_path: Path, row: dict[str, Any], expected: list[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row, row])
    recipe: Any = load_recipe(write_ppo_recipe(tmp_path, tiny_bases["rope"]), [f"data.train={path}"])
    tokenizer = load_tokenizer(tiny_bases["rope"])
    (prompt,) = load_prompts(recipe, tokenizer).train  # twice the same is once
    assert [message["content"] for message in prompt.messages] == expected
    assert prompt.ids[-1] == 196
    assert prompt.messages[-1]["role"] == "user"


def test_prompts_held_out(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe: Any = load_recipe(write_ppo_recipe(tmp_path, tiny_bases["rope"]), ["data.validation_share=0.33"])
    found = load_prompts(recipe, load_tokenizer(tiny_bases["rope"]))
    assert (len(found.train), len(found.held_out)) == (4, 2)
    recipe.data.validation = recipe.data.train
    recipe.data.validation_share = 0.0
    with pytest.raises(UserError, match="no prompts are left"):  # what is held out is not trained on
        load_prompts(recipe, load_tokenizer(tiny_bases["rope"]))


def test_prompt_order_takes_each_before_any_again() -> None:
    taken = [index for iteration in range(14) for index in prompt_order(7, iteration, 4, seed=5)]
    rounds = [taken[start : start + 7] for start in range(0, 56, 7)]
    assert all(sorted(one) == list(range(7)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert prompt_order(3, 0, 8, seed=5) == prompt_order(3, 0, 8, seed=5)
    assert prompt_order(7, 0, 4, seed=5) != prompt_order(7, 0, 4, seed=6)
    assert spread(list(range(10)), 2) == [2, 7]  # type: ignore[arg-type]


# --- rewards ----------------------------------------------------------------------------------------------------


def answered(*texts: str) -> list[Answered]:
    return [Answered([{"role": "assistant", "content": text}], [1]) for text in texts]


def test_parts_are_normalised_and_joined() -> None:
    parts = [
        Part(
            "long", "x:long", lambda some: [len(a.messages[-1]["content"]) for a in some], 0.5, mean=2, std=4
        ),
        Part("one", "x:one", lambda some: [1.0] * len(some), -1.0),
    ]
    scores, raw = Rewards(parts)(answered("", "好好好好好好"))
    assert scores.tolist() == [0.5 * -0.5 - 1, 0.5 * 1 - 1]
    assert raw["long"].tolist() == [0, 6]


def test_another_combination_sees_normalised_scores() -> None:
    class Gate(WeightedSum):
        def __call__(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.where(parts["safe"] > 0, parts["useful"], parts["safe"])

    parts = [
        Part("useful", "x:u", lambda some: [5.0, 5.0], mean=1, std=2),
        Part("safe", "x:s", lambda some: [1.0, -1.0]),
    ]
    assert Rewards(parts, Gate({}))(answered("a", "b"))[0].tolist() == [2.0, -1.0]


def test_numeral_share() -> None:
    def share(text: str) -> float:
        return numeral_share([[{"role": "user", "content": "一"}, {"role": "assistant", "content": text}]])[0]

    assert share("一二三四好好好好") == 0.5
    assert share("一 二 三 四 五 六 七 八 ") == 1
    assert share("一") == pytest.approx(1 / 8)
    assert share("一" * 120) == 0.5
    assert share("") == 0


# --- signs ------------------------------------------------------------------------------------------------------


def course(length: int, **ends: tuple[float, float]) -> list[dict[str, float]]:
    """A run in which all is well, and the named numbers go from one value to another."""
    well = {
        "kl": (1, 5),
        "reward": (0, 1),
        "reward_std": (0.5, 0.5),
        "response_length": (50, 50),
        "repetition": (0.05, 0.05),
        "entropy": (3, 2.5),
        "eos_share": (0.9, 0.9),
    }
    return [
        {key: a + (b - a) * i / (length - 1) for key, (a, b) in {**well, **ends}.items()}
        for i in range(length)
    ]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({}, set()),
        ({"kl": (1, 90)}, {"kl"}),
        ({"response_length": (50, 150)}, {"length"}),
        ({"response_length": (50, 150), "reward": (0, 0)}, set()),
        ({"repetition": (0.05, 0.8)}, {"repetition"}),
        ({"entropy": (3, 0.01)}, {"entropy"}),
        ({"eos_share": (0.9, 0.1)}, {"eos"}),
        ({"eos_share": (0.01, 0.02)}, {"eos"}),
        ({"reward_std": (0, 0), "reward": (1, 1)}, {"equal"}),
    ],
)
def test_signs(ends: dict[str, tuple[float, float]], expected: set[str]) -> None:
    assert set(signs(course(60, **ends), kl_bound=30)) == expected
    assert signs([], kl_bound=30) == {}
    assert signs(course(5, **ends), kl_bound=1000) == {}


def test_warnings_are_told_in_order_also_after_a_resume(tmp_path: Path) -> None:
    lines = course(60, response_length=(50, 150), kl=(1, 40))
    run = RunFolder(tmp_path)
    run.metrics.write_text("".join(f"{json.dumps({'step': n, **line})}\n" for n, line in enumerate(lines, 1)))
    recipe: Any = SimpleNamespace(ppo=SimpleNamespace(kl_warning=30))
    told = Monitor(run, recipe, Console(), main=True, iteration=60).warnings
    assert [message.partition(" ")[0] for message in told] == ["responses", "the"]  # length first, then KL
    assert "30." in told[1]  # as of when it was seen


def test_rounding_does_not_tell_equal_rewards_apart() -> None:
    assert "equal" in signs(course(60, reward_std=(3e-9, 3e-9), reward=(0.3, 0.3)), kl_bound=30)
    assert "equal" not in signs(course(60, reward_std=(1e-3, 1e-3), reward=(0.3, 0.3)), kl_bound=30)


# --- an update, however it is shared out ------------------------------------------------------------------------

PROMPTS = [[195, 1400 + row, 196] for row in range(5)]
RESPONSES = [[1600, 1601, EOS], [EOS], [1650, 1651, 1652, 1653], [1500, EOS], [1700, 1701, 1702]]


class Together:
    """As many processes as threads: their sums are real, everything else of accelerate is not needed."""

    def __init__(self, processes: int, dtype: torch.dtype | None = None) -> None:
        self.num_processes = processes
        self.dtype = dtype
        self._barrier = Barrier(processes, timeout=120)
        self._posted: list[Any] = [None] * processes
        self._thread = local()

    def enter(self, rank: int) -> None:
        self._thread.rank = rank

    @property
    def process_index(self) -> int:
        return self._thread.rank

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        self._posted[self.process_index] = tensor
        self._barrier.wait()
        total = sum(self._posted)
        self._barrier.wait()
        return total  # type: ignore[return-value]

    device = torch.device("cpu")

    def autocast(self) -> Any:
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None)


def learned(
    recipe: Any,
    base: Any,
    tokenizer: Any,
    processes: int,
    *,
    reward: Callable[[Any], list[float]],
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and metrics after one iteration of given responses."""
    accelerator = Together(processes, dtype)
    built = [build_models(recipe, base, tokenizer, batch_size=2) for _ in range(processes)]

    def process(rank: int) -> Any:
        accelerator.enter(rank)
        models, head, _ = built[rank]
        for parameter in models.lm.parameters():
            if dtype is not None and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        rewards = Rewards([Part("judge", "x:judge", reward)])
        prompts = [SimpleNamespace(ids=ids, messages=[{"role": "user", "content": ""}]) for ids in PROMPTS]
        trainer = PPOTrainer(recipe, models, head, rewards, tokenizer, prompts, accelerator)  # type: ignore[arg-type]
        trainer.iteration = 1  # the actor learns
        mine = slice(rank, None, processes)
        rollout = as_rollout(PROMPTS[mine], RESPONSES[mine], eos_token_id=EOS, device=torch.device("cpu"))
        trainer.answer = lambda *_, **__: rollout  # type: ignore[method-assign]
        trainer.next_prompts = lambda: prompts[mine]  # type: ignore[method-assign,assignment,return-value]
        metrics, _ = trainer.step()
        tensors = {f"{n}:{k}": p.detach() for n, each in trainer.parameters.items() for k, p in each.items()}
        return tensors, metrics

    with ThreadPoolExecutor(processes) as pool:
        first, *_ = pool.map(process, range(processes))
    return first


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 5), (2, 2), (3, 1)])
def test_an_update_does_not_depend_on_processes_or_micro_batches(
    tiny_bases: dict[str, Path], tmp_path: Path, processes: int, micro_batch: int
) -> None:
    """Same responses, same minibatches: the same weights and the same numbers, whoever computes what."""
    path = write_ppo_recipe(
        tmp_path,
        tiny_bases["rope"],
        ppo={"batch_size": 5, "minibatch_size": 3, "critic_from_reward": False, "whiten_rewards": True},
    )
    base = resolve_base(str(tiny_bases["rope"]))
    tokenizer = load_tokenizer(base.folder)

    def reward(some: Any) -> list[float]:
        return [float(sum(each.ids) % 7) for each in some]

    expected, whole = learned(load_recipe(path, ["train.batch_size=2"]), base, tokenizer, 1, reward=reward)
    recipe = load_recipe(path, [f"train.batch_size={micro_batch}"])
    found, metrics = learned(recipe, base, tokenizer, processes, reward=reward)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=2e-3, atol=2e-4, msg=key)
    for key, value in whole.items():
        if not key.endswith("seconds"):
            assert metrics[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key
    assert metrics["updates"] == 4
    assert metrics["approx_kl"] > 0


def test_where_one_process_stops_all_do() -> None:
    accelerator: Any = Together(3)

    def process(rank: int) -> str:
        accelerator.enter(rank)
        try:
            with Processes(accelerator).all_or_none():
                if rank == 1:
                    raise NotFinite("the actor's probabilities are not finite")
        except RunStopped as error:
            return str(error)
        return "went on"

    with ThreadPoolExecutor(3) as pool:
        others, own, _ = pool.map(process, range(3))
    assert own == "the actor's probabilities are not finite"
    assert others == "training stopped, since another process cannot go on"


def test_an_update_in_bfloat16(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """As on a GPU: a 16-bit base under autocast, adapters and all that is learned from in 32 bits."""
    path = write_ppo_recipe(
        tmp_path, tiny_bases["alibi"], ppo={"batch_size": 5, "minibatch_size": 5, "epochs": 1}
    )
    base = resolve_base(str(tiny_bases["alibi"]))
    tensors, metrics = learned(
        load_recipe(path),
        base,
        load_tokenizer(base.folder),
        1,
        reward=lambda some: list(range(len(some))),
        dtype=torch.bfloat16,
    )
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    assert metrics["kl"] == 0
    assert metrics["ratio"] == pytest.approx(1, abs=0.05)
    assert metrics["grad_norm"] > 0


def test_early_stop_ends_the_update(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    path = write_ppo_recipe(
        tmp_path,
        tiny_bases["rope"],
        ppo={"batch_size": 5, "epochs": 6, "early_stop_kl": 1e-3, "minibatch_size": 5},
    )
    base = resolve_base(str(tiny_bases["rope"]))
    recipe = load_recipe(path)
    _, metrics = learned(
        recipe, base, load_tokenizer(base.folder), 1, reward=lambda some: list(range(len(some)))
    )
    assert 1 <= metrics["updates"] < 6


# --- reward adapters --------------------------------------------------------------------------------------------


def write_reward(folder: Path, base_folder: Path, *, seed: int = 3) -> Path:
    """A reward adapter with random weights, as stage reward leaves it."""
    from test_ppo_models import config, randomise

    from rlhf.ppo.models import SharedBase
    from rlhf.reward.adapter import RewardInfo, ScoreHead, save_head, vocabulary_digest

    base = resolve_base(str(base_folder))
    models = SharedBase(tiny_model("rope"))
    models.lm.name_or_path = base.identity
    models.add_new("judge", config())
    randomise(models, "judge", seed)
    models.save("judge", folder)
    head = ScoreHead(64)
    head.weight.data = torch.linspace(-1, 1, 64)
    tokenizer = load_tokenizer(base.folder)
    info = RewardInfo(base.identity, vocabulary_digest(tokenizer), 0.5, 2.0, 100, 0.8, 64)
    save_head(folder, head, info)
    return folder


def scored_alone(folder: Path, answered: list[Answered]) -> list[float]:
    """What a reward adapter says on a base of its own."""
    from rlhf.reward.adapter import load_reward

    alone = load_reward(folder, tiny_model("rope"))
    decoder = alone.model.eval().get_base_model().model
    with torch.no_grad():
        hidden = [decoder(input_ids=torch.tensor([each.ids])).last_hidden_state for each in answered]
        return [float(alone.head(states[0, -1])) for states in hidden]


@pytest.fixture
def reward_folder(tiny_bases: dict[str, Path], tmp_path: Path) -> Path:
    """A reward adapter."""
    return write_reward(tmp_path / "judge", tiny_bases["rope"])


def test_a_reward_adapter_scores_on_the_shared_base(
    tiny_bases: dict[str, Path], tmp_path: Path, reward_folder: Path
) -> None:
    """As on a base of its own; normalised with what is stored beside it; and the critic begins as it."""
    recipe: Any = load_recipe(
        write_ppo_recipe(tmp_path, tiny_bases["rope"], ppo={"reward": str(reward_folder)})
    )
    base = resolve_base(str(tiny_bases["rope"]))
    tokenizer = load_tokenizer(base.folder)
    models, head, rewards = build_models(recipe, base, tokenizer, batch_size=2)
    some = [Answered([], [*prompt, *response]) for prompt, response in zip(PROMPTS, RESPONSES)]
    scores, raw = rewards(some)

    expected = scored_alone(reward_folder, some)
    assert raw["judge"].tolist() == pytest.approx(expected, abs=1e-4)
    assert scores.tolist() == pytest.approx([(score - 0.5) / 2 for score in expected], abs=1e-4)

    from rlhf.ppo.rollout import last_hidden

    with torch.no_grad():
        begun = head(last_hidden(models, "critic", [each.ids for each in some]))
    torch.testing.assert_close(begun, scores, rtol=1e-4, atol=1e-4)
    trained = {key for key, p in models.lm.named_parameters() if p.requires_grad}
    assert trained
    assert all(".actor." in key or ".critic." in key for key in trained)


def test_names_that_differ_little_are_two_rewards(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    folders = {
        name: write_reward(tmp_path / name, tiny_bases["rope"], seed=seed)
        for seed, name in enumerate(("a.b", "a_b"))
    }
    reward = [{"name": name, "path": str(folder)} for name, folder in folders.items()]
    recipe: Any = load_recipe(write_ppo_recipe(tmp_path, tiny_bases["rope"], ppo={"reward": reward}))
    base = resolve_base(str(tiny_bases["rope"]))
    _, _, rewards = build_models(recipe, base, load_tokenizer(base.folder), batch_size=2)
    some = [Answered([], [*prompt, *response]) for prompt, response in zip(PROMPTS, RESPONSES)]
    _, raw = rewards(some)
    for name, folder in folders.items():
        assert raw[name].tolist() == pytest.approx(scored_alone(folder, some), abs=1e-4)


def test_a_reward_adapter_for_another_base_is_refused(
    tiny_bases: dict[str, Path], tmp_path: Path, reward_folder: Path
) -> None:
    from tiny_run import finetune

    recipe = write_ppo_recipe(tmp_path / "other", tiny_bases["alibi"], ppo={"reward": str(reward_folder)})
    assert "was trained on" in finetune("check", recipe, expect=2)
    info = json.loads((reward_folder / "reward.json").read_text())
    (reward_folder / "reward.json").write_text(json.dumps({**info, "vocabulary": "of another tokenizer"}))
    recipe = write_ppo_recipe(tmp_path / "same", tiny_bases["rope"], ppo={"reward": str(reward_folder)})
    assert "another tokenizer" in finetune("check", recipe, expect=2)
