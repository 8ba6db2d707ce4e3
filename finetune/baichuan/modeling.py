"""Baichuan models on transformers' own machinery, with the official parameter names."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from finetune.baichuan import checkpoints
from finetune.baichuan.attention import alibi_slopes, eager_attention, fold_alibi, rotate
from finetune.baichuan.configuration import BaichuanConfig
from finetune.baichuan.loss import causal_lm_loss, tiled_causal_lm_loss


@use_kernel_forward_from_hub("RMSNorm")
class BaichuanRMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """The whole of a parameter that ZeRO-3 has cut up; what is changed within is written back."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


class UnitRowHead(nn.Linear):
    """The head of Baichuan 2: logits are hidden · W/‖W‖, each vocabulary row normalised.

    The report calls it NormHead; accelerate's FSDP takes any class with "Norm" in its name for the final norm
    and would shard it twice.

    ``weight`` *reads* as the normalised matrix, with the gradient flowing to the stored one. So libraries that
    multiply by ``lm_head.weight`` themselves (trl's trainers, fused losses) get the right product too. The
    stored parameter keeps its name and values in ``state_dict``. Once `normalize_` has been called, which the
    toolkit does wherever the head is frozen, reading costs nothing.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        self.normalized = False
        super().__init__(hidden_size, vocab_size, bias=False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Rows of unit length, (vocab_size, hidden_size)."""
        stored = self.__dict__.get("_parameters", {}).get("weight")
        if stored is None:
            raise AttributeError("weight")
        return stored if self.normalized else nn.functional.normalize(stored)

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self.register_parameter("weight", value)

    def reset_parameters(self) -> None:
        """Initialise the stored rows; the base class would fill the copy that reading ``weight`` gives."""
        nn.init.kaiming_uniform_(self.stored_weight, a=math.sqrt(5))

    @property
    def stored_weight(self) -> nn.Parameter:
        """The parameter as it is stored, (vocab_size, hidden_size)."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter

    @torch.no_grad()
    def normalize_(self) -> None:
        """Normalise the stored rows in place; doing it twice changes nothing."""
        stored = self.stored_weight
        if self.normalized or stored.is_meta:
            return
        step = 16_384  # rows at a time: no second copy of the head
        with _gathered(stored):
            for start in range(0, stored.shape[0], step):
                rows = stored[start : start + step]
                rows.copy_(nn.functional.normalize(rows.float()).to(rows.dtype))
        self.normalized = True


class BaichuanRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding, in float32."""

    inv_freq: torch.Tensor

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.frequencies(config), persistent=False)

    @staticmethod
    def frequencies(config: BaichuanConfig) -> torch.Tensor:
        """Inverse frequencies, float32 of shape (head_dim / 2,)."""
        dim = config.head_dim
        return 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of shape (batch, length, head_dim) for positions of shape (batch, length)."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class BaichuanAlibi(nn.Module):
    """Holds the slopes as a buffer, so that they survive creation on the meta device."""

    slopes: torch.Tensor

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("slopes", alibi_slopes(config.num_attention_heads), persistent=False)

    def forward(self) -> torch.Tensor:
        """Slopes, float32 of shape (heads,)."""
        return self.slopes.float()


class BaichuanMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class BaichuanAttention(nn.Module):
    """Self-attention with one packed projection for q, k and v."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        slopes: torch.Tensor | None = None,
        key_positions: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, -1, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)

        if rotary is not None:
            query, key = rotate(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if slopes is not None:
            query, key, value = fold_alibi(query, key, value, slopes, self.scaling, key_positions)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        output = output[..., : self.head_dim].reshape(batch, length, -1)
        return self.o_proj(output), weights


class BaichuanDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = BaichuanRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = BaichuanRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class BaichuanPreTrainedModel(PreTrainedModel):
    """What every Baichuan model shares: loading, initialisation, the features it supports."""

    config: BaichuanConfig
    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("BaichuanDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": BaichuanDecoderLayer, "attentions": BaichuanAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, UnitRowHead):
            init.normal_(module.stored_weight, mean=0.0, std=std)
        elif isinstance(module, BaichuanRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies(module.config))
        elif isinstance(module, BaichuanAlibi):
            init.copy_(module.slopes, alibi_slopes(module.config.num_attention_heads))
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load any official layout; see `transformers.PreTrainedModel.from_pretrained`.

        The official 4-bit releases (two entries for a quantised matrix) are turned into what bitsandbytes
        reads on the way. Pickle files are only ever read with ``weights_only=True``.
        """
        name = pretrained_model_name_or_path
        adapted = checkpoints.adapt_official_quantized(name, kwargs)
        if adapted is None:
            loaded = super().from_pretrained(name, *args, **kwargs)
        else:
            loaded = super().from_pretrained(None, *args, **adapted)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        checkpoints.keep_one_quantized_layout(model)
        if adapted is not None:
            model.config.name_or_path = str(name)
            if model.can_generate():
                model.generation_config = checkpoints.read_generation_config(name, kwargs, model.config)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as safetensors under the official names; see `transformers.PreTrainedModel.save_pretrained`."""
        # Names are never converted at load, and transformers 5 cannot revert its own 4-bit conversion.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)


class BaichuanModel(BaichuanPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [BaichuanDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = BaichuanRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.position_embedding == "alibi":
            self.alibi = BaichuanAlibi(config)
        else:
            self.rotary_emb = BaichuanRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every position.

        Args:
            input_ids: (batch, length); or ``inputs_embeds`` of shape (batch, length, hidden_size).
            attention_mask: (batch, keys), 0 on padding. Integers above 1 number the documents packed into a
                row (1, 1, 1, 2, 2, …), as in the official 13B code: each attends to itself only.
            position_ids: (batch, length). Without an attention mask and a cache, positions that restart mark
                packed documents too.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        given_cache = past_key_values  # a cache that this call creates is empty and changes no mask
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        key_positions = _unmasked_positions(attention_mask)
        if position_ids is None and key_positions is not None:
            position_ids = key_positions[:, -inputs_embeds.shape[1] :].to(inputs_embeds.device)
        elif position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (steps + seen).unsqueeze(0)

        documents = _document_numbers(attention_mask) if given_cache is None else None
        if given_cache is None and "flash" in str(self.config._attn_implementation):
            positions = position_ids.expand(inputs_embeds.shape[0], -1)
            varlen = _flash_documents(positions, attention_mask, documents)
            if varlen:
                attention_mask = documents = None
                kwargs.update(varlen)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=given_cache,
            position_ids=position_ids,
            and_mask_function=None if documents is None else packed_sequence_mask_function(documents),
        )
        alibi = self.config.position_embedding == "alibi"
        rotary = None if alibi else self.rotary_emb(position_ids)
        slopes = self.alibi() if alibi else None

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                rotary=rotary,
                slopes=slopes,
                key_positions=key_positions,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


def _unmasked_positions(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Positions of the keys, masked slots not counted, of a mask (batch, keys); None of any other."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return ((attention_mask != 0).cumsum(-1) - 1).clamp(min=0)


def _flash_documents(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, documents: torch.Tensor | None
) -> dict[str, Any]:
    """Where the documents packed into a batch begin, as FlashAttention wants to know; empty if there are none.

    transformers finds them by itself in batches of one row only, and in larger ones would let the documents
    of a row attend to each other.
    """
    if documents is not None:
        restarts = documents.diff(dim=-1) != 0
    elif attention_mask is None:
        restarts = position_ids.diff(dim=-1) != 1
    else:
        return {}
    if not bool(restarts.any()):
        return {}
    starts = nn.functional.pad(restarts, (1, 0), value=True).flatten()
    bounds = nn.functional.pad(starts.nonzero()[:, 0], (0, 1), value=starts.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _document_numbers(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The attention mask if it numbers packed documents (1, 1, 1, 2, 2, …), else None."""
    if attention_mask is None or attention_mask.ndim != 2 or attention_mask.dtype == torch.bool:
        return None
    if attention_mask.is_floating_point():
        return None
    if is_torchdynamo_compiling():  # no looking at values; zeros and ones are right as one document, too
        return attention_mask
    return attention_mask if bool(attention_mask.max() > 1) else None


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    """The language model: decoder and head."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = (
            UnitRowHead(config.hidden_size, config.vocab_size)
            if config.norm_head
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.post_init()

    def freeze_head(self) -> None:
        """Freeze the head and normalise it once, so that every later product with it is the plain one."""
        self.lm_head.requires_grad_(False)
        if isinstance(self.lm_head, UnitRowHead):
            self.lm_head.normalize_()

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args: Any, **kwargs: Any) -> nn.Linear:
        """A head of another size of the same kind; transformers makes a plain linear layer."""
        resized = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        if resized is old_lm_head or not isinstance(old_lm_head, UnitRowHead):
            return resized
        with torch.device("meta"):
            head = UnitRowHead(resized.in_features, resized.out_features)
        head.weight = resized.weight
        if old_lm_head.normalized:
            head.normalize_()
        head._is_hf_initialized = True
        return head

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, length or logits_to_keep, vocab_size) and, with ``labels`` (batch, length), the loss.

        The loss is next-token cross-entropy over labels that are not -100, plus the max-z loss
        (``config.z_loss_weight``). ``num_items_in_batch`` divides by a global token count instead. With
        ``skip_logits`` and labels the loss is computed in tiles and no logits are returned.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        weighting = {"z_loss_weight": self.config.z_loss_weight, "num_items_in_batch": num_items_in_batch}
        logits = loss = None
        if labels is not None and skip_logits:
            loss = tiled_causal_lm_loss(hidden, self.lm_head.weight, labels, **weighting)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
            if labels is not None:
                loss = causal_lm_loss(logits, labels, **weighting)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class BaichuanForSequenceClassification(BaichuanPreTrainedModel):
    """Decoder with a score read at the last real token of each row, whichever side is padded."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BaichuanModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores (batch, num_labels); real tokens are those of ``attention_mask``, or those that are not padding."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last = self._last_real_token(hidden, input_ids, attention_mask)
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_real_token(
        self, hidden: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        length = hidden.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -length:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        else:
            return torch.full((hidden.shape[0],), length - 1, device=hidden.device)
        slots = torch.arange(length, device=hidden.device)
        return (slots * real.to(hidden.device)).argmax(-1)
