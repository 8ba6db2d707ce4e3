"""What a merge will do, decided and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.base_identity import check_same_base
from finetune.adapters.build import check_adapter_folder
from finetune.adapters.combine import Combination, Update, choose_combination, combine_updates
from finetune.adapters.lora_weights import check_fit, check_lora_config, read_updates
from finetune.adapters.training_note import read_training_note
from finetune.adapters.virtual_tokens import (
    PROMPT_TYPES,
    check_prompt_base,
    choose_token_ids,
    merge_virtual_tokens,
    read_virtual_vectors,
    token_settings,
)
from finetune.baichuan.checkpoints import check_weight_file
from finetune.baichuan.load import Base, compute_dtype, load_tokenizer, pick_device, resolve_base
from finetune.baichuan.shapes import complete_weights, weight_shapes
from finetune.baichuan.shards import iterate_weights
from finetune.errors import UserError

if TYPE_CHECKING:
    import torch

    from finetune.baichuan.configuration import BaichuanConfig

SCORE_FILE = "score.safetensors"
"""Beside a reward adapter: its head, `weight` of shape (hidden_size,)."""

FORMATS = ("baichuan", "llama")
ONTO = ("original", "dequantized")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder, read as far as merging needs.

    Attributes:
        folder: where it is.
        config: of adapter_config.json.
        note: what training recorded; empty for adapters from elsewhere.
    """

    folder: Path
    config: dict[str, Any]
    note: dict[str, Any]

    @property
    def quantization(self) -> str:
        """How training held the base: ``none``, ``int8`` or ``nf4``; ``none`` where nothing says so."""
        return self.note.get("quantization") or "none"


