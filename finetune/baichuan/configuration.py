"""Configuration of Baichuan 2 (and first-generation Baichuan) models.

The official configs share ``model_type: baichuan`` and leave two facts unsaid: which position encoding the
weights were trained with and whether the head is normalised. Both are inferred once, when an official config
is read, and from then on are written explicitly.
"""

# No `from __future__ import annotations` here: it would turn the fields' types into text, which `strict`
# does not check.
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

FIRST_GENERATION_VOCAB_SIZE = 64_000


@strict
class BaichuanConfig(PreTrainedConfig):
    """Shapes and switches of a Baichuan model; the defaults are those of Baichuan2-7B.

    Args:
        position_embedding: ``rope`` (7B) or ``alibi`` (13B).
        norm_head: whether logits are hidden · W/‖W‖ (Baichuan 2) or hidden · W (first generation).
        z_loss_weight: weight of mean(max_logit²) in the loss; 2e-4 in pre-training, 0 in the releases.
        model_max_length: context length in tokens.
        max_position_embeddings: the name other libraries use for ``model_max_length``.
    """

    model_type = "baichuan"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 125_696
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None
    model_max_length: int = 4096
    initializer_range: float | int = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_theta: float | int = 10_000.0
    position_embedding: Literal["rope", "alibi"] = "rope"
    norm_head: bool = True
    z_loss_weight: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.max_position_embeddings is None:
            self.max_position_embeddings = self.model_max_length
        kwargs.pop("auto_map", None)  # points to remote code that this class replaces
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)  # a scalar head, as reward models use, unless said otherwise
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError where the shapes do not fit each other."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.tie_word_embeddings:
            raise ValueError("Baichuan models do not tie the head to the embeddings")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Baichuan has no grouped-query attention: as many key/value heads as query heads."""
        return self.num_attention_heads

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config dictionary, inferring what official configs leave unsaid.

        Official 7B configs carry ``max_position_embeddings`` and official 13B configs do not; models with the
        64,000-token vocabulary have a plain head.
        """
        config_dict = dict(config_dict)
        if "position_embedding" not in config_dict:
            has_rope = "max_position_embeddings" in config_dict
            config_dict["position_embedding"] = "rope" if has_rope else "alibi"
        if "norm_head" not in config_dict:
            vocab_size = config_dict.get("vocab_size", cls.vocab_size)
            config_dict["norm_head"] = vocab_size != FIRST_GENERATION_VOCAB_SIZE
        quantization = config_dict.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("load_in_4bit"):
            # The official 4-bit releases predate the `quant_method` key.
            config_dict["quantization_config"] = {"quant_method": "bitsandbytes", **quantization}
        return super().from_dict(config_dict, **kwargs)
