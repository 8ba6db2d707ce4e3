"""``finetune chat``: talk with a model, streaming; one answer with a prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.baichuan.load import Base
    from finetune.baichuan.tokenization import BaichuanTokenizer
    from finetune.recipe.schema import Model

HELP = "/new begins a new conversation, /exit (or Ctrl-D) ends"


def chat(
    *,
    model: str,
    adapter: Path | None = None,
    prompt: str | None = None,
    system: str | None = None,
    greedy: bool = False,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    quantization: str | None = None,
) -> None:
    """Answer ``prompt`` on stdout, or converse until the end of input.

    Sampling settings that are None are the model's own (generation_config.json). ``quantization`` None holds
    the base as the adapter was trained on it.

    Raises:
        UserError: the model or the adapter cannot be loaded, or the prompt is empty.
    """
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt: is empty", hint="give a question, or leave --prompt out to converse")
    from finetune.quiet import quiet_libraries

    quiet_libraries()
    with _memory_explained(model):
        network, tokenizer = load(model, adapter, quantization=quantization)
        settings = generation_settings(
            network,
            greedy=greedy,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        opening = [{"role": "system", "content": system}] if system else []
        if prompt is not None:
            stream_answer(network, tokenizer, [*opening, {"role": "user", "content": prompt}], settings)
            return
        _converse(network, tokenizer, opening, settings)


@contextmanager
def _memory_explained(model: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU is out of memory with {model}",
            hint="hold the base in 4 bits with --quantization nf4, or lower --max-new-tokens",
        ) from error


def trained_quantization(adapter: Path | None) -> str:
    """How training held the base of an adapter; ``none`` where it is not known.

    An adapter learns the quantisation's errors away, so on other weights it answers differently.
    """
    from finetune.adapters.training_note import read_training_note

    return str(read_training_note(adapter).get("quantization", "none")) if adapter is not None else "none"


def load(
    model: str | Model, adapter: Path | None, *, quantization: str | None = None
) -> tuple[Any, BaichuanTokenizer]:
    """The model, with its adapter if one is given, and the tokenizer.

    Args:
        model: what names it, or the section of a recipe, whose own quantization holds.
        adapter: folder.
        quantization: how to hold a model that is named; None is as training held the base of the adapter.
    """
    from finetune.adapters.build import load_adapter
    from finetune.baichuan.load import load_model, load_tokenizer, resolve_base
    from finetune.recipe.schema import Model

    if adapter is not None:
        from finetune.adapters.build import check_adapter_folder
        from finetune.adapters.merge_plan import SCORE_FILE

        check_adapter_folder(adapter)
        if (adapter / SCORE_FILE).is_file():
            raise UserError(
                f"{adapter}: the adapter of a reward model, which scores conversations and writes no text",
                hint="PPO takes it as ppo.reward, `finetune redteam` as --judge reward:ADAPTER",
            )
    named = isinstance(model, str)
    held = (quantization or trained_quantization(adapter)) if isinstance(model, str) else model.quantization
    settings = Model(base=model, quantization=held) if isinstance(model, str) else model  # type: ignore[arg-type]
    base = resolve_base(
        settings.base,
        revision=settings.revision,
        source=settings.source,
        called="--model" if named else "model.base",
    )
    if adapter is not None:
        _check_base(adapter, base)
    if named and quantization is None and held != "none":
        print(
            f"base held in {held}, as the adapter was trained (--quantization none for 16 bits)",
            file=sys.stderr,
        )
    network: Any = load_model(settings, base)
    if adapter is not None:
        network = load_adapter(network, adapter)
    return network.eval(), load_tokenizer(base.folder)


def _check_base(adapter: Path, base: Base) -> None:
    """Refuse an adapter on weights that its training did not see, if it recorded which those were."""
    from finetune.adapters.base_identity import check_same_base
    from finetune.adapters.training_note import read_training_note

    note = read_training_note(adapter)
    if note.get("base_fingerprint"):
        try:
            check_same_base(adapter, {}, note, base)
        except UserError as error:
            hint = f"use it on its own base: --model {note.get('base')}; a merged folder needs no adapter"
            raise UserError(error.args[0], hint=hint) from error


def generation_settings(
    network: Any, *, greedy: bool, max_new_tokens: int | None, **sampling: float | None
) -> dict[str, Any]:
    """Arguments for ``generate``: the model's own, what was asked for, and no sampling if greedy."""
    from finetune.generate import NO_SAMPLING

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or network.generation_config.max_new_tokens or 512
    }
    if greedy or sampling.get("temperature") == 0:
        return settings | {"do_sample": False} | NO_SAMPLING
    given = {key: value for key, value in sampling.items() if value is not None}
    return settings | ({"do_sample": True} if given else {}) | given


def stream_answer(
    network: Any,
    tokenizer: BaichuanTokenizer,
    messages: list[dict[str, str]],
    settings: dict[str, Any],
) -> str:
    """Print the answer as it is generated; returns it."""
    import torch
    from transformers import TextStreamer

    from finetune.baichuan.chat import build_prompt
    from finetune.generate import decode_answer

    longest = int(network.config.model_max_length)
    budget = min(settings["max_new_tokens"], longest // 2)
    prompt = build_prompt(tokenizer, messages, max_length=longest, max_new_tokens=budget)
    ids = torch.tensor([prompt], device=next(network.parameters()).device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        output = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.user_token_id],
            **{**settings, "max_new_tokens": min(settings["max_new_tokens"], longest - len(prompt))},
        )
    return decode_answer(tokenizer, output[0, len(prompt) :].tolist())


def _converse(
    network: Any, tokenizer: BaichuanTokenizer, opening: list[dict[str, str]], settings: dict[str, Any]
) -> None:
    print(HELP, file=sys.stderr)
    messages = list(opening)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/new":
            messages = list(opening)
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = stream_answer(network, tokenizer, messages, settings)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer or " "})
