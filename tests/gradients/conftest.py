"""Fixtures of the tests of gradient exchanges."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def here() -> Iterator[None]:
    """Processes that a test starts find the modules of this folder."""
    folder = str(Path(__file__).parent)
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    yield
    if added:
        sys.path.remove(folder)
