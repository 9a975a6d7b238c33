"""What names a model: the content of a checkpoint's files, and options without those that only repeat a default."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isoflop.methods.visual_tokens.probe import untrained_model
from isoflop.models.base import family_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    untrained_model().module.save_pretrained(path)
    return path


def test_a_checkpoint_whose_weights_change_in_place_is_another_version(folder: Path) -> None:
    family, ref = family_of("hf:x"), f"hf:{folder}"
    before = family.info(ref, {})
    assert family.info(ref, {}) is before
    model = untrained_model()
    with torch.no_grad():
        model.module.lm_head.weight.add_(1.0)
    model.module.save_pretrained(folder)
    after = family.info(ref, {})
    assert after.version != before.version
    assert after.tower != before.tower  # features of the old tower are not taken for those of the new
