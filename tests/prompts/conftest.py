"""One cache of stages for all tests of prompt methods, and an untrained reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prompt_cases import brief_classifier

from isoflop.core.folder_context import FolderContext
from isoflop.methods.prompts.classifier import TokenClassifier
from isoflop.methods.prompts.probe import untrained_reader
from isoflop.models.lm import LmModel


@pytest.fixture(scope="session")
def prompt_ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    """A cache that lives as long as the test run, or longer where ISOFLOP_TEST_CACHE names a folder."""
    kept = os.environ.get("ISOFLOP_TEST_CACHE")
    return FolderContext(Path(kept) / "prompt-stages" if kept else tmp_path_factory.mktemp("prompt-stages"))


@pytest.fixture(scope="session")
def reader(prompt_ctx: FolderContext) -> LmModel:
    """An untrained reader of the fact world."""
    return untrained_reader(prompt_ctx)


@pytest.fixture(scope="session")
def classifier(prompt_ctx: FolderContext) -> TokenClassifier:
    """A classifier that knows next to nothing."""
    return brief_classifier(prompt_ctx)
