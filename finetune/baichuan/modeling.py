"""Baichuan models on transformers' own machinery, with the official parameter names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from finetune.baichuan import checkpoints
from finetune.baichuan.attend import takes_documents
from finetune.baichuan.attention import alibi_slopes
from finetune.baichuan.checkpointing import Checkpointing
from finetune.baichuan.configuration import BaichuanConfig
from finetune.baichuan.documents import Documents, document_numbers, find_documents, unmasked_positions
from finetune.baichuan.head import UnitRowHead
from finetune.baichuan.layers import (
    BaichuanAlibi,
    BaichuanAttention,
    BaichuanDecoderLayer,
    BaichuanRMSNorm,
    BaichuanRotaryEmbedding,
)
from finetune.baichuan.loss import causal_lm_loss, tiled_causal_lm_loss


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

    checkpointing = Checkpointing()
    """What gradient checkpointing keeps, where it is switched on; to be set before."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        if enable:
            from finetune.baichuan.load import pick_device

            # Not where the weights lie: FSDP takes them to the GPU later.
            gradient_checkpointing_func = self.checkpointing.applied_to(
                gradient_checkpointing_func, hidden_size=self.config.hidden_size, device=pick_device()
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

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
        self.layers_are_compiled = False  # documents, of other lengths in every batch, would be other graphs
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
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every position.

        Args:
            input_ids: (batch, length); or ``inputs_embeds`` of shape (batch, length, hidden_size).
            attention_mask: (batch, keys), 0 on padding. Integers above 1 number the documents packed into a
                row (1, 1, 1, 2, 2, …), as in the official 13B code: each attends to itself only.
            position_ids: (batch, length). Without an attention mask and a cache, positions that restart mark
                packed documents too.
            documents: where they lie, if that is known: to find them, the host waits for the device.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        given_cache = past_key_values  # a cache that this call creates is empty and changes no mask
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        key_positions = unmasked_positions(attention_mask)
        if position_ids is None and key_positions is not None:
            position_ids = key_positions[:, -inputs_embeds.shape[1] :].to(inputs_embeds.device)
        elif position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (steps + seen).unsqueeze(0)

        mask, documents = self._who_attends(
            inputs_embeds, attention_mask, position_ids, given_cache, documents
        )
        if documents is not None and key_positions is None:
            key_positions = position_ids  # counted in each document, so that ALiBi's scores stay small
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
                documents=documents,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def _who_attends(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        documents: Documents | None = None,
    ) -> tuple[Any, Documents | None]:
        """The implementation's mask, or the documents that make one superfluous; neither is plain causality."""
        implementation = str(self.config._attn_implementation)
        if cache is None and takes_documents(implementation) and not self.layers_are_compiled:
            batch = inputs_embeds.shape[0]
            documents = documents or find_documents(position_ids.expand(batch, -1), attention_mask)
            if documents is not None:
                # transformers' FlashAttention, not told of any, looks for documents again in every layer.
                plain = implementation == "sdpa" and len(documents.lengths) == batch
                return None, None if plain else documents
        numbers = document_numbers(attention_mask) if cache is None else None
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
            and_mask_function=None if numbers is None else packed_sequence_mask_function(numbers),
        )
        return mask, None


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
        if isinstance(self.lm_head, UnitRowHead):  # not where it is in 8 bits: normalised before
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
        supervised: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, length or logits_to_keep, vocab_size) and, with ``labels`` (batch, length), the loss.

        The loss is next-token cross-entropy over labels that are not -100, plus the max-z loss
        (``config.z_loss_weight``). ``num_items_in_batch`` divides by a global token count instead. With
        ``skip_logits`` and labels the loss is computed in tiles and no logits are returned, and ``supervised`` may
        say where the labels are (`finetune.data.collate.supervised_positions`).
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
            loss = tiled_causal_lm_loss(
                hidden,
                self.lm_head.weight,
                labels,
                head_scales=getattr(self.lm_head, "scales", None),
                supervised=supervised,
                **weighting,
            )
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
