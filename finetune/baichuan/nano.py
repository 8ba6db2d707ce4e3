"""baichuan2-nano: Baichuan-2-shaped models of a few million parameters, built where they are needed.

No hub is needed to try the toolkit: the first time a nano is asked for, a SentencePiece tokenizer with the
official layout of special ids is trained and the model is pre-trained on the text that ships with the project
(``nano_data/``: original Chinese prose and small talk), in under two minutes on two cores. The result is cached
and the same on every run: fixed seed, fixed number of threads, fixed number of steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.baichuan.modeling import BaichuanForCausalLM

NANO_MODELS = {"baichuan2-nano": "rope", "baichuan2-nano-alibi": "alibi"}
DATA = Path(__file__).with_name("nano_data")
USER, ASSISTANT, EOS = 195, 196, 2
SEED = 42
STEPS = 360
BATCH_SIZE, LENGTH = 8, 128
LEARNING_RATE = 1e-2
MATRIX_LEARNING_RATE = 0.02
WARMUP_STEPS = 10
THREADS = 2
TAGS = ("img", "h2", "td", "strong", "table", "tr", "li", "b", "h3", "br", "h4", "h5", "p", "h1", "tbody")
LEARNED_PIECES = 3200
"""Pieces after the special and byte pieces: about 2,350 characters, the rest merges."""


def cache_dir() -> Path:
    """Where built models and prepared data are kept: ``FINETUNE_CACHE`` or the user's cache folder."""
    configured = os.environ.get("FINETUNE_CACHE")
    if configured:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "baichuan2-finetune"


def nano_folder(name: str) -> Path:
    """The cached folder of a nano; its name changes with whatever the result depends on."""
    digest = hashlib.sha256(version("torch").encode())
    for path in [*sorted(DATA.iterdir()), Path(__file__), *_model_sources()]:
        digest.update(path.read_bytes())
    return cache_dir() / "models" / f"{name}-{digest.hexdigest()[:12]}"


def _model_sources() -> list[Path]:
    here = Path(__file__).parent
    names = ("attention", "chat", "documents", "head", "layers", "loss", "modeling", "tokenization")
    return [here / f"{name}.py" for name in names]


def ensure_nano(name: str) -> Path:
    """Folder of a nano, built first if it is not cached.

    Several processes may ask at once: one builds, the others wait for it.

    Raises:
        KeyError: if ``name`` is no nano.
    """
    position_embedding = NANO_MODELS[name]
    folder = nano_folder(name)
    if (folder / "config.json").is_file():
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
            try:
                build_nano(temporary, name, position_embedding)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def build_nano(folder: Path, name: str, position_embedding: str) -> None:
    """Train the tokenizer and the model and write both into ``folder``."""
    from finetune.baichuan.tokenization import BaichuanTokenizer

    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    tokenizer = BaichuanTokenizer(vocab_file=str(folder / "tokenizer.model"), model_max_length=4096)
    tokenizer.save_pretrained(folder)
    model = pretrain(tokenizer, nano_config(len(tokenizer), position_embedding), name)
    model.generation_config = generation_config()
    model.save_pretrained(folder)


def nano_config(vocab_size: int, position_embedding: str) -> BaichuanConfig:
    """Shapes of the nanos: Baichuan 2 in small."""
    from finetune.baichuan.configuration import BaichuanConfig

    return BaichuanConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        model_max_length=4096,
        position_embedding=position_embedding,
        z_loss_weight=2e-4,
    )


def generation_config() -> Any:
    """Generation defaults of the Chat models, with shorter answers."""
    from transformers import GenerationConfig

    return GenerationConfig(
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
        user_token_id=USER,
        assistant_token_id=ASSISTANT,
        max_new_tokens=256,
        do_sample=True,
        temperature=0.3,
        top_k=5,
        top_p=0.85,
        repetition_penalty=1.05,
    )


def special_pieces() -> list[str]:
    """The 1,086 user-defined pieces of Baichuan 2, in the order of their ids 3 to 1088."""
    pieces = ["<SEP>", "<CLS>", "\n", "\t"]
    for tag in TAGS:
        pieces += [f"<{tag}>", f"<{tag}/>", f"</{tag}>"]
    pieces += list("０１２３４５６７８９+-=，。！？、：￥.!?") + ["...", "。。。", "。。。。。。"]
    pieces += (
        list("《》【】『』") + ["```", "<!--", "-->", "---", "<!DOCTYPE>"] + list("；．＝＜＞－＋％‼㊣／｜")
    )
    return pieces + [f"<reserved_{number}>" for number in range(12, 1000)]


