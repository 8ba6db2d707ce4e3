"""A RoPE Baichuan as a Llama model, which stock transformers and every engine load with none of our code.

The two are the same function once q, k and v are matrices of their own and the head's rows have unit length:
same norms, same rotary embedding (halves, base 10,000), same SwiGLU, no biases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    import torch

    from finetune.baichuan.configuration import BaichuanConfig

KEPT = re.compile(
    r"model\.(embed_tokens|norm|layers\.\d+\.(self_attn\.o_proj|mlp\.(gate|up|down)_proj"
    r"|(input|post_attention)_layernorm))\.weight"
)
HEAD = "lm_head.weight"
ROWS = 16_384
"""Rows of the head that are normalised at once, so that no float32 copy of all of it is made."""


def check_llama(config: BaichuanConfig, folder: Path | str) -> None:
    """Refuse models that are no Llama models.

    Raises:
        UserError: ALiBi, for which Llama has no place; or weights that are quantised already.
    """
    if config.position_embedding != "rope":
        raise UserError(
            f"{folder}: its position encoding is ALiBi (13B), and Llama's is rotary: no weights of a Llama model "
            "compute the same",
            hint="keep the Baichuan layout, which vLLM and llama.cpp read too: see docs/merging.md",
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{folder}: the weights are quantised already",
            hint="export the 16-bit release of the same model, or what was merged onto it",
        )


def llama_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], config: BaichuanConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the Llama model, one Baichuan tensor at a time.

    W_pack becomes q_proj, k_proj and v_proj. A head that Baichuan normalises at every step (``norm_head``) is
    normalised once, in float32. The rotary frequencies of old checkpoints are left out.

    Args:
        tensors: names and tensors of the Baichuan model, merged ones included.
        config: its configuration.
        dtype: of the result; None keeps each tensor's own.

    Raises:
        UserError: at a tensor that a Llama model has no place for.
    """
    for name, tensor in tensors:
        kept = tensor.dtype if dtype is None else dtype
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name == HEAD:
            yield name, _normalized(tensor, kept) if config.norm_head else tensor.to(kept)
        elif name.endswith(".self_attn.W_pack.weight"):
            for part, rows in zip("qkv", tensor.chunk(3)):
                yield name.replace("W_pack", f"{part}_proj"), rows.to(kept).clone()
        elif KEPT.fullmatch(name):
            yield name, tensor.to(kept)
        else:
            raise UserError(f"a Llama model has no place for {name}", hint="export a plain causal model")


def _normalized(head: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of unit length, computed in float32."""
    import torch

    result = torch.empty_like(head, dtype=dtype)
    for start in range(0, head.shape[0], ROWS):
        rows = head[start : start + ROWS].float()
        result[start : start + ROWS] = torch.nn.functional.normalize(rows)
    return result


def write_llama_companions(source: Path, folder: Path, dtype: str | None) -> None:
    """Config, generation config, tokenizer and licence notices to go with `llama_tensors`.

    Args:
        source: the Baichuan folder.
        folder: where to write.
        dtype: of the weights; None is what the source's config says.
    """
    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.export.companions import write_companions

    write_companions(source, folder, llama_config(BaichuanConfig.from_pretrained(source), dtype))


def llama_config(config: BaichuanConfig, dtype: str | None = None) -> Any:
    """The LlamaConfig of the same shapes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.rms_norm_eps,
        use_cache=config.use_cache,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rope_theta)},
        dtype=dtype or config.dtype,
    )
