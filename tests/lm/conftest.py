"""One cache of stages for all tests of language models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lm_cases import FEW_STEPS, RECALL, TEXT, trained

from isoflop.core.folder_context import FolderContext
from isoflop.models.lm import LmModel


@pytest.fixture(scope="session")
def lm_ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    """A cache that lives as long as the test run, or longer where ISOFLOP_TEST_CACHE names a folder."""
    kept = os.environ.get("ISOFLOP_TEST_CACHE")
    return FolderContext(Path(kept) / "lm-stages" if kept else tmp_path_factory.mktemp("lm-stages"))


@pytest.fixture(scope="session")
def recall_lm(lm_ctx: FolderContext) -> LmModel:
    """A recall model of four layers after three steps."""
    return trained(lm_ctx, RECALL, FEW_STEPS[RECALL])


@pytest.fixture(scope="session")
def text_lm(lm_ctx: FolderContext) -> LmModel:
    """The smallest model of English after three steps."""
    return trained(lm_ctx, TEXT, FEW_STEPS[TEXT])
