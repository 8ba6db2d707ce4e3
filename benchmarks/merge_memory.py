"""Peak memory and throughput of merging a large model.

Writes a random Baichuan of about 2 billion parameters in 500 MB shards of bfloat16 and a LoRA adapter of rank 64 on
every matrix, merges them in a process of its own, and compares with a plain copy of the same files. Both read from
a cold cache where the system lets a process drop its files from it, and both end when their data is on the disk.

    python benchmarks/merge_memory.py        # about 13 GB of disk, a few minutes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import write_result

if TYPE_CHECKING:
    import torch

HIDDEN, WIDE, HEADS, VOCABULARY = 2560, 6912, 20, 125_696
RANK = 64
SHARD = "500MB"
FIXED_MB = 600
"""What Python, torch and transformers take, and working space."""
LEAST_THROUGHPUT = 0.4

MERGE = """
import json, sys, time
from finetune.adapters import merge_adapter
start = time.perf_counter()
merge_adapter(sys.argv[1], sys.argv[2], max_shard_size=sys.argv[3], verify=False)
status = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak}))
"""


def config(layers: int) -> Any:
    """Shapes of the model, those of Baichuan 2 between the nano and 7B."""
    from finetune.baichuan import BaichuanConfig

    return BaichuanConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        architectures=["BaichuanForCausalLM"],
        dtype="bfloat16",
    )


def random_weights(layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, one in memory at a time."""
    import torch

    from finetune.baichuan.shapes import weight_shapes

    generator = torch.Generator().manual_seed(0)
    for name, shape in weight_shapes(config(layers)).items():
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        else:
            yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def write_base(folder: Path, layers: int) -> int:
    """Write the base; returns its number of parameters."""
    from finetune.baichuan.nano import ensure_nano
    from finetune.baichuan.shards import ShardWriter, parse_size

    folder.mkdir()
    shards = ShardWriter(folder, parse_size(SHARD))
    parameters = 0
    for name, tensor in random_weights(layers):
        shards.add(name, tensor)
        parameters += tensor.numel()
    shards.finish()
    config(layers).save_pretrained(folder)
    for file in ensure_nano("baichuan2-nano").glob(
        "*token*"
    ):  # of no consequence here, but a folder needs one
        shutil.copyfile(file, folder / file.name)
    return parameters


def write_adapter(folder: Path, base: Path, layers: int) -> int:
    """Write a random LoRA adapter as peft saves it; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from finetune.adapters.build import ALL_LINEAR
    from finetune.baichuan.shapes import weight_shapes

    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in weight_shapes(config(layers)).items():
        module = name.removesuffix(".weight")
        if not module.endswith(ALL_LINEAR):
            continue
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.02
        tensors[f"{key}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": list(ALL_LINEAR),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return (folder / "adapter_model.safetensors").stat().st_size


def drop_from_cache(folder: Path) -> None:
    """Have the next reader of these files read the disk."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_copy(source: Path, target: Path) -> float:
    """Seconds that a plain copy of the weight files takes, until it is on the disk."""
    drop_from_cache(source)
    target.mkdir()
    start = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def run_merge(adapter: Path, base: Path, target: Path) -> dict[str, float]:
    """Peak resident bytes (VmHWM) and seconds of a merge in a new process; imports are not timed."""
    drop_from_cache(base)
    command = [sys.executable, "-c", MERGE, str(adapter), str(target), SHARD]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(target)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, layers: int, repeats: int) -> dict[str, Any]:
    """Everything that is printed and kept."""
    base, adapter = folder / "base", folder / "adapter"
    parameters = write_base(base, layers)
    adapter_bytes = write_adapter(adapter, base, layers)
    files = [path.stat().st_size for path in base.glob("*.safetensors")]
    copies, merges = [], []
    for _ in range(repeats):  # in turn, so that a busy disk slows both
        copies.append(time_copy(base, folder / "copy"))
        merges.append(run_merge(adapter, base, folder / "merged"))
    seconds = sorted(run["seconds"] for run in merges)[repeats // 2]
    copy_seconds = sorted(copies)[repeats // 2]
    return {
        "settings": {
            "parameters": parameters,
            "layers": layers,
            "rank": RANK,
            "shard": SHARD,
            "repeats": repeats,
        },
        "weight_bytes": sum(files),
        "largest_shard_bytes": max(files),
        "adapter_bytes": adapter_bytes,
        "peak_bytes": max(run["peak_bytes"] for run in merges),
        "bound_bytes": 2 * max(files) + adapter_bytes + FIXED_MB * 10**6,
        "merge_seconds": round(seconds, 2),
        "copy_seconds": round(copy_seconds, 2),
        "merge_gb_per_second": round(sum(files) / seconds / 1e9, 3),
        "copy_gb_per_second": round(sum(files) / copy_seconds / 1e9, 3),
        "throughput_of_copy": round(copy_seconds / seconds, 3),
    }


def main() -> int:
    """Measure, print, keep; returns 1 when a bound is not held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=18, help="of the model; 18 make 2 billion parameters")
    parser.add_argument(
        "--repeats", type=int, default=3, help="copies and merges, of which the median counts"
    )
    parser.add_argument("--folder", type=Path, help="where to work, if not in the usual temporary place")
    parser.add_argument("--dry", action="store_true", help="keep no result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        result = measure(Path(temporary), options.layers, options.repeats)
    peak, bound, ratio = result["peak_bytes"], result["bound_bytes"], result["throughput_of_copy"]
    print(f"parameters             {result['settings']['parameters'] / 1e9:.2f} billion")
    print(f"weights                {result['weight_bytes'] / 1e9:.2f} GB in shards of {SHARD}")
    print(f"peak resident memory   {peak / 1e6:.0f} MB (bound {bound / 1e6:.0f} MB)")
    print(f"merge                  {result['merge_seconds']} s, {result['merge_gb_per_second']} GB/s")
    print(f"plain copy             {result['copy_seconds']} s, {result['copy_gb_per_second']} GB/s")
    print(f"throughput             {ratio:.2f} of a copy (bound {LEAST_THROUGHPUT})")
    if not options.dry:
        print(f"kept in                {write_result('merge_memory', result)}")
    return int(peak > bound or ratio < LEAST_THROUGHPUT)


if __name__ == "__main__":
    raise SystemExit(main())
