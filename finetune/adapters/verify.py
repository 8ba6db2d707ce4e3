"""Whether a merged model answers as base and adapter do.

A few conversations go through both, one model in memory at a time, and the logits at every token are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    import torch

    from finetune.adapters.merge_plan import MergePlan
    from finetune.recipe.schema import Model

CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "感冒了应该注意什么？"), ("assistant", "多休息，多喝温水，饮食清淡，发热不退时及时就医。")),
    (
        ("system", "你是一名严谨的法律顾问。"),
        ("user", "租房合同没有写明押金何时退还，我该怎么办？"),
        ("assistant", "可以先与房东协商并保留付款凭证；协商不成，可以依法向法院起诉。"),
    ),
    (
        ("user", "Explain in one sentence why the sky is blue."),
        ("assistant", "Air scatters short wavelengths of sunlight more than long ones."),
    ),
    (("user", "用一句话介绍长江。"), ("assistant", "长江是亚洲最长的河流，全长约6300公里。")),
    (
        ("user", "Write a Python function that adds two numbers."),
        ("assistant", "def add(a, b):\n    return a + b"),
    ),
    (
        ("user", "17加25等于多少？"),
        ("assistant", "等于42。"),
        ("user", "And 42 minus 7?"),
        ("assistant", "35."),
    ),
)

TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.2}
"""Largest root mean square of the logits' differences, as a share of the logits' standard deviation, by what the
weights are rounded to or computed in. LLM.int8 also rounds what goes into its products, which merged weights do
not."""
FLOOR = {"float32": 0.02, "16-bit": 0.2}
"""As a share of the tolerance, by what is computed in: 16-bit arithmetic alone makes logits differ."""
LARGEST_LOSS = 0.5
"""Largest difference as a share of what the adapter changes: beyond it, more than half of the adapter is lost."""


@dataclass(frozen=True)
class Comparison:
    """Logits of the merged model against a reference.

    Attributes:
        reference: what the merged model is compared with.
        max_difference: largest |Δlogit|.
        relative_difference: root mean square of Δlogit over the logits' standard deviation.
        adapter_effect: the same of base alone against base and adapter: what there is to lose.
        mean_kl: mean over tokens of KL(reference ‖ merged), in nats.
        agreement: share of tokens after which both hold the same next token likeliest.
        tokens: compared.
        tolerance: that relative_difference must keep, or None where it is only reported.
        floor: an adapter_effect below it cannot be told from rounding.
    """

    reference: str
    max_difference: float
    relative_difference: float
    adapter_effect: float
    mean_kl: float
    agreement: float
    tokens: int
    tolerance: float | None
    floor: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the difference is what rounding explains, and small beside what the adapter does."""
        if self.tolerance is None:
            return True
        lost = self.relative_difference > LARGEST_LOSS * self.adapter_effect
        return self.relative_difference <= self.tolerance and not (lost and self.adapter_effect > self.floor)


@dataclass(frozen=True)
class Verification:
    """What `verify_merge` found.

    Attributes:
        device: that computed.
        dtype: that was computed in.
        comparisons: the one that decides first; then, for an adapter that was trained on a quantised base but
            merged onto the original one, the one with what training saw.
    """

    device: str
    dtype: str
    comparisons: tuple[Comparison, ...]


def promise() -> str:
    """What a merge is held to, for those who ask before it."""
    listed = ", ".join(f"{bound:.1%} in {name}" for name, bound in TOLERANCE.items())
    return (
        "the merged model's logits may differ from those of base and adapter by the rounding of what it is written "
        f"and computed in (root mean square, of their spread: {listed}), and by at most {LARGEST_LOSS:.0%} of what "
        "the adapter changes"
    )


def room_to_verify(plan: MergePlan) -> tuple[int, int]:
    """Bytes that verification needs, and that are free on the device it would use."""
    import psutil
    import torch

    from finetune.baichuan.load import compute_dtype, pick_device

    device = pick_device()
    size = compute_dtype(_dtype_name(plan), device).itemsize
    needed = int(plan.parameters * size * 1.15) + (1 << 29)
    if device.type == "cuda":
        return needed, torch.cuda.mem_get_info(device)[0]
    return needed, psutil.virtual_memory().available


