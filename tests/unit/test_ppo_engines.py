"""vLLM in place of the model's own sampling, against a stand-in for vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import tiny_model
from tiny_ppo import ppo_metrics, write_ppo_recipe
from tiny_run import finetune

from finetune.errors import UserError
from finetune.recipe import load_recipe
from rlhf.ppo import engines
from rlhf.ppo.engines import TransformersEngine, VLLMEngine, check_engine
from rlhf.ppo.errors import RunStopped
from rlhf.ppo.models import SharedBase
from rlhf.ppo.rollout import Rollout

EOS = 2
PROMPTS = [[195, 1400, 196], [195, 1450, 1451, 196], [195, 1500, 196]]


class StandIn:
    """Takes the place of package vllm.

    Attributes:
        started: keyword arguments of each LLM.
        asked: (prompts, sampling settings, number of the adapter, its weights) of each call.
        replies: (ids, finish reason) of each prompt of the next calls, in turn.
    """

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.asked: list[tuple[list[list[int]], list[dict[str, Any]], int, dict[str, torch.Tensor]]] = []
        self.replies: Iterator[list[tuple[list[int], str]]] = iter(())
        self.fails = False

    def start(self, **settings: Any) -> Any:
        if self.fails:
            raise ValueError("Free memory on device is less than desired GPU memory utilization")
        self.started.append(settings)
        return SimpleNamespace(generate=self.generate)

    def generate(self, prompts: Any, sampling: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        assert use_tqdm is False
        assert Path(lora_request.lora_path).name == lora_request.lora_name
        weights = load_file(Path(lora_request.lora_path) / "adapter_model.safetensors")
        ids = [each["prompt_token_ids"] for each in prompts]
        self.asked.append((ids, [vars(each) for each in sampling], lora_request.lora_int_id, weights))
        completions = [
            SimpleNamespace(token_ids=tuple(ids), finish_reason=why) for ids, why in next(self.replies)
        ]
        return [SimpleNamespace(outputs=[each]) for each in completions]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    package, lora, request = (ModuleType(f"vllm{name}") for name in ("", ".lora", ".lora.request"))
    package.__spec__ = ModuleSpec("vllm", None)
    package.LLM, package.SamplingParams = stand_in.start, SimpleNamespace  # type: ignore[attr-defined]
    request.LoRARequest = SimpleNamespace  # type: ignore[attr-defined]
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(engines, "_has_gpu", lambda: True)
    return stand_in


def recipe_for(folder: Path, base: Path | str, *overrides: str) -> Any:
    path = write_ppo_recipe(folder, base, ppo={"rollout_engine": "vllm", "temperature": 0.7})
    return load_recipe(path, list(overrides))


@pytest.fixture
def engine(vllm: StandIn, tiny_bases: dict[str, Path], tmp_path: Path) -> VLLMEngine:
    from test_ppo_models import config, randomise

    models = SharedBase(tiny_model("rope"))
    models.add_new("actor", config())
    randomise(models, "actor", 0)
    base: Any = SimpleNamespace(folder=tiny_bases["rope"])
    return VLLMEngine(recipe_for(tmp_path, tiny_bases["rope"]), models, base, eos_token_id=EOS)


def test_what_vllm_is_asked_for(engine: VLLMEngine, vllm: StandIn, tiny_bases: dict[str, Path]) -> None:
    (started,) = vllm.started
    assert started["model"] == str(tiny_bases["rope"])
    assert (started["max_lora_rank"], started["max_loras"], started["max_model_len"]) == (8, 1, 64)
    assert (started["enable_prefix_caching"], started["generation_config"]) == (False, "vllm")
    vllm.replies = iter([[([5, EOS], "stop")] * 3] * 3)
    torch.manual_seed(0)
    engine.sample(PROMPTS)
    torch.manual_seed(0)
    engine.sample(PROMPTS)
    engine.sample(PROMPTS, greedy=True)
    prompts, first, _, _ = vllm.asked[0]
    assert prompts == PROMPTS
    assert first[0] | {"seed": 0} == {
        "max_tokens": 10,
        "stop_token_ids": [EOS],
        "detokenize": False,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "seed": 0,
    }
    assert len({each["seed"] for each in first}) == 3
    assert vllm.asked[1][1] == first  # as torch's random state is, so are the seeds
    assert [each["temperature"] for each in vllm.asked[2][1]] == [0.0] * 3


def test_ends_and_lengths(engine: VLLMEngine, vllm: StandIn) -> None:
    """With or without the EOS among the ids, with something after it, and cut at the limit."""
    vllm.replies = iter([[([5, 6, EOS], "stop"), ([7], "stop"), ([8, EOS, 9], "stop")], [([5, 6], "length")]])
    rollout = engine.sample(PROMPTS)
    assert [rollout.responses[row, rollout.mask[row]].tolist() for row in range(3)] == [
        [5, 6, EOS],
        [7, EOS],
        [8, EOS],
    ]
    assert rollout.ended.all()
    assert rollout.prompts == PROMPTS
    rollout = engine.sample(PROMPTS[:1])
    assert (rollout.lengths.tolist(), rollout.ended.tolist()) == ([2], [False])
    vllm.replies = iter([[([5], "abort")]])
    with pytest.raises(RunStopped, match="gave a response up"):
        engine.sample(PROMPTS[:1])


def test_the_actor_is_handed_over_when_it_has_changed(engine: VLLMEngine, vllm: StandIn) -> None:
    """Under a new number and name each time, with the weights of then; the folder before is gone."""
    vllm.replies = iter([[([5], "length")]] * 3)
    engine.sample(PROMPTS[:1])
    engine.sample(PROMPTS[:1])
    with torch.no_grad():
        for _, parameter in engine.models.named_parameters("actor"):
            parameter.add_(1.0)
    engine.actor_changed()
    engine.sample(PROMPTS[:1])
    assert [number for _, _, number, _ in vllm.asked] == [1, 1, 2]
    first, again, changed = (weights for *_, weights in vllm.asked)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(first[key] + 1, changed[key]) for key in first)
    assert [path.name for path in Path(engine._folder.name).iterdir()] == ["actor-2"]


def test_the_same_ids_are_the_same_run(
    vllm: StandIn, tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sampled the responses: scores, log-probabilities, updates and the adapter are the same."""
    recorded: list[Rollout] = []
    sample = TransformersEngine.sample

    def recording(self: TransformersEngine, *args: Any, **kwargs: Any) -> Rollout:
        recorded.append(sample(self, *args, **kwargs))
        return recorded[-1]

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "sample", recording)
        finetune("run", write_ppo_recipe(tmp_path / "own", tiny_bases["rope"], ppo={"ema": 0.5}))
    vllm.replies = iter(
        [
            [
                (
                    rollout.responses[row, rollout.mask[row]].tolist(),
                    "stop" if rollout.ended[row] else "length",
                )
                for row in range(len(rollout.prompts))
            ]
            for rollout in recorded
        ]
    )
    monkeypatch.setattr(
        engines, "check_engine", lambda *_, **__: None
    )  # the tiny base is none that vLLM knows
    settings = {"ema": 0.5, "rollout_engine": "vllm"}
    finetune("run", write_ppo_recipe(tmp_path / "vllm", tiny_bases["rope"], ppo=settings))
    own, other = (tmp_path / name / "run" for name in ("own", "vllm"))
    assert ppo_metrics(own) == ppo_metrics(other)
    assert [json.loads(line) for line in (own / "samples.jsonl").read_text("utf-8").splitlines()] == [
        json.loads(line) for line in (other / "samples.jsonl").read_text("utf-8").splitlines()
    ]
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (own, other)]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    # Samples, two iterations of the critic's warm-up and the next begin with the same actor; then every one has
    # another, and the last samples have the average.
    assert [number for _, _, number, _ in vllm.asked] == [1, 1, 1, 2, 3, 4]
    assert all(torch.equal(vllm.asked[-1][3][key], tensor) for key, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("overrides", "config", "processes", "message"),
    [
        (["model.quantization=nf4"], {}, 1, "the base is held in nf4"),
        (["model.quantization=int8"], {}, 1, "the base is held in int8"),
        (["adapter.dora=true"], {}, 1, "vLLM has no DoRA"),
        (["adapter.rank=1024"], {}, 1, "ranks up to 512, found 1024"),
        (
            ["adapter.targets=[W_pack, embed_tokens]"],
            {},
            1,
            "leave out what the adapter does to embed_tokens",
        ),
        ([], {"hidden_size": 256}, 1, "has RoPE, and vLLM, which goes by its shape"),
        ([], {"position_embedding": "alibi"}, 1, "does not have RoPE"),
        ([], {"norm_head": False}, 1, "does not have a normalised head"),
        ([], {"vocab_size": 64_000}, 1, "has a normalised head"),
        ([], {}, 2, "2 training processes"),
    ],
)
def test_what_vllm_cannot_sample_from(
    vllm: StandIn, tmp_path: Path, overrides: list[str], config: dict[str, Any], processes: int, message: str
) -> None:
    seven_b = {"position_embedding": "rope", "hidden_size": 4096, "norm_head": True, "vocab_size": 125_696}
    base: Any = SimpleNamespace(name="base", config={**seven_b, **config})
    recipe = recipe_for(tmp_path, "base", *overrides)
    with pytest.raises(UserError, match=message) as error:
        check_engine(recipe, base, processes=processes)
    assert error.value.args[0].startswith("ppo.rollout_engine: ")
    assert "ppo.rollout_engine=transformers" in str(error.value)
    official: Any = SimpleNamespace(name="base", config=seven_b)
    check_engine(recipe_for(tmp_path, "base"), official, processes=1)
    own = recipe_for(tmp_path, "base", *overrides, "ppo.rollout_engine=transformers")
    check_engine(own, base, processes=processes)


def test_without_vllm_or_a_gpu(
    vllm: StandIn, tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_ppo_recipe(tmp_path, tiny_bases["rope"])
    override = "ppo.rollout_engine=vllm"
    with monkeypatch.context() as patch:
        patch.setattr(engines, "_has_gpu", lambda: False)
        assert "vLLM needs a GPU" in finetune("check", recipe, override, expect=2)
    with monkeypatch.context() as patch:
        patch.setattr(engines.importlib.util, "find_spec", lambda name: None)
        assert "vLLM is not installed" in finetune("check", recipe, override, expect=2)
    assert "adapter.method" in finetune("check", recipe, override, "adapter.method=ptuning", expect=2)
    vllm.fails = True
    monkeypatch.setattr(engines, "check_engine", lambda *_, **__: None)
    output = finetune("run", recipe, override, expect=2)
    assert "vLLM did not start: ValueError: Free memory on device" in output
    assert "ppo.vllm_memory" in output
    assert not (tmp_path / "run").exists()
