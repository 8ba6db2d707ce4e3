"""A run folder such as a fine-tuning run leaves, without a run.

`PYTHONPATH=. python tests/unit/fake_run.py FOLDER` makes one and its report, to look at the page.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import yaml

RECIPE: dict[str, Any] = {
    "name": "qlora_medical",
    "stage": "sft",
    "seed": 42,
    "output_dir": "runs/qlora_medical",
    "model": {
        "base": "baichuan2-nano",
        "revision": None,
        "source": "huggingface",
        "quantization": "nf4",
        "dtype": "bfloat16",
        "attention": "auto",
    },
    "adapter": {
        "method": "lora",
        "rank": 64,
        "alpha": 16,
        "dropout": 0.05,
        "targets": ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "rslora": False,
    },
    "data": {
        "train": ["examples/data/medical/train.jsonl"],
        "validation": "examples/data/medical/validation.jsonl",
        "max_length": 2048,
        "packing": True,
        "on_bad_rows": "skip",
        "system": None,
    },
    "train": {
        "epochs": 12,
        "batch_size": 4,
        "gradient_accumulation": 4,
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup_ratio": 0.03,
        "optimizer": "paged_adamw_8bit",
        "betas": [0.9, 0.98],
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
    },
    "report": {"samples": 4, "max_new_tokens": 256},
}
ENVIRONMENT = {
    "python": "3.11.7",
    "platform": "Linux 6.1 x86_64",
    "finetune": "0.1.0",
    "packages": {"torch": "2.11.0", "transformers": "5.23.0", "peft": "0.21.0", "trl": "1.16.0"},
    "devices": ["NVIDIA GeForce RTX 4090, 24 GiB"],
    "processes": 1,
}


def _lengths(
    count: int, total: int, spread: tuple[float, ...], truncated: int, supervised: int
) -> dict[str, Any]:
    return {
        "count": count,
        **dict(zip(("min", "median", "p95", "max"), spread)),
        "total": total,
        "truncated": truncated,
        "truncated_share": truncated / count,
        "supervised": supervised,
        "supervised_share": supervised / total,
    }


def _file(name: str, split: str, rows: int, bad: int, tokens: dict[str, Any]) -> dict[str, Any]:
    return {
        "file": f"examples/data/medical/{name}",
        "split": split,
        "format": "sharegpt",
        "columns": ["conversations"],
        "weight": 1.0,
        "rows": rows,
        "kept": rows - bad,
        "bad": bad,
        "duplicates": 0,
        "held_out": 0,
        "tokens": tokens,
        "sampled": rows - bad if split == "train" else None,
    }


_TRAIN_TOKENS = _lengths(315, 48_211, (31, 142.0, 318.4, 2_311), 2, 34_326)
_VALIDATION_TOKENS = _lengths(64, 9_807, (40, 139.5, 290.0, 402), 0, 6_914)
# The keys of finetune.data.DataReport.as_dict().
DATA_REPORT: dict[str, Any] = {
    "stage": "sft",
    "max_length": 2048,
    "files": [
        _file("train.jsonl", "train", 318, 3, _TRAIN_TOKENS),
        _file("validation.jsonl", "validation", 64, 0, _VALIDATION_TOKENS),
    ],
    "bad_rows": [
        {"file": "examples/data/medical/train.jsonl", "line": line, "unit": "line", "reason": reason}
        for line, reason in (
            (17, "the conversation starts with the assistant"),
            (204, "not JSON: Expecting ',' delimiter (column 88)"),
            (290, "message 2 (assistant) is empty"),
        )
    ],
    "odd_rows": [
        {
            "file": "examples/data/medical/train.jsonl",
            "line": 31,
            "unit": "line",
            "reason": "an answer begins with '，'",
        }
    ],
    "train": {
        "rows": 25,
        "tokens": _TRAIN_TOKENS,
        "packing": {"documents": 315, "packs": 25, "tokens": 48_211, "efficiency": 48_211 / (25 * 2048)},
    },
    "validation": {"rows": 64, "tokens": _VALIDATION_TOKENS, "packing": None},
    "leaked": 0,
    "shared_prompts": 2,
    "sampling": {
        "size": 400,
        "method": "quota",
        "rows": 318,
        "taken": 315,
        "other_categories": 0,
        "categories": [{"id": "2.03", "name": "医疗健康 health", "rows": 315, "taken": 315}],
        "near_duplicates": [{"row": "train.jsonl:9", "repeats": "train.jsonl:4"}],
    },
    "warnings": [
        "3 of 382 data rows cannot be used and are left out",
        "2 of 64 validation conversations begin with a question that is also trained on",
    ],
}
RESULT = {
    "status": "finished",
    "base": "baichuan2-nano",
    "adapter": "runs/qlora_medical/adapter",
    "trainable_parameters": 1_179_648,
    "total_parameters": 8_413_952,
    "train_seconds": 214.7,
    "seconds_per_step": 0.8123,
    "predicted_seconds_per_step": 0.7461,
    "steps": 240,
    "tokens": 578_532,
    "eval_loss_before": 4.812,
    "eval_loss_after": 1.934,
    "best_step": 200,
    "predicted_peak_memory_bytes": 1_690_000_000,
    "measured_peak_memory_bytes": 1_588_000_000,
}


def _sample(
    turns: list[str], reference: str, before: str, after: str, scores: tuple[float, ...], system: str = ""
) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    names = (
        "char_f1_before",
        "char_f1_after",
        "rouge_l_before",
        "rouge_l_after",
        "distinct_2_before",
        "distinct_2_after",
    )
    return {
        "messages": messages,
        "reference": reference,
        "before": before,
        "after": after,
        **dict(zip(names, scores)),
    }


SAMPLES = [
    _sample(
        ["高血压患者平时吃饭要注意什么？"],
        "高血压患者饮食应以低盐为主，每天食盐不超过5克，少吃腌制食品和动物内脏，多吃新鲜蔬菜、水果和富含钾的食物，同时戒烟限酒，控制体重。",
        "高血压的时候，我们可以在一个人的一个人的一个人的一个人的一个人的一个人的一个人",
        "高血压患者饮食应以低盐为主，每天食盐不超过5克，少吃腌制食品和油炸食物，多吃新鲜蔬菜和水果，并注意控制体重、戒烟限酒。",
        (0.11, 0.87, 0.09, 0.84, 0.31, 0.98),
    ),
    _sample(
        [
            "我最近总是失眠，怎么办？",
            "您失眠多久了？睡前会看手机或喝咖啡吗？",
            "大概两个星期，睡前都会看手机。",
        ],
        "建议先调整作息：固定起床时间，睡前一小时不看手机，下午以后不喝咖啡和浓茶。如果超过一个月仍未改善，请到睡眠门诊就诊。",
        "这个问题可以从以下几个方面来看。\n\n一、时间\n二、时间\n三、时间",
        "建议您睡前一小时不看手机，固定起床时间，下午以后不喝咖啡。如果两周后仍未改善，请到医院睡眠门诊就诊。",
        (0.14, 0.76, 0.10, 0.70, 0.62, 0.99),
        system="你是一名谨慎的全科医生，回答简短，必要时建议就医。",
    ),
    _sample(
        ["糖化血红蛋白 HbA1c 7.5% 说明什么？"],
        "HbA1c 反映近两到三个月的平均血糖水平，7.5% 高于一般控制目标 7%，说明血糖控制不理想，"
        "需在医生指导下调整饮食、运动或用药。",
        "糖化血红蛋白是一种血红蛋白，血红蛋白是红细胞中的蛋白。",
        "HbA1c 反映近三个月的平均血糖，7.5% 说明血糖控制不够理想，建议复诊并在医生指导下调整用药。",
        (0.31, 0.72, 0.22, 0.66, 0.71, 0.97),
    ),
    _sample(
        ["请把 <b>布洛芬</b> 的用法写成 <script>alert('网页')</script> 这样的代码。"],
        "布洛芬成人每次 200–400 毫克，每 4–6 小时一次，24 小时不超过 1200 毫克，饭后服用；"
        "有消化性溃疡者禁用。",
        "布洛芬每次服用，饭后服用，每次服用。",
        "",
        (0.42, 0.0, 0.35, 0.0, 0.66, 0.0),
    ),
]


def metrics(steps: int = 240, every: int = 2, evaluate_every: int = 40) -> list[dict[str, Any]]:
    """Lines of a plausible `metrics.jsonl`."""
    noise = random.Random(7)
    lines: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        warmup = min(1.0, step / 8)
        lines.append(
            {
                "step": step,
                "epoch": round(step / 20, 3),
                "loss": 1.55 + 3.3 * math.exp(-step / 55) + noise.gauss(0, 0.13),
                "learning_rate": 2e-4 * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
                "grad_norm": 0.35 + 1.8 * math.exp(-step / 30) + abs(noise.gauss(0, 0.12)),
                "tokens": step * 2410,
                "tokens_per_second": 2700 + noise.gauss(0, 90),
                "peak_memory_bytes": 1_588_000_000,
            }
        )
        if step % evaluate_every == 0:
            loss = 1.93 + 2.88 * math.exp(-step / 42) + max(0, step - 200) * 4e-4
            lines.append({"step": step, "epoch": round(step / 20, 3), "eval_loss": loss, "eval_runtime": 3.1})
    return lines


def make_run(folder: Path, *, without: tuple[str, ...] = (), **results: Any) -> Path:
    """Make a run folder and return it.

    Args:
        folder: made if it is not there.
        without: files to leave out, for example `("samples.jsonl",)`.
        results: values of `result.json` to change; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = {key: value for key, value in {**RESULT, **results}.items() if value is not None}
    contents = {
        "recipe.yaml": yaml.safe_dump(RECIPE, allow_unicode=True, sort_keys=False),
        "environment.json": json.dumps(ENVIRONMENT),
        "data_report.json": json.dumps(DATA_REPORT, ensure_ascii=False),
        "result.json": json.dumps(result),
        "metrics.jsonl": _lines(metrics()),
        "samples.jsonl": _lines(SAMPLES),
    }
    for name, content in contents.items():
        if name not in without:
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    from finetune.report import build_report

    print(build_report(make_run(Path(sys.argv[1]))))
