"""From a name in a recipe to a model and tokenizer in memory."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.baichuan.catalog import CATALOG
from finetune.baichuan.checkpoints import check_folder, read_json, unsafe_pickle
from finetune.baichuan.nano import NANO_MODELS, ensure_nano
from finetune.errors import UserError
from finetune.words import plural

if TYPE_CHECKING:
    import torch

    from finetune.baichuan.attention_choice import Attention
    from finetune.baichuan.modeling import BaichuanForCausalLM
    from finetune.baichuan.tokenization import BaichuanTokenizer
    from finetune.recipe.schema import Model

FILES = ("*.json", "*.jinja", "tokenizer.model", "*.safetensors", "*.bin", "LICENSE*", "*.pdf")
NANO_HINT = "to try the toolkit without weights: model.base=baichuan2-nano"
SKIPPED_MODULES = ("lm_head", "score")
"""Never quantised: the head must stay exact, and a new scalar head must be trainable."""


@dataclass(frozen=True)
class Base:
    """A base that lies on this machine.

    Attributes:
        name: as the recipe says it.
        folder: where config, tokenizer and weights are.
        identity: name, folder or hub id to write into adapters and model cards.
        revision: of the hub id; None is the default branch.
    """

    name: str
    folder: Path
    identity: str
    revision: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The model's config, official gaps filled in."""
        import json

        from finetune.baichuan.configuration import BaichuanConfig

        raw = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return BaichuanConfig.from_dict(raw).to_dict()

    @property
    def quantization(self) -> str:
        """How the weights on disk are held already: ``none``, ``int8`` or ``nf4``."""
        settings = self.config.get("quantization_config")
        if not settings:
            return "none"
        return "int8" if settings.get("load_in_8bit") else "nf4"

    @property
    def quantized(self) -> bool:
        """Whether the weights on disk are 4- or 8-bit already."""
        return self.quantization != "none"


def resolve_base(
    base: str,
    *,
    revision: str | None = None,
    source: str = "huggingface",
    download: bool = True,
    called: str = "model.base",
) -> Base:
    """Find or fetch a base: catalogue name, local folder, or hub id.

    Args:
        base: as in a recipe's model.base.
        revision: of a hub id.
        source: hub to download from, huggingface or modelscope.
        download: False takes what is here already, and nothing else.
        called: what the user knows the base as, for messages.

    Raises:
        UserError: if it is nowhere to be had, is incomplete, or is no Baichuan model.
    """
    if base in NANO_MODELS:
        return Base(base, ensure_nano(base), base)
    folder = Path(base).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return Base(base, folder, str(folder.resolve()))
    entry = CATALOG.get(base)
    if entry is None and (base.count("/") != 1 or base.startswith((".", "/", "~"))):
        near = difflib.get_close_matches(base, CATALOG, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{called}: {base!r} is no folder and no name in the catalogue",
            hint=f"{guess}`finetune catalog` lists the names; {NANO_HINT}",
        )
    revision = revision or (entry.revision if entry else None)
    repo_id = base
    if entry is not None:
        repo_id = str(entry.modelscope_id if source == "modelscope" else entry.repo_id)
    fetch = _fetch_modelscope if source == "modelscope" else _fetch_hub
    folder = fetch(base, repo_id, revision, download, called)
    check_folder(folder)
    return Base(base, folder, repo_id, revision)


def _fetch_hub(base: str, repo_id: str, revision: str | None, download: bool, called: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=list(FILES), local_files_only=not download
            )
        )
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as error:
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{called}: {base} ({repo_id}) is not on this machine and cannot be downloaded: {_reason(error)}",
            hint=(
                f"where there is a network, run `hf download {repo_id}{at}`, copy the folder here and set "
                f"{called} to its path (or try model.source=modelscope); {NANO_HINT}"
            ),
        ) from error


