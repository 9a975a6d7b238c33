"""Members of the tiny family that tests share."""

from __future__ import annotations

from typing import Any

from isoflop.core.folder_context import FolderContext
from isoflop.models.family import family_of
from isoflop.models.lm import LmInfo, LmModel

RECALL, TEXT = "tiny-lm/recall-d128x4", "tiny-lm/text-d64"
FEW_STEPS: dict[str, dict[str, Any]] = {
    RECALL: {"steps": 3, "batch": 4},
    TEXT: {"steps": 3, "batch": 2, "context": 64, "vocabulary": 400},
}


def trained(ctx: FolderContext, ref: str, options: dict[str, Any], seed: int = 0) -> LmModel:
    """A member of the tiny family, trained unless the cache has it."""
    family = family_of(ref)
    info = family.info(ref, options)
    assert isinstance(info, LmInfo)
    model = family.load(info, family.weights(info, (), seed), ctx)
    assert isinstance(model, LmModel)
    return model
