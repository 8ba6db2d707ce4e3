"""Adapters into the weights of their base, one weight file at a time.

Memory stays near one weight file plus the adapter. Changes are computed in float32; what the adapter does not
touch, the head among it, is copied bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.baichuan.shards import ShardWriter, check_disk, check_output, parse_size, progress_bar, staging
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.adapters.merge_plan import MergePlan
    from finetune.adapters.merge_record import FileHashes
    from finetune.adapters.verify import Verification


def merge_adapter(
    adapter: Path | str | Sequence[Path | str],
    output: Path | str,
    *,
    base: str | None = None,
    force_base: bool = False,
    weights: Sequence[float] | None = None,
    combine: str = "linear",
    density: float = 0.5,
    seed: int = 0,
    onto: str | None = None,
    format: str = "baichuan",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool | None = None,
    progress: bool = False,
) -> Path:
    """Write base plus adapter as a plain model folder.

    Args:
        adapter: adapter folder, or several.
        output: folder to write; must not exist. It is there complete or not at all.
        base: name, folder or hub id; None is the base that the (first) adapter names.
        force_base: merge even if the base is not, or may not be, the one that the adapter was trained on.
        weights: a factor for each adapter; needed for several.
        combine: how several are combined: ``linear``, ``ties``, ``dare_linear`` or ``dare_ties``; see
            `finetune.adapters.combine`.
        density: share of values that TIES and DARE keep.
        seed: of DARE's random choice.
        onto: ``original`` weights, or ``dequantized``: those that training on a quantised base computed with,
            rounded to 4 bits and expanded again. None is ``original``, unless the base itself is quantised.
        format: ``baichuan``, or ``llama`` for stock ``LlamaForCausalLM`` (RoPE models).
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps each tensor's own.
        max_shard_size: largest weight file, such as ``5GB``.
        verify: compare with base and adapter before the folder appears; None does if memory allows.
        progress: show bars when stderr is a terminal.

    Returns:
        ``output``. Its ``merge.json`` says what it was made of and what verification found.

    Raises:
        UserError: an adapter that cannot be merged, is damaged, or does not belong to the base; an existing
            output; too little disk or memory; or a merged model that differs from base and adapter by more than
            rounding explains.
    """
    from finetune.adapters.merge_plan import plan_merge
    from finetune.adapters.merge_record import FileHashes, write_record

    output, shard_bytes = Path(output), parse_size(max_shard_size)
    check_output(output)
    folders = [adapter] if isinstance(adapter, (str, Path)) else adapter
    plan = plan_merge(
        [Path(folder) for folder in folders],
        base=base,
        force_base=force_base,
        weights=weights,
        combine=combine,
        density=density,
        seed=seed,
        onto=onto,
        format=format,
        dtype=dtype,
    )
    check_disk(output, plan.expected_bytes())
    skipped = _reason_not_to_verify(plan, verify)

    with staging(output) as folder:
        hashes = FileHashes()
        try:
            written = _write_weights(plan, folder, shard_bytes, hashes, progress=progress)
            most = max(written, key=written.__getitem__)
            _write_companions(plan, folder, most)
            verification = skipped or _verify(plan, folder, written, progress=progress)
            write_record(
                folder,
                plan,
                hashes.result(),
                dtype=most,
                max_shard_size=max_shard_size,
                verification=verification,
            )
        finally:
            hashes.close()
    return output


def _write_weights(
    plan: MergePlan, folder: Path, shard_bytes: int, hashes: FileHashes, *, progress: bool
) -> Counter[str]:
    """Write the weights; returns the bytes by dtype of those that are not quantised."""
    import torch

    from finetune.adapters.dequantized import is_statistic

    tensors = plan.weights(hashes.add)
    if plan.format == "llama":
        from finetune.export.llama import llama_tensors

        tensors = llama_tensors(tensors, plan.config, getattr(torch, plan.dtype) if plan.dtype else None)
    shards = ShardWriter(folder, shard_bytes)
    written: Counter[str] = Counter()
    with progress_bar("merging", plan.expected_bytes(), shown=progress) as advance:
        for name, tensor in tensors:
            shards.add(name, tensor)
            advance(tensor.nbytes)
            if tensor.is_floating_point() and not is_statistic(name):
                written[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        shards.finish()
    return written


def _write_companions(plan: MergePlan, folder: Path, dtype: str) -> None:
    """Config, tokenizer, chat template, generation defaults and licence notices."""
    from finetune.adapters.virtual_tokens import write_virtual_token_companions
    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.export.companions import write_companions, write_tokenizer
    from finetune.export.llama import write_llama_companions

    source = plan.base.folder
    if plan.format == "llama":
        write_llama_companions(source, folder, dtype)
    else:
        settings = plan.config.to_dict()
        if not plan.keeps_quantization:
            settings.pop("quantization_config", None)
        config = BaichuanConfig.from_dict(settings)
        config.dtype = dtype
        config.architectures = ["BaichuanForCausalLM"]
        if plan.score is not None:
            config.architectures, config.num_labels = ["BaichuanForSequenceClassification"], 1
        write_companions(source, folder, config)
        if plan.score is None and not plan.token_ids:  # the official chat() would leave virtual tokens out
            _keep_remote_code(source, folder)
    own = plan.adapters[0].folder
    if any((own / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        write_tokenizer(own, folder)
    if (own / "reward.json").is_file():  # what its scores mean
        shutil.copyfile(own / "reward.json", folder / "reward.json")
    if plan.token_ids:
        write_virtual_token_companions(folder, plan.token_ids)
        write_tokenizer(folder, folder)  # what other engines read there, written anew


def _keep_remote_code(source: Path, folder: Path) -> None:
    """Take the official modelling code along where the base has it: engines without this package ask for it."""
    auto_map = json.loads((source / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    official = {name: entry for name, entry in auto_map.items() if isinstance(entry, str)}
    files = {f"{entry.split('.')[0]}.py" for entry in official.values()}
    if not files or not all((source / name).is_file() for name in files):
        return
    for path in source.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": official}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _reason_not_to_verify(plan: MergePlan, wanted: bool | None) -> str:
    """Why there is no verification; empty if there is.

    Raises:
        UserError: asked for, and not possible.
    """
    from finetune.adapters.verify import room_to_verify

    if wanted is False:
        return "not wanted"
    if plan.score is not None:
        return "a reward model predicts no tokens to compare"
    needed, free = room_to_verify(plan)
    if needed <= free:
        return ""
    reason = f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    if wanted:
        raise UserError(f"--verify: {reason}", hint="merge without it, and verify on a larger machine")
    return reason


def _verify(plan: MergePlan, folder: Path, dtypes: Iterable[str], *, progress: bool) -> Verification:
    import warnings

    from finetune.adapters.verify import coarsest, verify_merge

    with progress_bar("verifying", 1, shown=progress), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # among libraries; nothing that a user could change
        return verify_merge(plan, folder, coarsest(dtypes))


REWARD_MODEL = (
    "note: this adapter is a reward model: merged, it is a classifier with one score "
    "(BaichuanForSequenceClassification), which ppo.reward takes; it writes no text"
)


def merge_summary(folder: Path | str) -> tuple[list[str], list[list[str]]]:
    """What a merge has to say for itself: lines, and a table of its verification (header first, or empty)."""
    from finetune.adapters.merge_record import read_record

    record: dict[str, Any] = read_record(folder)
    verification, settings = record["verification"], record["settings"]
    if "skipped" in verification:
        kind = [REWARD_MODEL] if record.get("reward_model") else []
        return [*kind, f"not verified: {verification['skipped']}", *_advice(record, None)], []
    rows = [["compared with", "max |Δlogit|", "Δ / spread", "adapter's own Δ", "mean KL", "same next token"]]
    for each in verification["comparisons"]:
        rows.append(
            [
                each["reference"],
                f"{each['max_difference']:.3g}",
                f"{each['relative_difference']:.3%}",
                f"{each['adapter_effect']:.3%}",
                f"{each['mean_kl']:.3g}",
                f"{each['agreement']:.1%} of {each['tokens']}",
            ]
        )
    lines = [f"verified on {verification['device']} in {verification['dtype']}: {settings['dtype']} weights"]
    return lines + _advice(record, verification["comparisons"][-1]), rows


LITTLE = 0.95
"""Share of equal next tokens from which on two models differ a little."""


def _advice(record: dict[str, Any], measured: dict[str, Any] | None) -> list[str]:
    """Which way to merge fits when, for adapters that were trained on a quantised base."""
    held = {adapter["training"].get("quantization", "none") for adapter in record["adapters"]}
    trained = " and ".join(sorted(held - {"none"}))
    if not trained or record["settings"].get("quantization"):
        return []
    figures, how = "", "differently"
    if measured:
        how = "a little differently" if measured["agreement"] >= LITTLE else "noticeably differently: test it"
        figures = f" (mean KL {measured['mean_kl']:.3g}, same next token {measured['agreement']:.1%})"
    return [
        f"trained on the {trained} base, merged onto the original weights: this keeps the base's full precision, "
        f"and answers {how} from the model that was trained{figures}; --onto dequantized gives exactly what "
        "training saw"
    ]