def _reason(error: BaseException) -> str:
    """Why a hub did not give what it was asked for, in a few words."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    words: dict[type[BaseException], str] = {
        GatedRepoError: "the hub wants you to log in and accept its terms (`hf auth login`)",
        RevisionNotFoundError: "the hub has no such revision",
        RepositoryNotFoundError: "the hub has no such repository, or it is private",
        OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
        LocalEntryNotFoundError: "the hub cannot be reached",
        ConnectionError: "the hub cannot be reached",
    }
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for kind, text in words.items():
        if any(isinstance(each, kind) for each in causes):
            return text
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _fetch_modelscope(base: str, repo_id: str, revision: str | None, download: bool, called: str) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise UserError(
            "model.source is modelscope, but modelscope is not installed",
            hint="pip install 'baichuan2-finetune[modelscope]'",
        ) from error
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=list(FILES), local_files_only=not download
            )
        )
    except Exception as error:  # modelscope raises requests', its own and built-in errors
        raise UserError(
            f"{called}: {base} cannot be downloaded from ModelScope: {error}",
            hint=f"check the network, or set model.base to a local folder; {NANO_HINT}",
        ) from error


def load_tokenizer(folder: Path | str) -> BaichuanTokenizer:
    """The tokenizer of a model folder.

    Raises:
        UserError: if the folder has none that can be read.
    """
    from finetune.baichuan.tokenization import BaichuanTokenizer

    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(
            f"{folder}: has neither tokenizer.model nor tokenizer.json",
            hint="copy the tokenizer files of the official release into the folder",
        )
    try:
        return BaichuanTokenizer.from_pretrained(folder)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        for path in sorted(Path(folder).glob("*token*.json")):
            read_json(path)  # names the file if that is what is wrong
        raise UserError(
            f"{folder}: the tokenizer cannot be read: {error}", hint="download the tokenizer files again"
        ) from error


def pick_device() -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to hold and compute unquantised weights in.

    On a CPU 16-bit arithmetic is emulated on most machines, slower and less exact than float32, which is
    taken instead.
    """
    import torch

    return torch.float32 if device.type == "cpu" else getattr(torch, name)


def load_model(
    settings: Model, base: Base, *, device: torch.device | None = None, compiled: bool = False
) -> BaichuanForCausalLM:
    """The base, frozen, its head normalised once, on this process's device.

    Args:
        settings: the recipe's model section.
        base: from `resolve_base`.
        device: where to put it; None is this process's GPU or the CPU.
        compiled: whether its layers will be compiled.

    Raises:
        UserError: if the weights are damaged, incomplete, or want to run code.
    """
    import pickle

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from finetune.baichuan.register import register

    register()
    if settings.embeddings == "int8" and base_is_sharded():
        raise UserError(
            "model.embeddings: int8 does not work where FSDP or ZeRO-3 cuts the base up",
            hint="set model.embeddings to full, or use recipes/accelerate/ddp.yaml",
        )
    device = device or pick_device()
    dtype = compute_dtype(settings.dtype, device)
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention_of(settings, base, device, compiled=compiled).implementation,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # refused below, by name
    }
    if not _sharded_by_deepspeed():  # which cuts the weights up itself, as they are read
        # FSDP cuts them up afterwards: until then they lie in host memory, a card may not hold them whole.
        arguments["device_map"] = {"": "cpu" if _sharded_by_fsdp() else device}
    if settings.quantization != "none" and not base.quantized:
        arguments["quantization_config"] = quantization_config(settings.quantization, dtype)
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(base.folder, **arguments)
    except pickle.UnpicklingError as error:
        raise unsafe_pickle(base.folder, error) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        if "out of memory" in str(error):
            raise
        if isinstance(error.__cause__ or error.__context__, pickle.UnpicklingError):
            raise unsafe_pickle(base.folder, error) from error
        raise UserError(f"{base.folder}: the model cannot be loaded: {error}") from error
    missing = sorted(info.get("missing_keys", []))
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", []))
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:4])
        raise UserError(
            f"{base.folder}: {plural(len(missing + mismatched), 'weight')} missing or of another shape: {names}",
            hint="the folder does not hold a complete Baichuan model: download or make it again",
        )
    model.requires_grad_(False)
    model.freeze_head()
    if settings.embeddings == "int8":
        from finetune.baichuan.int8_rows import quantise_embeddings

        quantise_embeddings(model)
    return model


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """bitsandbytes settings: ``nf4`` with double quantisation (QLoRA), or ``int8`` (LLM.int8)."""
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(SKIPPED_MODULES),
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(SKIPPED_MODULES))


def attention_of(
    settings: Model, base: Base, device: torch.device | None = None, *, compiled: bool = False
) -> Attention:
    """The attention implementation that a base is loaded with, and why.

    Args:
        settings: the recipe's model section.
        base: from `resolve_base`.
        device: where the model computes; None is this process's GPU or the CPU.
        compiled: whether its layers will be compiled.

    Raises:
        UserError: if the one asked for is not installed, or not for this device or precision.
    """
    from finetune.baichuan.attention_choice import choose_attention

    device = device or pick_device()
    dtype = compute_dtype(settings.dtype, device)
    encoding = base.config["position_embedding"]
    return choose_attention(settings.attention, device, dtype, encoding, compiled=compiled)


def base_is_sharded() -> bool:
    """Whether FSDP or DeepSpeed ZeRO-3 cuts the base over the processes of this run."""
    return _sharded_by_fsdp() or _sharded_by_deepspeed()


def _sharded_by_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _sharded_by_deepspeed() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()
