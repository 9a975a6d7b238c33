"""One short training of the smallest text classifier for all tests of encoders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isoflop.core.folder_context import FolderContext
from isoflop.models.family import family_of
from isoflop.models.text_classifier import TextClassifier

REF, STEPS = "tiny-bert/d32", 300


@pytest.fixture(scope="session")
def encoder_ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    """A cache that lives as long as the test run, or longer where ISOFLOP_TEST_CACHE names a folder."""
    kept = os.environ.get("ISOFLOP_TEST_CACHE")
    return FolderContext(Path(kept) / "encoder-stages" if kept else tmp_path_factory.mktemp("encoder-stages"))


@pytest.fixture(scope="session")
def tiny_bert(encoder_ctx: FolderContext) -> TextClassifier:
    """``tiny-bert/d32`` after a third of its training. Treat it as read-only."""
    family = family_of(REF)
    info = family.info(REF, {"steps": STEPS})
    model = family.load(info, family.weights(info, (), 0), encoder_ctx)
    assert isinstance(model, TextClassifier)
    return model