def verify_merge(plan: MergePlan, folder: Path, dtype: str) -> Verification:
    """Compare a merged folder with what it was made of.

    Args:
        plan: of the merge.
        folder: that was written.
        dtype: of its weights; of several the coarsest.

    Raises:
        UserError: if the difference is more than rounding explains.
    """
    import torch

    from finetune.baichuan.load import compute_dtype, load_tokenizer, pick_device

    device = pick_device()
    computed = str(compute_dtype(_dtype_name(plan), device)).removeprefix("torch.")
    rows = token_rows(load_tokenizer(plan.base.folder))
    trained = plan.adapters[0].quantization
    # Decides: the adapter on the very weights that it was merged into.
    begun = plan.quantization if plan.onto == "dequantized" and not plan.base.quantized else "none"
    comparisons = []
    alone, expected = _reference(plan, rows, begun)
    merged = _merged(plan, folder, rows)
    label = f"base ({plan.quantization}) + adapter" if plan.onto == "dequantized" else "base + adapter"
    arithmetic = coarsest([computed, _arithmetic_on_disk(plan) or computed])
    tolerance = max(TOLERANCE[dtype], TOLERANCE[arithmetic])
    if "int8" in (begun, plan.base.quantization):
        tolerance = max(tolerance, TOLERANCE["int8"])
    floor = FLOOR["float32" if arithmetic == "float32" else "16-bit"] * tolerance
    comparisons.append(compare(label, expected, merged, alone, tolerance, floor))
    if trained != begun and plan.onto == "original" and not plan.base.quantized and len(plan.adapters) == 1:
        del alone, expected
        alone, expected = _reference(plan, rows, trained)
        comparisons.append(compare(f"base ({trained}) + adapter, as trained", expected, merged, alone, None))
    result = Verification(torch.device(device).type, computed, tuple(comparisons))
    if not comparisons[0].passed:
        raise UserError(_failure(comparisons[0], dtype), hint=_advice(plan, dtype))
    return result


def coarsest(dtypes: Iterable[str]) -> str:
    """The dtype of a model's weights that rounds most."""
    return max(dtypes, key=TOLERANCE.__getitem__)


def token_rows(tokenizer: Any) -> list[list[int]]:
    """The built-in conversations in the chat format."""
    from finetune.baichuan.chat import build_prompt

    return [
        build_prompt(tokenizer, [{"role": role, "content": text} for role, text in messages])
        for messages in CONVERSATIONS
    ]


def compare(
    reference: str,
    expected: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
    alone: Sequence[torch.Tensor],
    tolerance: float | None,
    floor: float = 0.0,
) -> Comparison:
    """Put numbers on a difference.

    Args:
        reference: its name.
        expected: logits of base and adapter, float32 of shape (tokens, vocabulary) for each conversation.
        found: those of the merged model.
        alone: those of the base without adapter.
        tolerance: see `Comparison`.
        floor: see `Comparison`.
    """
    import torch

    maximum = squares = effect = spread = kl = 0.0
    same = tokens = values = 0
    for want, have, base in zip(expected, found, alone):
        maximum = max(maximum, float((have - want).abs().max()))
        squares += float((have - want).square().sum(dtype=torch.float64))
        effect += float((base - want).square().sum(dtype=torch.float64))
        spread += float((want - want.mean(dim=-1, keepdim=True)).square().sum(dtype=torch.float64))
        log_want, log_have = want.double().log_softmax(-1), have.double().log_softmax(-1)
        kl += float((log_want.exp() * (log_want - log_have)).sum())
        same += int((want.argmax(-1) == have.argmax(-1)).sum())
        tokens += want.shape[0]
        values += want.numel()
    if not all(map(_finite, (maximum, squares, kl))):
        maximum = squares = kl = float("inf")
    scale = max(spread / values, 1e-30)
    return Comparison(
        reference=reference,
        max_difference=maximum,
        relative_difference=(squares / values / scale) ** 0.5,
        adapter_effect=(effect / values / scale) ** 0.5,
        mean_kl=max(kl / tokens, 0.0),  # rounding may leave it a little below
        agreement=same / tokens,
        tokens=tokens,
        tolerance=tolerance,
        floor=floor,
    )


