"""Time and peak memory of a PPO iteration by phase: one shared base against four separate models.

    python benchmarks/ppo_step.py --suite cpu                   benchmarks/results/ppo_step_cpu.json
    python benchmarks/ppo_step.py --suite gpu                   7B and 13B in nf4, batch 8, 256 + 256 tokens,
                                                                target: 7B on one base within 24 GiB in all
    python benchmarks/ppo_step.py --shape 7b --quantization nf4 --models separate

Weights are random, since only their shapes matter, and responses have their full length. The phases are those of
`rlhf.ppo.trainer.PPOTrainer.step`: rollout (sampling), scoring (reward, actor, reference and critic over all
responses), update (actor and critic, each forward and backward). The first iteration warms up, the next is
measured. Peaks are of memory allocated on the GPU, or of resident memory on a CPU, weights included; `in_all_gib`
is what the GPU has to have: what torch keeps for reuse, and CUDA's own, included.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _common import in_fresh_process, peak_resident_bytes, reset_peak_resident, write_result
from accelerate import Accelerator
from models import SHAPES, config_of, random_model
from peft import LoraConfig
from suites import judge, show_ratios
from torch import nn

from finetune.adapters.build import ALL_LINEAR
from finetune.quiet import quiet_libraries
from finetune.recipe import load_recipe
from rlhf.ppo.build import ACTOR, CRITIC, REFERENCE
from rlhf.ppo.models import ScalarHead, SharedBase
from rlhf.ppo.rewards import Part, Rewards
from rlhf.ppo.rollout import last_hidden
from rlhf.ppo.trainer import PPOTrainer

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "ppo_helpful.yaml"
REWARD = "reward"
MODELS = (ACTOR, CRITIC, REWARD, REFERENCE)
PHASES = ("rollout", "scoring", "update")
GIB = 2**30
SMALL = ["--batch", "4", "--prompt", "64", "--response", "32", "--layers", "1", "--vocabulary", "16000"]
SUITES = {
    "cpu": [
        ["--shape", "nano", "--prompt", "64", "--response", "64"],
        ["--shape", "7b", *SMALL],
        ["--shape", "13b", *SMALL],
    ],
    "gpu": [["--shape", shape, "--quantization", "nf4"] for shape in ("7b", "13b")],
}
"""Rows, each measured with a shared base and with separate models. The CPU has no room for whole 7B and 13B."""

Table = dict[tuple[str, str], dict[str, Any]]
TARGETS: dict[str, list[tuple[str, str, float, Any]]] = {
    "cpu": [],
    "gpu": [("7B nf4 on one base, GiB in all", "<=", 24.0, lambda t: t["7b", "shared"]["in_all_gib"])],
}


def make_base(arguments: argparse.Namespace, device: torch.device) -> Any:
    """A base of the shape with random weights: bfloat16 on a GPU, float32 on a CPU."""
    config = config_of(arguments.shape, "alibi" if arguments.shape == "13b" else "rope", 4096)
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    config.vocab_size = arguments.vocabulary or config.vocab_size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_model(config, device, dtype, arguments.quantization)


def lora(rank: int) -> LoraConfig:
    """LoRA on every matrix."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")


class SeparateModels:
    """The four models as PPO has them elsewhere: a base for each, with `SharedBase`'s interface."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self._bases = {name: SharedBase(make_base(arguments, device)) for name in MODELS}
        for name, base in self._bases.items():
            if name != REFERENCE:
                base.add_new(name, lora(arguments.rank), trainable=name != REWARD)
        self._current = REFERENCE

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within: forward passes are this model's; None is the reference."""
        before, self._current = self._current, name or REFERENCE
        try:
            with self._bases[self._current].using(name):
                yield
        finally:
            self._current = before

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        return self._bases[name].named_parameters(name)

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self._bases[self._current].hidden(input_ids, attention_mask)

    def has(self, name: str) -> bool:
        return False

    def checkpoint_activations(self) -> None:
        for base in self._bases.values():
            base.checkpoint_activations()
            base.lm.train()

    @property
    def lm(self) -> Any:
        return self._bases[self._current].lm

    @property
    def head_weight(self) -> torch.Tensor:
        return self._bases[self._current].head_weight

    @property
    def device(self) -> torch.device:
        return self._bases[self._current].device


