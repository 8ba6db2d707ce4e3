"""From a recipe's adapter section to a PEFT model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from finetune.baichuan.load import Base
    from finetune.baichuan.modeling import BaichuanForCausalLM
    from finetune.recipe.schema import Adapter

ALL_LINEAR = ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every matrix of a Baichuan layer; the head and the embeddings stay frozen."""

INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda")
"""They move a part of the base weights into the adapter; saved adapters are turned into plain LoRA."""


def adapter_config(settings: Adapter, base: Base) -> PeftConfig:
    """PEFT's configuration for a recipe's adapter section, the base's name written in."""
    from peft import TaskType

    common: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM,
        "base_model_name_or_path": base.identity,
        "revision": base.revision,
    }
    if settings.method == "lora":
        return _lora_config(settings, common)
    if settings.method == "ptuning" and settings.encoder == "none":
        from peft import PromptTuningConfig, PromptTuningInit

        # peft's own default starts from vectors that are many times longer than any token's.
        return PromptTuningConfig(
            num_virtual_tokens=settings.num_virtual_tokens,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
            **common,
        )
    if settings.method == "ptuning":
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            num_virtual_tokens=settings.num_virtual_tokens,
            encoder_reparameterization_type=settings.encoder.upper(),
            encoder_hidden_size=settings.encoder_hidden_size,
            encoder_num_layers=settings.encoder_layers,
            encoder_dropout=settings.encoder_dropout,
            **common,
        )
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        num_virtual_tokens=settings.num_virtual_tokens,
        prefix_projection=settings.prefix_projection,
        encoder_hidden_size=settings.encoder_hidden_size,
        **common,
    )


def _lora_config(settings: Adapter, common: dict[str, Any]) -> PeftConfig:
    from peft import LoftQConfig, LoraConfig

    init: bool | str = True if settings.init == "default" else settings.init
    extra: dict[str, Any] = {"loftq_config": LoftQConfig(loftq_bits=4)} if init == "loftq" else {}
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(ALL_LINEAR) if settings.targets == "all-linear" else list(settings.targets),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights=init,
        bias="none",
        **common,
        **extra,
    )


def changes_base(settings: Adapter) -> bool:
    """Whether the adapter's initialisation changes the base weights in memory."""
    return settings.method == "lora" and settings.init.startswith(INITS_THAT_CHANGE_THE_BASE)


def attach_adapter(model: BaichuanForCausalLM, settings: Adapter, base: Base) -> PeftModel:
    """Put a new adapter on a frozen base; its parameters are float32 and the only trainable ones.

    Raises:
        UserError: if the targets name no module of the model.
    """
    from peft import get_peft_model

    check_device(settings)
    check_targets(model, settings)
    # peft writes these into the adapter and its card, whatever the adapter's configuration says.
    model.name_or_path = model.config.name_or_path = base.identity
    peft_model = get_peft_model(model, adapter_config(settings, base))
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def check_device(settings: Adapter) -> None:
    """Refuse an initialisation that this machine cannot compute.

    Raises:
        UserError: loftq without a GPU.
    """
    import torch

    if settings.method == "lora" and settings.init == "loftq" and not torch.cuda.is_available():
        raise UserError(
            "adapter.init: loftq needs a GPU, and this machine has none",
            hint="use adapter.init=default or adapter.init=pissa",
        )


def check_targets(model: BaichuanForCausalLM, settings: Adapter) -> None:
    """Refuse targets that are no matrices of the model (which may be on the meta device).

    Raises:
        UserError: naming the target.
    """
    from torch import nn

    if settings.method != "lora" or settings.targets == "all-linear":
        return
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in settings.targets:
        if target == "lm_head":
            raise UserError(
                "adapter.targets: lm_head cannot be adapted: Baichuan 2 normalises its head, and fused losses "
                "multiply by it directly",
                hint="remove lm_head from adapter.targets",
            )
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            hint = f"the matrices are {', '.join(known)}"
            if target in ("q_proj", "k_proj", "v_proj"):
                hint = "Baichuan packs q, k and v into W_pack: target W_pack"
            raise UserError(f"adapter.targets: {target!r} is no matrix of this model", hint=hint)


def save_adapter(model: PeftModel, folder: Path, *, initial: Path | None = None) -> None:
    """Write an adapter that loads on the unchanged base.

    Args:
        model: the trained model.
        folder: where to.
        initial: the adapter as it was before training, if its initialisation changed the base: the
            difference of the two is saved, as plain LoRA of twice the rank.
    """
    import shutil
    import tempfile

    from finetune.files import give_usual_modes

    # The embeddings are never trained; without saying so, peft asks the hub about the base.
    if initial is None:
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
        give_usual_modes(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:  # peft writes into the folder it reads
        copy = Path(temporary) / initial.name
        shutil.copytree(initial, copy)
        model.save_pretrained(
            folder, save_embedding_layers=False, path_initial_model_for_weight_conversion=str(copy)
        )
    give_usual_modes(folder)


def load_adapter(
    model: BaichuanForCausalLM, folder: Path | str, *, trainable: bool = False, name: str = "default"
) -> PeftModel:
    """Put a saved adapter on a base.

    Args:
        model: the base.
        folder: with adapter_config.json and adapter_model.safetensors.
        trainable: whether its parameters can be trained on.
        name: to give it in the model.

    Raises:
        UserError: if the folder is no adapter, is damaged, or belongs to a model of another shape.
    """
    from peft import PeftModel

    folder = Path(folder)
    config = check_adapter_folder(folder)
    hint = "an adapter fits the base that its adapter_config.json names (base_model_name_or_path)"
    # Vectors of prompt methods are loaded whatever their shape, and fail in use.
    shape = {
        "token_dim": model.config.hidden_size,
        "num_layers": model.config.num_hidden_layers,
        "num_attention_heads": model.config.num_attention_heads,
    }
    for key, expected in shape.items():
        if config.get(key) not in (None, expected):
            raise UserError(
                f"{folder}: this adapter does not fit the base: {key} is {config[key]}, the base's is {expected}",
                hint=hint,
            )
    _check_modules(folder, model)
    try:
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{folder}: this adapter does not fit the base: {' '.join(reason[:2])[:300]}", hint=hint
        ) from error


def _check_modules(folder: Path, model: BaichuanForCausalLM) -> None:
    """Refuse LoRA on matrices that the model does not have: peft leaves them out without a word."""
    from safetensors import safe_open

    modules = {name for name, _ in model.named_modules()}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = [key.removeprefix("base_model.model.") for key in file.keys()]  # noqa: SIM118
    names = {key.partition(".lora_")[0] for key in keys if ".lora_" in key}
    if unknown := sorted(names - modules):
        packed = any(name.endswith(("q_proj", "k_proj", "v_proj")) for name in unknown)
        hint = "Baichuan packs q, k and v: turn the adapter with `finetune convert-adapter --to packed`"
        raise UserError(
            f"{folder}: changes {unknown[0]}, which this model does not have",
            hint=hint if packed else "the adapter was trained on another model",
        )


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, once the folder is known to be complete.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    import json

    from finetune.baichuan.checkpoints import check_weight_file

    path = folder / "adapter_config.json"
    if not path.is_file():
        hint = (
            f"give {folder / 'adapter'}" if (folder / "adapter").is_dir() else "give a run's adapter/ folder"
        )
        raise UserError(f"{folder}: no adapter_config.json, so not an adapter folder", hint=hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})", hint="save or copy the adapter again") from error
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"{folder}: no adapter_model.safetensors",
            hint="adapters saved as .bin are not read, since they are pickles: save it as safetensors",
        )
    check_weight_file(weights)
    return config
