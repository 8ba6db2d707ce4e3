"""Reading what has been released: layouts, integrity, and the official 4-bit files.

transformers reads sharded ``.bin`` (with ``weights_only=True``) and safetensors by itself. Two things are added
here: the layout of the official 4-bit Chat releases, and a check of a folder before anything heavy starts, so
that a broken download is named by file instead of ending in a traceback.
"""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.words import are, plural

if TYPE_CHECKING:
    import torch

DATA_SUFFIX = ".weight.data"
STATE_SUFFIX = ".weight.quant_state"
WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
HUB_KEYS = ("cache_dir", "revision", "token", "local_files_only")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def find_weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in order, each verified to exist.

    Raises:
        UserError: if there are none, or the index names files that are not there.
    """
    for name in WEIGHT_INDEXES:
        index = folder / name
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            shards = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
            if not shards:
                raise UserError(f"{index}: has no weight_map", hint="download the folder again")
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise UserError(
                    f"{folder}: {len(missing)} of {plural(len(shards), 'weight file')} that {name} names "
                    f"{are(len(missing))} missing: " + ", ".join(missing[:4]),
                    hint="the download is incomplete: fetch the missing files",
                )
            return [folder / shard for shard in shards]
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(
        f"{folder}: holds no weights (looked for {', '.join(WEIGHT_INDEXES + WEIGHT_FILES)})",
        hint="point model.base at a complete model folder",
    )


def check_folder(folder: Path) -> None:
    """Check that a local model folder is complete and readable, without reading the weights.

    Raises:
        UserError: naming the file that is missing, cut short or no checkpoint at all.
    """
    if not (folder / "config.json").is_file():
        hint = "give a folder with config.json and weights, or a name from `finetune catalog`"
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter: give its base as the model and this folder as --adapter"
        raise UserError(f"{folder}: no config.json, so not a model folder", hint=hint)
    config = read_json(folder / "config.json")
    if config.get("model_type") == "llama":
        raise UserError(
            f"{folder}: a model in Llama's layout, as `--format llama` writes it; expected Baichuan's",
            hint="load it with transformers, vLLM or whatever else reads Llama models; for this toolkit, merge "
            "with --format baichuan",
        )
    if config.get("model_type") != "baichuan":
        raise UserError(
            f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}, expected 'baichuan'",
            hint="this toolkit fine-tunes the Baichuan family only",
        )
    if "BaichuanForSequenceClassification" in (config.get("architectures") or []):
        raise UserError(
            f"{folder}: a reward model, which scores conversations and writes no text; expected a language model",
            hint="PPO takes it as ppo.reward; AutoModelForSequenceClassification loads it",
        )
    _check_config(config, folder / "config.json")
    for path in find_weight_files(folder):
        check_weight_file(path)


def _check_config(config: dict[str, Any], path: Path) -> None:
    from huggingface_hub.errors import StrictDataclassError

    from finetune.baichuan.configuration import BaichuanConfig

    try:
        BaichuanConfig.from_dict(config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {reason}", hint="restore the file from the official repository") from error


def check_weight_file(path: Path) -> None:
    """Check the frame of a weight file: a safetensors header that fits its size, or an intact zip archive."""
    size = path.stat().st_size
    hint = "the file is damaged or was cut short: download or make it again"
    if path.suffix == ".safetensors":
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(size, 100 << 20):
                    raise ValueError(f"header of {length} bytes in a file of {size}")
                header = json.loads(file.read(length))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
            if size != 8 + length + end:
                raise ValueError(f"{size} bytes, expected {8 + length + end}")
        except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a complete safetensors file ({error})", hint=hint) from error
    elif not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a Git LFS pointer, not the weights", hint="run `git lfs pull` there")
        if head[:1] == b"\x80":
            return  # the torch format before 1.6: read with weights_only as well
        raise UserError(f"{path}: not a PyTorch checkpoint", hint=hint)


def read_bin(path: Path) -> dict[str, Any]:
    """Read a ``.bin`` file without executing anything in it.

    Raises:
        UserError: if the pickle wants to run code, or the file is damaged.
    """
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise unsafe_pickle(path, error) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})", hint="download the file again") from error


def unsafe_pickle(path: Path | str, error: Exception) -> UserError:
    """The refusal of a pickle that contains more than tensors."""
    reason = str(error).strip()
    what = next(
        (line.strip() for line in reason.splitlines() if "Unsupported" in line or "GLOBAL" in line), ""
    )
    return UserError(
        f"{path}: refused, this pickle holds more than tensors and could run code when read"
        + (f" ({what})" if what else ""),
        hint="get the weights from the official repository, or as safetensors",
    )


def adapt_official_quantized(name: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Keyword arguments that load an official 4-bit release, or None if ``name`` is anything else.

    Args:
        name: folder or hub id given to ``from_pretrained``.
        kwargs: its keyword arguments; ``config`` is a BaichuanConfig when an Auto class calls.

    Returns:
        ``kwargs`` with ``config`` and a bitsandbytes ``state_dict``.
    """
    from finetune.baichuan.configuration import BaichuanConfig

    if name is None or kwargs.get("state_dict") is not None:
        return None
    hub = {key: kwargs[key] for key in HUB_KEYS if key in kwargs}
    config = kwargs.get("config")
    if not isinstance(config, BaichuanConfig):
        config = BaichuanConfig.from_pretrained(config or name, **hub)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or not quantization.get("load_in_4bit"):
        return None
    path = _official_bin(name, hub)
    if path is None:
        return None
    entries = read_bin(path)
    if not any(key.endswith(STATE_SUFFIX) for key in entries):
        return None
    state_dict = bitsandbytes_state_dict(entries, path)
    return {**kwargs, "config": config, "state_dict": state_dict}


