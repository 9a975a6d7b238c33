"""One small corpus and cache for all tests of data selection."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isoflop.core.folder_context import FolderContext
from isoflop.models.worlds.text_domains import DomainsStage


@pytest.fixture(scope="session")
def pool_ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    """A cache that lives as long as the test run, or longer where ISOFLOP_TEST_CACHE names a folder."""
    kept = os.environ.get("ISOFLOP_TEST_CACHE")
    return FolderContext(Path(kept) / "pool-stages" if kept else tmp_path_factory.mktemp("pool-stages"))


@pytest.fixture(scope="session")
def corpus(pool_ctx: FolderContext) -> dict[str, dict[str, str]]:
    """The domains as ``pool_cases.OPTIONS`` cut them."""
    texts: dict[str, dict[str, str]] = pool_ctx.get(DomainsStage.here(40, 20, 600, 0.0))
    return texts
