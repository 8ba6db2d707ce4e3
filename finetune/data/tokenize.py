"""Records into token ids and labels, in parallel, cached by content.

A table row holds:

| column     | type        | what                                                                    |
|------------|-------------|-------------------------------------------------------------------------|
| input_ids  | list[int32] | at most max_length tokens                                               |
| labels     | list[int32] | equally long, not shifted, -100 where nothing is learned; first is -100 |
| record     | int32       | index of the record; a long text has several rows                       |
| length     | int32       | tokens of the whole record before it was cut                            |
| supervised | int32       | labels that are learned; 0 if no token of an answer is left             |

The first label is always -100: no model predicts a row's first token, and once rows are packed it must not
be predicted from the row before.
"""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TYPE_CHECKING, Any

from finetune.baichuan.chat import IGNORE_INDEX
from finetune.data.cache import TokenCache
from finetune.data.progress import Advance, progress_bar
from finetune.data.records import Record
from finetune.errors import UserError
from finetune.words import plural

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CHUNK_RECORDS = 500
PARALLEL_ROWS = 5000
"""Below this many records one process is done before others have started."""

_UNCUT = sys.maxsize
_TEXT_BLOCK = 1 << 16

Encoded = tuple[list[int], list[int], int]
"""input_ids, labels, tokens of the whole record"""


def tokenize(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    workers: int | None = None,
    cache: TokenCache | None = None,
    title: str = "tokenising",
) -> Dataset:
    """Encode records, or take them from the cache if the same content was encoded before.

    Args:
        records: all conversations or all texts.
        tokenizer: with Baichuan's vocabulary.
        max_length: tokens of a row. Conversations are cut on the right, texts into several rows.
        workers: processes; None is one a core if there is enough to do.
        cache: None takes the user's.

    Returns:
        A data set with the columns described above, in the order of the records.

    Raises:
        UserError: a worker process was killed, or the cache's disk is full.
    """
    cache = cache or TokenCache()
    key = _key(records, tokenizer, max_length)
    found = cache.load(key)
    if found is not None:
        return found
    with progress_bar(title, len(records)) as advance:
        batches = _encode_all(records, tokenizer, max_length, _processes(len(records), workers), advance)
        return cache.store(key, schema(), batches)


def schema() -> pa.Schema:
    """The columns of a tokenised table."""
    import pyarrow as pa

    tokens, number = pa.list_(pa.int32()), pa.int32()
    return pa.schema(
        [
            ("input_ids", tokens),
            ("labels", tokens),
            ("record", number),
            ("length", number),
            ("supervised", number),
        ]
    )


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, max_length: int
) -> Encoded:
    """One conversation as `build_example` makes it, and its length before it was cut on the right."""
    from finetune.baichuan.chat import build_example

    example = build_example(tokenizer, messages, max_length=_UNCUT)
    ids, labels = example["input_ids"], example["labels"]
    return ids[:max_length], [IGNORE_INDEX, *labels[1:max_length]], len(ids)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int) -> list[Encoded]:
    """One text and its EOS, every token learned, cut into rows of at most `max_length` tokens.

    Each row begins with the last token of the one before: so every token but the text's first is predicted,
    once, although no row's first token is. Virtual tokens stand in front of each row, and are not learned.

    Raises:
        UserError: the virtual tokens fill a row.
    """
    from finetune.baichuan.chat import encode_content, virtual_token_ids

    virtual = virtual_token_ids(tokenizer)
    room = max_length - len(virtual)
    if room < 2:
        raise UserError(
            f"data.max_length: {max_length} leaves no room for text beside {plural(len(virtual), 'virtual token')}",
            hint=f"raise it to {len(virtual) + 64} or more",
        )
    ids = [token for block in _blocks(text) for token in encode_content(tokenizer, block)]
    ids.append(tokenizer.eos_token_id)
    rows = []
    for start in range(0, max(len(ids) - 1, 1), room - 1):
        piece = ids[start : start + room]
        labels = [IGNORE_INDEX] * (len(virtual) + 1) + piece[1:]
        rows.append((virtual + piece, labels, len(virtual) + len(ids)))
    return rows