@dataclass(frozen=True)
class MergePlan:
    """A checked merge.

    Attributes:
        adapters: to merge.
        base: to merge into.
        config: the base's.
        combination: of several adapters.
        updates: what changes, by name of the weight (LoRA).
        vectors: (n, hidden_size), what the embeddings take in (P-Tuning), or None.
        token_ids: the n rows of the embeddings that take the vectors.
        score: (1, hidden_size), the scalar head of a reward adapter, or None.
        onto: ``original`` or ``dequantized`` weights.
        quantization: that ``dequantized`` weights go through; of the base if it is quantised on disk.
        compute_dtype: that training computed the base in.
        dtype: to write; None keeps each tensor's own.
        format: ``baichuan`` or ``llama``.
    """

    adapters: tuple[SavedAdapter, ...]
    base: Base
    config: BaichuanConfig
    combination: Combination
    updates: dict[str, Update]
    vectors: torch.Tensor | None
    token_ids: tuple[int, ...]
    score: torch.Tensor | None
    onto: str
    quantization: str
    compute_dtype: torch.dtype
    dtype: str | None
    format: str

    @property
    def keeps_quantization(self) -> bool:
        """Whether the output is as quantised as the base: vectors go into embeddings, which never are."""
        return self.base.quantized and self.onto == "original"

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(prod(shape) for shape in weight_shapes(self.config).values())

    def expected_bytes(self) -> int:
        """Of the weight files that will be written."""
        from finetune.baichuan.checkpoints import find_weight_files

        stored = sum(path.stat().st_size for path in find_weight_files(self.base.folder))
        if self.keeps_quantization or (self.dtype is None and not self.base.quantized):
            return stored
        size = 4 if (self.dtype or self.config_dtype) == "float32" else 2
        return self.parameters * size

    @property
    def config_dtype(self) -> str:
        """Of the base's weights by its config, of those that were quantised in particular."""
        return _dtype_name(self.config)

    def weights(self, opened: Callable[[Path], None] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of the merged model in Baichuan's layout, holding one file of the base at a time.

        Args:
            opened: called with each file before it is read.

        Raises:
            UserError: if a weight is missing or has another shape than the base's config says.
        """
        import torch

        wanted = None if self.dtype is None else getattr(torch, self.dtype)
        tensors: Iterator[tuple[str, torch.Tensor]]
        if self.keeps_quantization:
            tensors = iterate_weights(self.base.folder, opened=opened)
        else:
            tensors = self._full_weights(opened)
            shapes = weight_shapes(self.config)
            tensors = complete_weights(tensors, shapes, self.base.folder, lambda amount: None)
            tensors = ((name, self.change(name, weight, wanted)) for name, weight in tensors)
        if self.vectors is not None:
            tensors = merge_virtual_tokens(tensors, self.vectors, self.token_ids, dtype=wanted)
        if self.score is None:
            yield from tensors
            return
        yield from ((name, tensor) for name, tensor in tensors if name != "lm_head.weight")
        yield "score.weight", self.score

    def change(self, name: str, weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """A weight of the base as it is in the merged model (embeddings apart): changed or as it was.

        Args:
            name: of the weight.
            weight: of the base, in full precision.
            dtype: of the result; None keeps it.
        """
        kept = dtype or self._own_dtype(name, weight)
        if self.onto == "dequantized" and not self.base.quantized:
            from finetune.adapters.dequantized import as_trained

            weight = as_trained(name, weight, self.quantization, self.compute_dtype, pick_device())
        if name in self.updates:
            return self.updates[name].apply(weight, kept)
        return weight.to(kept) if weight.is_floating_point() else weight

    def _full_weights(self, opened: Callable[[Path], None] | None) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.base.quantized:
            return iterate_weights(self.base.folder, opened=opened)
        from finetune.adapters.dequantized import stored_weights

        return stored_weights(self.base.folder, self.compute_dtype, opened=opened)

    def _own_dtype(self, name: str, weight: torch.Tensor) -> torch.dtype:
        """Of a weight that nobody wants in another: expanded ones take the config's, as those beside them have."""
        import torch

        from finetune.export.quantize import QUANTIZED

        if self.base.quantized and QUANTIZED.fullmatch(name):
            return getattr(torch, self.config_dtype)
        return weight.dtype


def read_adapter(folder: Path) -> SavedAdapter:
    """An adapter folder whose method has something to merge.

    Raises:
        UserError: damaged, or a method that no weights can express.
    """
    config = check_adapter_folder(folder)
    kind = config.get("peft_type")
    if kind == "LORA":
        check_lora_config(config, folder)
    elif kind == "PREFIX_TUNING":
        raise UserError(
            f"{folder}: prefix tuning lives in the key/value cache of every layer and cannot be expressed as "
            "tokens, nor as weights",
            hint="use it with --adapter beside its base; P-Tuning (adapter.method=ptuning) can be merged",
        )
    elif kind not in PROMPT_TYPES:
        raise UserError(
            f"{folder}: adapters of method {kind} cannot be merged",
            hint="LoRA and P-Tuning can; use this one with --adapter beside its base",
        )
    return SavedAdapter(folder, config, read_training_note(folder))


def plan_merge(
    folders: Sequence[Path],
    *,
    base: str | None,
    force_base: bool,
    weights: Sequence[float] | None,
    combine: str,
    density: float,
    seed: int,
    onto: str | None,
    format: str,
    dtype: str | None,
) -> MergePlan:
    """Read and check everything that a merge depends on; see `finetune.adapters.merge.merge_adapter`.

    Raises:
        UserError: whatever makes the merge impossible or wrong.
    """
    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.export.llama import check_llama

    _check_choice("--format", format, FORMATS)
    _check_choice("--onto", onto, (None, *ONTO))
    adapters = tuple(read_adapter(folder) for folder in folders)
    if not adapters:
        raise UserError("no adapter to merge", hint="give one with --adapter")
    combination = choose_combination(len(adapters), weights, combine, density, seed)
    score = _read_score(adapters, format)
    resolved = _resolve(adapters[0], base)
    config = BaichuanConfig.from_pretrained(resolved.folder)
    prompt = [adapter for adapter in adapters if adapter.config["peft_type"] in PROMPT_TYPES]
    if prompt and (len(adapters) > 1 or combination.weights != (1.0,)):
        raise UserError(
            f"{prompt[0].folder}: P-Tuning vectors are not added to anything, so they have no weight",
            hint="merge this adapter alone; the merged folder may be the base of the next",
        )
    passes_through = bool(prompt) and format == "baichuan"
    onto, quantization = _starting_point(adapters, resolved, onto, passes_through=passes_through)
    if format == "llama":
        plain = BaichuanConfig.from_dict(config.to_dict() | {"quantization_config": None})
        check_llama(plain, resolved.folder)
    tokenizer = load_tokenizer(resolved.folder)
    updates: dict[str, Update] = {}
    vectors: torch.Tensor | None = None
    token_ids: tuple[int, ...] = ()
    if prompt:
        vectors = read_virtual_vectors(prompt[0].folder, prompt[0].config)
        check_prompt_base(resolved, prompt[0].folder, vectors, dtype, passes_through=onto == "original")
        token_ids = tuple(choose_token_ids(tokenizer, len(vectors), settings=token_settings(resolved)))
    else:
        shapes = weight_shapes(config)
        read = []
        for adapter in adapters:
            found = read_updates(adapter.folder, adapter.config)
            check_fit(found, adapter.config, shapes, adapter.folder, resolved.folder)
            read.append(found)
        updates = combine_updates(read, combination)
    if not force_base:
        for adapter in adapters:
            check_same_base(adapter.folder, adapter.config, adapter.note, resolved)
    return MergePlan(
        adapters=adapters,
        base=resolved,
        config=config,
        combination=combination,
        updates=updates,
        vectors=vectors,
        token_ids=token_ids,
        score=score,
        onto=onto,
        quantization=quantization,
        compute_dtype=_compute_dtype(adapters[0], config),
        dtype=dtype,
        format=format,
    )


def _read_score(adapters: Sequence[SavedAdapter], format: str) -> torch.Tensor | None:
    """The scalar head beside a reward adapter: merged, it makes a sequence classifier.

    Raises:
        UserError: asked for something that such a model cannot be, or it has lost its head.
    """
    from safetensors.torch import load_file

    for each in adapters:
        rewards = each.note.get("stage") == "reward" or (each.folder / "reward.json").is_file()
        if rewards and not (each.folder / SCORE_FILE).is_file():
            raise UserError(
                f"{each.folder}: the adapter of a reward model without its head: no {SCORE_FILE}",
                hint="copy the whole adapter/ folder of the run again; without its head it scores nothing, and a "
                "language model it is not",
            )
    heads = [each.folder / SCORE_FILE for each in adapters if (each.folder / SCORE_FILE).is_file()]
    if not heads:
        return None
    if len(adapters) > 1:
        raise UserError(
            f"{heads[0].parent}: a reward model, whose head fits no combination of adapters",
            hint="merge it alone; PPO joins several rewards by weights of its own",
        )
    if format == "llama":
        raise UserError(
            f"--format llama: {heads[0].parent} is a reward model, and Llama's layout has no scalar head here",
            hint="leave --format out",
        )
    check_weight_file(heads[0])
    return load_file(heads[0])["weight"].float()[None]


def _check_choice(option: str, found: str | None, known: Sequence[str | None]) -> None:
    if found not in known:
        expected = ", ".join(str(name) for name in known if name)
        raise UserError(f"{option}: found {found!r}, expected one of {expected}")


def _resolve(adapter: SavedAdapter, base: str | None) -> Base:
    identity = base or adapter.config.get("base_model_name_or_path") or adapter.note.get("base")
    if not identity:
        raise UserError(f"{adapter.folder}: names no base", hint="say which with --base")
    return resolve_base(identity, revision=None if base else adapter.config.get("revision"))


def _starting_point(
    adapters: Sequence[SavedAdapter], base: Base, onto: str | None, *, passes_through: bool
) -> tuple[str, str]:
    """Which weights to begin from, and the quantisation behind dequantised ones."""
    held = {adapter.quantization for adapter in adapters}
    if onto == "dequantized" and len(held) > 1:
        raise UserError(
            "--onto dequantized: the adapters were trained on bases of several kinds: "
            + ", ".join(f"{adapter.folder} on {adapter.quantization}" for adapter in adapters),
            hint="leave --onto out: the original weights are between them",
        )
    trained = adapters[0].quantization
    if base.quantized:
        if passes_through and onto != "dequantized":
            return "original", base.quantization
        if onto == "original":
            raise UserError(
                f"{base.folder}: its weights are {base.quantization}, there are no original ones here",
                hint="give the 16-bit release of the same model with --base, or --onto dequantized",
            )
        return "dequantized", base.quantization
    if onto == "dequantized" and trained == "none":
        if any("quantization" in adapter.note for adapter in adapters):
            raise UserError(
                f"--onto dequantized: {adapters[0].folder} was trained on a base that was not quantised",
                hint="leave --onto out",
            )
        return "dequantized", "nf4"  # an adapter from elsewhere, whose owner says that it was QLoRA's
    return onto or "original", trained


def _compute_dtype(adapter: SavedAdapter, config: BaichuanConfig) -> torch.dtype:
    """What training computed the base in: as recorded, or as this machine would."""
    import torch

    recorded = adapter.note.get("dtype")
    if recorded in ("bfloat16", "float16", "float32"):
        return getattr(torch, recorded)
    stored = _dtype_name(config)
    return compute_dtype("bfloat16" if stored == "float32" else stored, pick_device())


def _dtype_name(config: BaichuanConfig) -> str:
    return str(config.dtype or "bfloat16").removeprefix("torch.")