def _finite(value: float) -> bool:
    from math import isfinite

    return isfinite(value)


def _dtype_name(plan: MergePlan) -> str:
    return str(plan.compute_dtype).removeprefix("torch.")


def _arithmetic_on_disk(plan: MergePlan) -> str | None:
    """What a 4-bit folder says to multiply in, whatever it is loaded in."""
    settings = plan.base.config.get("quantization_config") or {}
    found = settings.get("bnb_4bit_compute_dtype") if plan.base.quantization == "nf4" else None
    return str(found).removeprefix("torch.") if found else None


def _settings(plan: MergePlan, *, quantization: str = "none") -> Model:
    from finetune.recipe.schema import Model

    settings = {"base": plan.base.name, "quantization": quantization, "dtype": _dtype_name(plan)}
    return Model.model_validate(settings)


def _reference(
    plan: MergePlan, rows: list[list[int]], quantization: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of the base alone, and of base and adapter; the model is gone when they are there.

    A single adapter is put on by peft, whose arithmetic is not ours. For several, or one that is weighted, the
    weights of a loaded base are changed in memory: that checks what was written, not how it was combined.
    """
    found = _reference_logits(plan, rows, quantization)
    _free_memory()
    return found


def _reference_logits(
    plan: MergePlan, rows: list[list[int]], quantization: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    import torch

    from finetune.adapters.build import load_adapter
    from finetune.baichuan.load import load_model

    by_peft = (
        len(plan.adapters) == 1 and plan.combination.weights == (1.0,) and plan.combination.method == "linear"
    )
    held = quantization if by_peft else "none"
    model = load_model(_settings(plan, quantization=held), plan.base)
    if by_peft:
        peft_model = load_adapter(model, plan.adapters[0].folder).eval()
        with peft_model.disable_adapter():
            alone = logits(peft_model, rows)
        return alone, logits(peft_model, rows)
    alone = logits(model.eval(), rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in plan.updates:
                changed = plan.change(name, parameter.cpu(), parameter.dtype)
                parameter.copy_(changed)
    return alone, logits(model, rows)


def _merged(plan: MergePlan, folder: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits of the merged folder; virtual tokens stand in front and are not counted."""
    from finetune.baichuan.load import Base, load_model, pick_device

    if plan.format == "llama":
        from transformers import LlamaForCausalLM

        from finetune.baichuan.load import compute_dtype

        device = pick_device()
        options: dict[str, Any] = {
            "dtype": compute_dtype(_dtype_name(plan), device),
            "device_map": {"": device},
        }
        model = LlamaForCausalLM.from_pretrained(folder, **options)
    else:
        model = load_model(_settings(plan), Base(str(folder), folder, str(folder)))
    front = list(plan.token_ids)
    found = logits(model.eval(), [front + row for row in rows])
    del model
    _free_memory()
    return [values[len(front) :] for values in found]


def _free_memory() -> None:
    """Of models that nobody holds: peft's refer to themselves, and wait for the garbage collector."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def logits(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of every token of each row: float32 on the CPU, (tokens, vocabulary). peft's virtual tokens are left out."""
    import torch

    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([list(row)], device=device)
            values = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            found.append(values[0, -len(row) :].float().cpu())
    return found


def _failure(comparison: Comparison, dtype: str) -> str:
    return (
        f"the merged model does not answer as {comparison.reference}: written in {dtype}, its logits differ by "
        f"{comparison.relative_difference:.2%} of their spread (tolerance {comparison.tolerance:.2%}), at most by "
        f"{comparison.max_difference:.3g}; the adapter itself changes them by {comparison.adapter_effect:.2%}; "
        f"mean KL {comparison.mean_kl:.3g}, same next token after {comparison.agreement:.1%} of "
        f"{comparison.tokens} tokens. Nothing was written"
    )


def _advice(plan: MergePlan, dtype: str) -> str:
    if dtype != "float32":
        return (
            "write it with --dtype float32, which rounds nothing; if that passes, rounding loses too much of this "
            "adapter. --no-verify writes the folder all the same"
        )
    return "check that base and adapter belong together; --no-verify writes the folder all the same"
