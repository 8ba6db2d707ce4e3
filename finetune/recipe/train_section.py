"""The recipe's section `train`: optimisation, and what a step spends memory and time on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer

from finetune.recipe.section import Section

AUTO = 0
"""`train.batch_size: auto`, until the run knows the device and decides."""


def _batch_size(value: Any) -> Any:
    if value == "auto":
        return AUTO
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value < 1):
        raise ValueError(f"expected a number of at least 1, or auto, found {value!r}")
    return value


KEEPS = ("attention", "matmul")
"""What gradient checkpointing may keep of each layer, beside its input (finetune/baichuan/checkpointing.py)."""


def _checkpointing(value: Any) -> Any:
    if isinstance(value, bool) or value in KEEPS:
        return value
    raise ValueError(f"expected true, false, {' or '.join(KEEPS)}, found {value!r}")


class Train(Section):
    """Optimisation, evaluation and checkpoints."""

    epochs: float = Field(default=3.0, gt=0, description="passes over the training data")
    max_steps: int | None = Field(
        default=None, gt=0, description="stop after so many optimiser steps; null is by epochs"
    )
    batch_size: Annotated[int, BeforeValidator(_batch_size)] = Field(
        default=4,
        description="examples (or packs) on each device at once; auto takes the largest divisor of "
        "gradient_accumulation that fits and accumulates the rest",
    )
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="the same in evaluation; null is batch_size"
    )
    gradient_accumulation: int = Field(
        default=4, ge=1, description="batches added up before each optimiser step"
    )
    learning_rate: float = Field(default=2e-4, gt=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = Field(
        default="constant", description="course of the learning rate"
    )
    warmup_ratio: float = Field(
        default=0.0, ge=0, le=1, description="share of all steps in which the rate rises from 0"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw", description="AdamW; 8-bit and paged ones save memory and need a GPU"
    )
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.98], description="AdamW's two decay rates"
    )
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    gradient_checkpointing: Annotated[
        bool | Literal["attention", "matmul"], BeforeValidator(_checkpointing)
    ] = Field(
        default=True,
        description="recompute each layer to save memory, about a third slower; attention keeps attention's "
        "output, matmul the base's products too: faster, and more memory (prefix: default false)",
    )
    activation_offloading: bool = Field(
        default=False,
        description="keep the layers' inputs in host memory: long rows on a small card (needs a GPU)",
    )
    kernels: Literal["auto", "none", "liger"] = Field(
        default="auto",
        description="fused norm, SwiGLU and RoPE by liger-kernel; auto takes them where they are installed",
    )
    compile: bool = Field(
        default=False,
        description="compile the layers with torch.compile: some minutes at the start, less time a step",
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="steps between evaluations; null is every epoch"
    )
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; null is every epoch"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="checkpoints kept, beside the best one")
    log_every: int = Field(default=10, ge=1, description="steps between lines of metrics.jsonl")
    z_loss_weight: float = Field(
        default=0.0, ge=0, description="weight of the max-z loss (2e-4 in Baichuan 2's pre-training)"
    )

    @field_serializer("batch_size")
    def _write_batch_size(self, value: int) -> int | str:
        return "auto" if value == AUTO else value
