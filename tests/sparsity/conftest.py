"""One training of two short series for all tests of activation sparsity."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sparsity_cases import SHORT, loaded

from isoflop.core.folder_context import FolderContext
from isoflop.models.lm import LmModel


@pytest.fixture(scope="session")
def sparsity_ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    """A cache that lives as long as the test run, or longer where ISOFLOP_TEST_CACHE names a folder."""
    kept = os.environ.get("ISOFLOP_TEST_CACHE")
    return FolderContext(Path(kept) / "lm-stages" if kept else tmp_path_factory.mktemp("sparsity-stages"))


@pytest.fixture(scope="session", params=["relu", "silu"])
def short_lm(request: pytest.FixtureRequest, sparsity_ctx: FolderContext) -> LmModel:
    """A reader of English at the end of a short training, with either activation function."""
    return loaded(sparsity_ctx, f"tiny-lm/text-d32?act={request.param}&at={SHORT['steps']}")


@pytest.fixture(scope="session")
def relu_lm(sparsity_ctx: FolderContext) -> LmModel:
    """The one with ReLU."""
    return loaded(sparsity_ctx, f"tiny-lm/text-d32?act=relu&at={SHORT['steps']}")
