"""A reward model on disk and on a base: a LoRA adapter of the decoder, a scalar head, and what scores mean.

An adapter folder that stage `reward` writes holds:

| file                                           | what                                                       |
|------------------------------------------------|------------------------------------------------------------|
| adapter_config.json, adapter_model.safetensors | PEFT LoRA of the decoder's matrices; its keys fit every    |
|                                                | Baichuan class whose decoder is named `model`              |
| score.safetensors                              | `weight`, float32 of shape (hidden_size,)                  |
| reward.json                                    | `RewardInfo`: base, vocabulary, mean and deviation, ...    |

The score of a conversation is the product of `weight` with the decoder's last hidden state (after its final
norm) at the last real token, in float32. Training conversations end with EOS, so that is EOS where a response
was finished. `(score - mean) / std` is the normalised reward: mean 0 and deviation 1 on held-out responses.

`python -m finetune merge` makes a BaichuanForSequenceClassification of it, with reward.json beside the weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.adapters.base_identity import check_same_base
from finetune.adapters.build import check_adapter_folder, load_adapter
from finetune.adapters.merge_plan import SCORE_FILE
from finetune.adapters.training_note import FILE as NOTE_FILE
from finetune.adapters.training_note import read_training_note
from finetune.baichuan.chat import role_ids
from finetune.baichuan.checkpoints import check_weight_file
from finetune.errors import UserError
from finetune.files import give_usual_modes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from finetune.baichuan.load import Base

INFO_FILE = "reward.json"


@dataclass(frozen=True)
class RewardInfo:
    """What has to be known to use a reward adapter.

    Attributes:
        base: identity of the base that it was trained on.
        vocabulary: `vocabulary_digest` of the tokenizer that it was trained with.
        mean: mean score of held-out responses (of training responses where nothing was held out).
        std: their standard deviation, above 0.
        responses: how many they were.
        accuracy: share of held-out pairs in the right order; None where nothing was held out.
        max_length: longest conversation seen in training, in tokens.
    """

    base: str
    vocabulary: str
    mean: float
    std: float
    responses: int
    accuracy: float | None
    max_length: int


class ScoreHead(nn.Module):
    """Hidden states of shape (..., hidden_size) to scores of shape (...), in float32.

    It starts at zero: every response scores 0, so the first loss is that of a coin, ln 2 a pair.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of hidden states."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight.float()


@dataclass
class LoadedReward:
    """A reward adapter on a base.

    Attributes:
        model: the base with the adapter beside those that it had; the active adapter is as before, or this
            one where there was none.
        name: the adapter's name in the model.
        head: its scalar head, frozen, on the model's device.
        info: what the scores mean.
    """

    model: PeftModel
    name: str
    head: ScoreHead
    info: RewardInfo


def load_reward(
    folder: Path | str,
    model: Any,
    *,
    base: Base | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str = "reward",
) -> LoadedReward:
    """Put a saved reward model on a base.

    Args:
        folder: an adapter folder of stage `reward`.
        model: a BaichuanForCausalLM, or a PeftModel of one, which gets one adapter more.
        base: what the model is, to be compared with what the adapter was trained on; None compares shapes only.
        tokenizer: the one in use, to be compared with the one in training.
        name: to give the adapter.

    Raises:
        UserError: the folder is no reward adapter or damaged, or made for another base or tokenizer.
    """
    from peft import PeftModel

    folder = Path(folder)
    info = read_info(folder)
    check_fits(folder, info, base=base, tokenizer=tokenizer)
    weight = _read_weight(folder)
    hidden_size = model.config.hidden_size
    if tuple(weight.shape) != (hidden_size,):
        raise UserError(
            f"{folder / SCORE_FILE}: the head has shape {tuple(weight.shape)}, and the base's hidden states "
            f"have {hidden_size} values",
            hint=f"this reward model was made for {info.base}",
        )
    if isinstance(model, PeftModel):
        _add(model, folder, name)
    else:
        model = load_adapter(model, folder, name=name)
    head = ScoreHead(hidden_size)
    head.weight = nn.Parameter(weight.to(model.device), requires_grad=False)
    return LoadedReward(model, name, head, info)


def _add(model: PeftModel, folder: Path, name: str) -> None:
    try:
        model.load_adapter(str(folder), adapter_name=name, torch_device=str(model.device))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{folder}: this reward adapter does not fit the base: {' '.join(reason[:2])[:300]}"
        ) from error


def save_head(folder: Path, head: ScoreHead, info: RewardInfo) -> None:
    """Write score.safetensors and reward.json beside a saved adapter."""
    from safetensors.torch import save_file

    save_file({"weight": head.weight.detach().float().cpu().contiguous()}, folder / SCORE_FILE)
    text = json.dumps(asdict(info), ensure_ascii=False, indent=2) + "\n"
    (folder / INFO_FILE).write_text(text, encoding="utf-8")
    give_usual_modes(folder)


def read_info(folder: Path) -> RewardInfo:
    """reward.json of an adapter folder.

    Raises:
        UserError: the folder is no adapter, or no reward adapter, or the file is damaged.
    """
    check_adapter_folder(folder)
    path = folder / INFO_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: an adapter without {INFO_FILE}, so not a reward model",
            hint="give the adapter/ folder of a run of stage reward",
        )
    try:
        info = RewardInfo(**json.loads(path.read_text(encoding="utf-8")))
        usable = info.std > 0 and abs(info.mean) < float("inf")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error})", hint="copy the adapter folder again") from error
    if not usable:
        raise UserError(f"{path}: mean {info.mean} and std {info.std} cannot normalise scores")
    return info


def check_fits(
    folder: Path,
    info: RewardInfo,
    *,
    base: Base | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuse a base or tokenizer other than those of training: the scores would mean nothing.

    Bases are compared as `finetune.adapters.base_identity` does: by their weights, or by name.

    Raises:
        UserError: naming both.
    """
    if base is not None:
        note = {"base": info.base, **read_training_note(folder)}
        try:
            check_same_base(folder, {}, note, base)
        except UserError as error:
            hint = (
                f"use {info.base}, or train a reward model on {base.name}; if they are the same model under "
                f"other names, write {base.name} as base into {folder / INFO_FILE} and {folder / NOTE_FILE}"
            )
            raise UserError(error.args[0], hint=hint) from error
    if tokenizer is not None and vocabulary_digest(tokenizer) != info.vocabulary:
        raise UserError(
            f"{folder}: this reward model was trained with another tokenizer than the one here",
            hint=f"use the tokenizer of {info.base}",
        )


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers with equal pieces, ids and role ids."""
    content = (sorted(tokenizer.get_vocab().items()), tuple(role_ids(tokenizer)), tokenizer.eos_token_id)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:32]


def _read_weight(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    path = folder / SCORE_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {SCORE_FILE}", hint="copy the adapter folder again")
    check_weight_file(path)
    tensors = load_file(path)
    if set(tensors) != {"weight"}:
        raise UserError(f"{path}: expected one tensor, weight, found {', '.join(tensors) or 'none'}")
    return tensors["weight"].float()