def make_trainer(arguments: argparse.Namespace, device: torch.device, *, shared: bool) -> PPOTrainer:
    """The trainer of the recipe, on models and prompts made here."""
    recipe: Any = load_recipe(
        RECIPE,
        [
            "ppo.reward=benchmark:reward",
            f"ppo.batch_size={arguments.batch}",
            f"ppo.minibatch_size={arguments.batch}",
            f"ppo.rollout_batch_size={arguments.batch}",
            f"ppo.max_new_tokens={arguments.response}",
            f"train.batch_size={arguments.micro_batch}",
            f"data.max_length={arguments.prompt + arguments.response + 1}",
            "ppo.critic_warmup=0",
        ],
    )
    models: Any
    if shared:
        models = SharedBase(make_base(arguments, device))
        for name in (ACTOR, CRITIC, REWARD):
            models.add_new(name, lora(arguments.rank), trainable=name != REWARD)
    else:
        models = SeparateModels(arguments, device)
    models.checkpoint_activations()
    head, reward_head = (ScalarHead(models.lm.config.hidden_size).to(device) for _ in range(2))

    @torch.no_grad()
    def score(answered: Any) -> list[float]:
        ids = [each.ids for each in answered]
        size = arguments.micro_batch
        parts = [
            reward_head(last_hidden(models, REWARD, ids[i : i + size])) for i in range(0, len(ids), size)
        ]
        return torch.cat(parts).tolist()

    vocabulary = models.lm.config.vocab_size
    tokenizer = SimpleNamespace(
        eos_token_id=vocabulary - 1, decode=lambda *_, **__: ""
    )  # sampled almost never
    generator = torch.Generator().manual_seed(0)
    prompts = [
        SimpleNamespace(
            ids=torch.randint(3, vocabulary - 1, (arguments.prompt,), generator=generator).tolist(),
            messages=[],
        )
        for _ in range(arguments.batch)
    ]
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="bf16" if device.type == "cuda" else "no"
    )
    rewards = Rewards([Part("benchmark", "benchmark:reward", score)])
    return PPOTrainer(recipe, models, head, rewards, tokenizer, prompts, accelerator)  # type: ignore[arg-type]


class Phase:
    """Seconds, and the peak memory within."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Phase:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak_resident()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        cuda = self.device.type == "cuda"
        self.peak = torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()
        self.in_all = _gpu_in_use() if cuda else self.peak


def _gpu_in_use() -> int:
    """Most that this process has had of the GPU, in bytes, if it is alone there."""
    free, total = torch.cuda.mem_get_info()
    beside_torch = total - free - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_reserved() + beside_torch


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak GiB of each phase of an iteration."""
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    trainer = make_trainer(arguments, device, shared=arguments.models == "shared")
    for _ in range(2):  # the first allocates, and loads kernels
        prompts = trainer.next_prompts()
        with Phase(device) as rollout_phase:
            rollout = trainer.answer(prompts)
        with Phase(device) as scoring_phase:
            experience = trainer.judge(prompts, rollout)
        with Phase(device) as update_phase:
            trainer.learn(experience)
    phases = dict(zip(PHASES, (rollout_phase, scoring_phase, update_phase)))
    return {
        **{key: value for key, value in vars(arguments).items() if key != "suite"},
        "response_tokens": int(rollout.mask.sum()),
        **{f"{name}_seconds": round(phase.seconds, 3) for name, phase in phases.items()},
        "seconds": round(sum(phase.seconds for phase in phases.values()), 3),
        **{f"{name}_peak_gib": round(phase.peak / GIB, 3) for name, phase in phases.items()},
        "peak_gib": round(max(phase.peak for phase in phases.values()) / GIB, 3),
        "in_all_gib": round(max(phase.in_all for phase in phases.values()) / GIB, 3),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, help="all rows, shared and separate, kept in results/")
    parser.add_argument("--shape", choices=SHAPES, default="nano")
    parser.add_argument("--models", choices=("shared", "separate"), default="shared")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--vocabulary", type=int, help="fewer pieces than Baichuan 2 has")
    parser.add_argument("--batch", type=int, default=8, help="responses an iteration")
    parser.add_argument("--micro-batch", type=int, default=2, help="responses at once in scoring and update")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=256, help="tokens of a response")
    parser.add_argument("--rank", type=int, default=64, help="of the adapters")
    return parser.parse_args()


def main() -> None:
    """Measure one row, or a suite of them."""
    arguments = parse()
    if not arguments.suite:
        print(json.dumps(measure(arguments)))
        return
    table: Table = {}
    for row in SUITES[arguments.suite]:
        for models in ("shared", "separate"):
            found = in_fresh_process(__file__, [*row, "--models", models], timeout=900)
            shape = row[row.index("--shape") + 1]
            table[shape, models] = {"shape": shape, "models": models, **found}
            print(json.dumps(table[shape, models]), flush=True)
    ratios = [judge(table, *target) for target in TARGETS[arguments.suite]]
    print(f"\n{show(table)}" + (f"\n\n{show_ratios(ratios)}" if ratios else ""))
    saved = write_result(
        f"ppo_step_{arguments.suite}",
        {"rows": list(table.values()), **({"ratios": ratios} if ratios else {})},
    )
    print(f"\nsaved {saved.name}")


def show(table: Table) -> str:
    """The rows as Markdown: seconds and peak GiB by phase."""
    lines = [
        "| shape, models | rollout | scoring | update | iteration |",
        "|---|---:|---:|---:|---:|",
    ]
    for (shape, models), row in table.items():
        if "error" in row:
            lines.append(f"| {shape}, {models} | {row['error']} | | | |")
            continue
        cells = [f"{row[f'{phase}_seconds']:.1f} s, {row[f'{phase}_peak_gib']:.2f} GiB" for phase in PHASES]
        lines.append(
            f"| {shape}, {models} | {' | '.join(cells)} | {row['seconds']:.1f} s, {row['peak_gib']:.2f} GiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