def keep_one_quantized_layout(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit matrices in place at the first evaluation on a CPU.

    The repacked layout wants rows in multiples of 32 and is unpacked again at every training step after it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def read_generation_config(name: Any, kwargs: dict[str, Any], config: Any) -> Any:
    """The generation defaults beside the weights, or those that the model's config implies."""
    from transformers import GenerationConfig

    hub = {key: kwargs[key] for key in HUB_KEYS if key in kwargs}
    try:
        return GenerationConfig.from_pretrained(name, **hub)
    except OSError:
        return GenerationConfig.from_model_config(config)


def bitsandbytes_state_dict(entries: dict[str, Any], path: Path | str = "") -> dict[str, torch.Tensor]:
    """Turn the official 4-bit entries into the keys that bitsandbytes serialises.

    ``NAME.weight.data`` (uint8, packed) and ``NAME.weight.quant_state``, a list ``[absmax uint8, shape, dtype,
    blocksize, [offset, [absmax2, code2, blocksize2, …]], "nf4", code]``, become ``NAME.weight`` and its
    statistics. Other entries stay.

    Raises:
        UserError: if a matrix lacks its statistics or they have another form.
    """
    from bitsandbytes.functional import QuantState

    result: dict[str, torch.Tensor] = {}
    for key, value in entries.items():
        if key.endswith(STATE_SUFFIX):
            continue
        if not key.endswith(DATA_SUFFIX):
            result[key] = value
            continue
        name = key.removesuffix(".data")
        try:
            absmax, shape, dtype, blocksize, (offset, second), quant_type, code = entries[
                name + ".quant_state"
            ]
            state = QuantState(
                absmax=absmax,
                shape=shape,
                dtype=dtype,
                blocksize=blocksize,
                code=code,
                quant_type=quant_type,
                offset=offset,
                state2=QuantState(absmax=second[0], code=second[1], blocksize=second[2], dtype=second[4]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{path}: {name} is not in the layout of the official 4-bit releases ({error!r})",
                hint="download the release again",
            ) from error
        result[name] = value.reshape(-1, 1)
        for statistic, tensor in state.as_dict(packed=True).items():
            result[f"{name}.{statistic}"] = tensor
    return result


def _official_bin(name: Any, hub: dict[str, Any]) -> Path | None:
    folder = Path(name)
    if folder.is_dir():
        path = folder / "pytorch_model.bin"
        return path if path.is_file() and not (folder / "model.safetensors").is_file() else None
    from transformers.utils import cached_file

    found = cached_file(str(name), "pytorch_model.bin", _raise_exceptions_for_missing_entries=False, **hub)
    return Path(found) if found else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: if the file holds no such thing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not valid JSON ({error})", hint="download the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
