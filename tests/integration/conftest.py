"""What whole runs in one process need."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _libraries_are_not_garbage() -> Iterator[None]:
    """A run ends with a full collection, which takes longer than the run if it walks all of torch each time."""
    import trl  # noqa: F401

    import finetune.train.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