def required_characters() -> str:
    """ASCII and the Chinese characters of the shipped data, less the special pieces."""
    hanzi = "".join((DATA / "characters.txt").read_text(encoding="utf-8").split())
    special = set(special_pieces())
    return "".join(c for c in [*hanzi, *map(chr, range(33, 127))] if c not in special)


def train_sentencepiece() -> bytes:
    """A SentencePiece BPE model with Baichuan 2's settings and layout, serialised."""
    import sentencepiece

    special = special_pieces()
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for document in documents() for _, text in document),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=3 + len(special) + 256 + LEARNED_PIECES,
        user_defined_symbols=special,
        required_chars=required_characters(),
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentencepiece_length=8,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return buffer.getvalue()


def documents() -> Iterator[list[tuple[int | None, str]]]:
    """The shipped text: each document a list of (role id or None, text)."""
    for path in sorted(DATA.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "text" in row:
                yield [(None, row["text"])]
            else:
                roles = {"human": USER, "gpt": ASSISTANT}
                yield [(roles[turn["from"]], turn["value"]) for turn in row["conversations"]]


def token_documents(tokenizer: Any) -> list[list[int]]:
    """Token ids of each document; conversations in the chat format, an EOS after every answer."""
    result = []
    for document in documents():
        ids: list[int] = []
        for role, text in document:
            ids += ([] if role is None else [role]) + tokenizer.encode_content(text)
            ids += [EOS] if role in (None, ASSISTANT) else []
        result.append(ids)
    return result


def pretrain(tokenizer: Any, config: BaichuanConfig, name: str) -> BaichuanForCausalLM:
    """Pre-train on the shipped text, every token learned, with a progress bar.

    Muon (Jordan et al. 2024) for the layers' matrices: with it the model learns in a third of the steps that
    AdamW needs. AdamW for embeddings, head and norms.
    """
    import torch

    from finetune.baichuan.modeling import BaichuanForCausalLM

    with _reproducible():
        model = BaichuanForCausalLM(config).train()
        stream = _Stream(token_documents(tokenizer))
        optimizers = _optimizers(model)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        with _progress(f"building {name} (once)", STEPS) as advance:
            for step in range(STEPS):
                factor = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / STEPS)
                for optimizer, peaks in zip(optimizers, rates):
                    for group, peak in zip(optimizer.param_groups, peaks):
                        group["lr"] = peak * factor
                ids = stream.batch()
                loss = model(ids, labels=ids).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                advance(float(loss.detach()))
    config.z_loss_weight = model.config.z_loss_weight = 0.0  # as in the releases
    return model.eval()


def _optimizers(model: BaichuanForCausalLM) -> list[torch.optim.Optimizer]:
    import torch

    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if "layers" in name and p.ndim == 2]
    others = [p for name, p in named.items() if not ("layers" in name and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class _Stream:
    """Batches cut from the documents, laid end to end in a new order every epoch."""

    def __init__(self, documents: list[list[int]]) -> None:
        import torch

        self.documents = [torch.tensor(document) for document in documents]
        self.rest = torch.empty(0, dtype=torch.long)

    def batch(self) -> torch.Tensor:
        import torch

        size = BATCH_SIZE * LENGTH
        while len(self.rest) < size:
            order = torch.randperm(len(self.documents)).tolist()
            self.rest = torch.cat([self.rest, *(self.documents[i] for i in order)])
        ids, self.rest = self.rest[:size], self.rest[size:]
        return ids.view(BATCH_SIZE, LENGTH)


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Fixed seed, threads and dtype inside; what was set before comes back after."""
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            torch.manual_seed(SEED)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Any]:
    """A progress bar on a terminal; elsewhere a line at the start and at every fifth of the way."""
    import sys
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not sys.stderr.isatty():
        console.print(f"{title} …", markup=False, highlight=False)
        begin, done = time.monotonic(), 0

        def tell(loss: float) -> None:
            nonlocal done
            done += 1
            if done % max(1, total // 5) == 0 and done < total:
                left = (time.monotonic() - begin) / done * (total - done)
                console.print(f"  {done / total:.0%}, about {left:.0f} s left", highlight=False)

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]:.2f}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, loss=float("nan"))
        yield lambda loss: bar.update(task, advance=1, loss=loss)
