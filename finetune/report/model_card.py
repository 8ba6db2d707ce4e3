"""The model card of an adapter: what it is, where it comes from, how to load it, what it may be used for."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from finetune.baichuan.nano import NANO_MODELS
from finetune.files import write_text
from finetune.report.formatting import compact, duration, is_number, percent, plain_text
from finetune.report.page import METRIC_NAMES, STAGE_NAMES, facts

CARD_FILE = "README.md"
_TEMPLATES = Path(__file__).resolve().parent / "templates"
_METHODS = {"lora": "LoRA", "ptuning": "P-Tuning", "prefix": "Prefix-tuning"}
_SHOWN_SECTIONS = ("model", "adapter", "data", "reward", "dpo", "ppo", "train")


def write_model_card(adapter_dir: Path | str, info: dict[str, Any]) -> Path:
    """Write `README.md` into an adapter's folder, over the bare one that peft leaves there.

    Args:
        adapter_dir: the folder with the adapter.
        info: what is known about the run. `recipe` (dict, required) is the effective recipe. The rest may be
            missing: `result` (dict, as in result.json), `scores` (dict, from `mean_scores`), `sample_count`
            (int), `environment` (dict), `base_model` (str, hub id of the base), `medical` (bool, adds the
            note that answers are no medical advice).

    Returns:
        The path of the card. Absolute paths in the recipe are shortened to their last part, since cards get
        published.
    """
    path = Path(adapter_dir) / CARD_FILE
    write_text(path, _render(info))
    return path


def licence(base: str) -> dict[str, str]:
    """Front matter about the licence of what derives from `base`; the card's template has the words for it.

    Args:
        base: catalogue name, hub id or folder. What cannot be told by its name is taken for Baichuan 2.
    """
    name = base.lower().rpartition("/")[2]
    if name.startswith("baichuan2-nano"):
        return {"license": "apache-2.0"}
    if name.startswith(("baichuan-7b", "baichuan-13b")):
        return {"license": "other", "license_name": "baichuan-community"}
    link = "https://github.com/baichuan-inc/Baichuan2"
    return {"license": "other", "license_name": "baichuan2-community", "license_link": link}


def _render(info: dict[str, Any]) -> str:
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    recipe = info["recipe"]
    result = info.get("result") or {}
    adapter = recipe.get("adapter") or {}
    model = recipe.get("model") or {}
    method = str(adapter.get("method") or "")
    quantization = str(model.get("quantization") or "none")
    quantised = method == "lora" and quantization != "none"
    base = _public(str(model.get("base") or result.get("base") or "Baichuan 2"))
    base_model = info.get("base_model")
    is_reward = recipe.get("stage") == "reward"
    licence_fields = licence(str(base_model or base))
    front_matter = {
        **({"base_model": base_model} if base_model else {}),
        "library_name": "peft",
        "pipeline_tag": "text-classification" if is_reward else "text-generation",
        "language": ["zh"],
        **licence_fields,
        "tags": [
            "baichuan2",
            *([method] if method else []),
            *(["qlora"] if quantised else []),
            "baichuan2-finetune",
        ],
    }
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.j2").render(
        front_matter=yaml.safe_dump(front_matter, allow_unicode=True, sort_keys=False),
        name=_cell(recipe.get("name") or "adapter"),
        base=base,
        base_in_code=json.dumps(base_model or f"path/to/{base}"),
        built_here=base_model in NANO_MODELS,
        quantization=quantization,
        is_reward=is_reward,
        helpers=["quantization_config"] * (quantization != "none")
        + ["resolve_base"] * (base_model in NANO_MODELS),
        method=("QLoRA" if quantised else _METHODS.get(method, method)) or "Fine-tuned",
        stage=STAGE_NAMES.get(str(recipe.get("stage")), str(recipe.get("stage") or "")),
        numbers=_numbers(result, info.get("scores") or {}),
        sample_count=info.get("sample_count"),
        training=_training(recipe, result, info.get("environment") or {}),
        settings=_settings(recipe),
        medical=bool(info.get("medical")),
        licence=licence_fields,
    )


def _numbers(result: dict[str, Any], scores: dict[str, float]) -> list[tuple[str, str, str]]:
    pairs = {"Validation loss": (result.get("eval_loss_before"), result.get("eval_loss_after"))}
    for metric, name in METRIC_NAMES.items():
        pairs[name] = (scores.get(f"{metric}_before"), scores.get(f"{metric}_after"))
    return [
        (name, f"{before:.3f}" if is_number(before) else "–", f"{after:.3f}")
        for name, (before, after) in pairs.items()
        if is_number(after)
    ]


def _training(
    recipe: dict[str, Any], result: dict[str, Any], environment: dict[str, Any]
) -> list[tuple[str, str]]:
    trainable, total = result.get("trainable_parameters"), result.get("total_parameters")
    lines = []
    if is_number(trainable) and is_number(total) and total:
        share = f"{compact(trainable)} of {compact(total)} ({percent(trainable / total, 2)})"
        lines.append(("Trainable parameters", share))
    for label, key, show in (
        ("Steps", "steps", compact),
        ("Tokens", "tokens", compact),
        ("Time", "train_seconds", duration),
    ):
        if is_number(result.get(key)):
            lines.append((label, show(result[key])))
    if result.get("status") not in (None, "finished"):
        lines.append(("Status", f"{result['status']}: these weights are not those of a complete run"))
    versions = [f"{key.rpartition('.')[2]} {value}" for key, value in facts(environment) if _is_version(key)]
    if versions:
        lines.append(("Software", _cell(", ".join(versions))))
    lines.append(("Seed", str(recipe.get("seed", "not recorded"))))
    return lines


def _is_version(key: str) -> bool:
    return key.rpartition(".")[2] in {"finetune", "torch", "transformers", "peft", "trl", "bitsandbytes"}


def _settings(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {section: _without_machine(recipe.get(section) or {}) for section in _SHOWN_SECTIONS}
    return [(key, _cell(value)) for key, value in facts(shown)]


def _without_machine(value: Any) -> Any:
    """The same with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: _without_machine(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_machine(item) for item in value]
    return _public(value) if isinstance(value, str) else value


def _public(text: str) -> str:
    path = PurePath(text)
    return path.name if path.is_absolute() or text.startswith("~") else text


def _cell(value: Any) -> str:
    """Text that stays inside its line or table cell of Markdown."""
    return " ".join(plain_text(str(value)).split()).replace("|", "\\|")
