"""Who samples the responses: the base that is trained, or vLLM beside it, several times as fast.

vLLM has a copy of the base of its own and gets the actor as a LoRA adapter, a new one after each update: a folder
and a `LoRARequest` with a name and number that it has not seen, so that nothing it keeps of an older one is used.
Token ids are all that is taken from it. Log-probabilities come from the training path as they always do, so the
ratio of an unchanged policy is 1; what differs by kernels and rounding is which responses are drawn.

What vLLM makes of Baichuan was read in its source (model_executor/models/baichuan.py): it takes W_pack, o_proj,
down_proj and gate_proj with up_proj as LoRA targets, RoPE for a hidden size of 4,096 and ALiBi for every other,
and a normalised head for a vocabulary of 125,696. Bases that it would read as another model are refused. No GPU
was at hand: this was tested against a stand-in, not against vLLM.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import torch

from finetune.adapters.build import ALL_LINEAR
from finetune.errors import UserError
from rlhf.ppo.build import ACTOR
from rlhf.ppo.errors import RunStopped
from rlhf.ppo.rollout import Ids, Rollout, Sampling, as_rollout, generate

if TYPE_CHECKING:
    from finetune.baichuan.load import Base
    from rlhf.ppo.models import SharedBase
    from rlhf.ppo.recipe import PPORecipe

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can make room for (its LoRAConfig)."""


class Engine(Protocol):
    """Samples responses of the actor."""

    def sample(self, prompts: Sequence[Ids], *, greedy: bool = False) -> Rollout:
        """One response to each prompt."""

    def actor_changed(self) -> None:
        """The next responses are those of other weights."""


class TransformersEngine:
    """The base that is trained, with the actor's adapter; see `rlhf.ppo.rollout.generate`."""

    def __init__(self, models: SharedBase, sampling: Sampling, *, eos_token_id: int, batch_size: int) -> None:
        self.models, self.sampling = models, sampling
        self.eos_token_id, self.batch_size = eos_token_id, batch_size

    def sample(self, prompts: Sequence[Ids], *, greedy: bool = False) -> Rollout:
        """One response to each prompt, ``batch_size`` at a time."""
        return generate(
            self.models,
            ACTOR,
            prompts,
            self.sampling,
            eos_token_id=self.eos_token_id,
            batch_size=self.batch_size,
            greedy=greedy,
        )

    def actor_changed(self) -> None:
        """Nothing to do: it is the same actor."""


class VLLMEngine:
    """vLLM in its own memory of the same GPU.

    Attributes:
        version: how many actors it was given.
    """

    def __init__(self, recipe: PPORecipe, models: SharedBase, base: Base, *, eos_token_id: int) -> None:
        self.models, self.eos_token_id = models, eos_token_id
        self.sampling = sampling_of(recipe)
        self.version = 0
        self._stale = True
        self._request: Any = None
        self._folder = TemporaryDirectory(prefix="finetune-actor-")
        self._llm = _start_vllm(recipe, base)

    def actor_changed(self) -> None:
        """Hand over the actor before the next responses."""
        self._stale = True

    def sample(self, prompts: Sequence[Ids], *, greedy: bool = False) -> Rollout:
        """One response to each prompt.

        Raises:
            RunStopped: vLLM gave a response up.
        """
        from vllm import SamplingParams

        settings: dict[str, Any] = {
            "max_tokens": self.sampling.max_new_tokens,
            "stop_token_ids": [self.eos_token_id],
            "detokenize": False,
        }
        if greedy:
            settings |= {"temperature": 0.0}
        else:
            settings |= {
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "top_k": self.sampling.top_k or -1,
            }
        # Drawn here, so that a resumed run, whose random state is restored, asks for the same responses.
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            [SamplingParams(seed=seed, **settings) for seed in seeds],
            lora_request=self._current_actor(),
            use_tqdm=False,
        )
        responses = [self._response(output.outputs[0]) for output in outputs]
        return as_rollout(prompts, responses, eos_token_id=self.eos_token_id, device=self.models.device)

    def _response(self, completion: Any) -> list[int]:
        """Its ids up to and including the first EOS; none is there where the length limit came first."""
        ids = list(completion.token_ids)
        if completion.finish_reason not in ("stop", "length"):
            raise RunStopped(
                f"vLLM gave a response up ({completion.finish_reason})",
                hint="--resume; if it happens again, raise ppo.vllm_memory or lower ppo.batch_size",
            )
        if self.eos_token_id in ids:
            return ids[: ids.index(self.eos_token_id) + 1]
        return [*ids, self.eos_token_id] if completion.finish_reason == "stop" else ids

    def _current_actor(self) -> Any:
        """The request that names the actor's weights as they are; saves them if they have changed."""
        from vllm.lora.request import LoRARequest

        if self._stale:
            before = self._version_folder()
            self.version += 1
            folder = self._version_folder()
            self.models.save(ACTOR, folder)
            self._request = LoRARequest(
                lora_name=folder.name, lora_int_id=self.version, lora_path=str(folder)
            )
            self._stale = False
            shutil.rmtree(before, ignore_errors=True)
        return self._request

    def _version_folder(self) -> Path:
        return Path(self._folder.name) / f"actor-{self.version}"


