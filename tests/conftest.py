"""Fixtures that every depth of test uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENCODINGS = ("rope", "alibi")
LONGEST = "tests/integration/test_quickstart.py"
"""Trains the nano, and builds it first where no cache holds it: minutes, beside which the other files fit."""

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one of several at once: a thread each, also in the processes they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the nano's two threads must not spin


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest file: processes side by side then end together."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of official data files and golden numbers beside the checkout; absent elsewhere."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip(f"needs the golden values in {folder}, which are not part of the repository")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Numbers computed with the official code (its README says what each tensor is)."""
    return shared / "golden"


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Complete folders of two-layer models with random weights, one for each position encoding; read only."""
    from tiny_model import write_tiny_base

    root = tmp_path_factory.mktemp("bases")
    return {encoding: write_tiny_base(root / f"tiny-{encoding}", encoding) for encoding in ENCODINGS}


@pytest.fixture(params=ENCODINGS)
def tiny_base(request: pytest.FixtureRequest, tiny_bases: dict[str, Path]) -> Path:
    """One of `tiny_bases`, each in turn."""
    return tiny_bases[request.param]