def _blocks(text: str) -> Iterator[str]:
    """A long text in parts that end with a line break, a token of its own in Baichuan's vocabulary.

    The ids are those of the whole, and the tokenizer does not have to hold its working memory for all of it.
    """
    start = 0
    while len(text) - start > _TEXT_BLOCK:
        end = text.find("\n", start + _TEXT_BLOCK) + 1
        if not end:
            break
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _encode_chunk(
    first: int, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> pa.RecordBatch:
    import pyarrow as pa

    rows: list[tuple[int, Encoded]] = []
    for index, record in enumerate(records, start=first):
        if record.messages is None:
            rows += [(index, row) for row in encode_text(tokenizer, record.text or "", max_length=max_length)]
        else:
            rows.append((index, encode_conversation(tokenizer, record.messages, max_length=max_length)))
    columns: list[list[Any]] = [
        [ids for _, (ids, _, _) in rows],
        [labels for _, (_, labels, _) in rows],
        [index for index, _ in rows],
        [length for _, (_, _, length) in rows],
        [_supervised(ids, labels) for _, (ids, labels, _) in rows],
    ]
    arrays = [pa.array(values, type=kind) for values, kind in zip(columns, schema().types)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema())


def _supervised(ids: list[int], labels: list[int]) -> int:
    """Learned labels; 0 if none of them is a token of an answer.

    A user turn's opening token is learned too, as EOS: alone it teaches nothing that was asked for.
    """
    if not any(label == token for token, label in zip(ids, labels)):
        return 0
    return sum(label != IGNORE_INDEX for label in labels)


# --- processes ----------------------------------------------------------------------------------------------


def _processes(rows: int, workers: int | None) -> int:
    chunks = -(-rows // CHUNK_RECORDS)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = workers if rows > PARALLEL_ROWS else 1
    return max(1, min(workers, chunks))


def _encode_all(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    processes: int,
    advance: Advance,
) -> Iterator[pa.RecordBatch]:
    starts = range(0, len(records), CHUNK_RECORDS)
    if processes == 1:
        for start in starts:
            chunk = records[start : start + CHUNK_RECORDS]
            yield _encode_chunk(start, chunk, tokenizer, max_length)
            advance(len(chunk))
        return
    # A forked worker has the tokenizer and the records already; elsewhere they are sent.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    executor = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(records, tokenizer, max_length)
    )
    try:
        todo = iter(starts)
        waiting: deque[tuple[int, Future[pa.RecordBatch]]] = deque()

        def submit(chunks: int) -> None:
            waiting.extend((start, executor.submit(_work, start)) for start in islice(todo, chunks))

        submit(2 * processes)  # a few ahead: neither idle workers nor all results in memory
        while waiting:
            start, future = waiting.popleft()
            batch = future.result()
            submit(1)
            yield batch
            advance(len(records[start : start + CHUNK_RECORDS]))
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenised the data was killed, most likely for want of memory",
            hint="use fewer with data.workers=1",
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_job: tuple[Sequence[Record], Any, int]


def _start_worker(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one sees to it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job = (records, tokenizer, max_length)


def _work(start: int) -> pa.RecordBatch:
    records, tokenizer, max_length = _job
    return _encode_chunk(start, records[start : start + CHUNK_RECORDS], tokenizer, max_length)


# --- identity -----------------------------------------------------------------------------------------------


def _key(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """Equal for equal content, vocabulary, chat format, code and settings; nothing else counts."""
    digest = hashlib.sha256(f"{max_length}\n{_fingerprint(tokenizer)}\n".encode())
    for record in records:
        digest.update(b"t" if record.messages is None else b"m")
        digest.update(record.digest)
    return digest.hexdigest()


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    from finetune.baichuan import chat

    digest = hashlib.sha256()
    for module in (chat, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    digest.update(vocabulary.encode())
    special = (chat.role_ids(tokenizer), chat.virtual_token_ids(tokenizer), tokenizer.eos_token_id)
    digest.update(repr(special).encode())
    return digest.hexdigest()