def make_engine(recipe: PPORecipe, models: SharedBase, base: Base, *, eos_token_id: int) -> Engine:
    """The engine that a recipe asks for; `check_engine` has allowed it."""
    if recipe.ppo.rollout_engine == "vllm":
        return VLLMEngine(recipe, models, base, eos_token_id=eos_token_id)
    return TransformersEngine(
        models, sampling_of(recipe), eos_token_id=eos_token_id, batch_size=recipe.ppo.rollout_batch_size
    )


def sampling_of(recipe: PPORecipe) -> Sampling:
    """How a recipe has responses drawn."""
    ppo = recipe.ppo
    return Sampling(ppo.max_new_tokens, ppo.temperature, ppo.top_k, ppo.top_p)


def check_engine(recipe: PPORecipe, base: Base, *, processes: int) -> None:
    """Refuse what vLLM cannot sample from, before weights are loaded.

    Raises:
        UserError: it is not installed, there is no GPU, or it would read the base or the adapter as something else.
    """
    if recipe.ppo.rollout_engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise _refused("vLLM is not installed", "pip install '.[vllm]' in the toolkit's folder")
    if not _has_gpu():
        raise _refused("vLLM needs a GPU, and this machine has none")
    if processes > 1:
        raise _refused(f"vLLM beside {processes} training processes was never tried", "use one process")
    if recipe.model.quantization != "none":
        raise _refused(
            f"the base is held in {recipe.model.quantization}, and vLLM would sample from one that is not, "
            "or is rounded otherwise: from another policy than the one that is trained",
            "set model.quantization=none",
        )
    _check_adapter(recipe)
    config = base.config
    for what, is_so, would_be in (
        ("RoPE", config["position_embedding"] == "rope", config["hidden_size"] == 4096),
        ("a normalised head", bool(config["norm_head"]), config["vocab_size"] == 125_696),
    ):
        if is_so != would_be:
            raise _refused(
                f"{base.name} {'has' if is_so else 'does not have'} {what}, and vLLM, which goes by its shape "
                f"(hidden size {config['hidden_size']:,}, vocabulary {config['vocab_size']:,}), would think otherwise"
            )


def _check_adapter(recipe: PPORecipe) -> None:
    adapter = recipe.adapter
    if adapter.dora:
        raise _refused("vLLM has no DoRA", "set adapter.dora=false")
    if adapter.rank > LORA_RANKS[-1]:
        raise _refused(f"vLLM takes ranks up to {LORA_RANKS[-1]}, found {adapter.rank}", "lower adapter.rank")
    foreign = [] if isinstance(adapter.targets, str) else sorted({*adapter.targets} - {*ALL_LINEAR})
    if foreign:
        raise _refused(
            f"vLLM would leave out what the adapter does to {', '.join(foreign)}",
            f"set adapter.targets to some of {', '.join(ALL_LINEAR)}",
        )


def _refused(reason: str, hint: str = "") -> UserError:
    other = "ppo.rollout_engine=transformers"
    return UserError(f"ppo.rollout_engine: {reason}", hint=f"{hint}, or {other}" if hint else f"set {other}")


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _start_vllm(recipe: PPORecipe, base: Base) -> Any:
    from vllm import LLM

    try:
        return LLM(
            model=str(base.folder),
            dtype=recipe.model.dtype,
            skip_tokenizer_init=True,  # ids go in and come out
            generation_config="vllm",  # not the folder's, which penalises repetition
            max_model_len=recipe.data.max_length,
            gpu_memory_utilization=recipe.ppo.vllm_memory,
            enable_prefix_caching=False,  # what is cached is of an actor that is no more
            enable_lora=True,
            max_loras=1,
            max_lora_rank=next(rank for rank in LORA_RANKS if rank >= recipe.adapter.rank),
            seed=recipe.seed,
        )
    except Exception as error:  # whatever vLLM raises: memory, versions, drivers
        reason = " ".join(str(error).split())[:300]
        raise _refused(
            f"vLLM did not start: {type(error).__name__}: {reason}",
            "set ppo.vllm_memory to a share of the GPU that is free and holds the base",
        ) from error
