"""The full recipe shows the trends it was made for (takes minutes)."""

from __future__ import annotations

import numpy as np
import pytest

from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.tasks.base import TASKS
from isoflop.testing import FolderContext

COUNTS = (1, 4, 9, 36)


@pytest.mark.slow
def test_recall_gains_from_size_and_reading_from_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    """error(222k) < 0.65 error(14k) for recall at every V; error(V=36) < 0.2 error(V=1) for reading at every N."""
    ctx = FolderContext(tmp_path_factory.mktemp("stages"))
    errors: dict[tuple[str, str, int], float] = {}
    for size in ("d24", "d96"):
        family = family_of(f"tiny-llava/{size}")
        info = family.info(f"tiny-llava/{size}", {})
        for count in COUNTS:
            method = build("avgpool", {"tokens": count})
            model = family.load(info, family.weights(info, (method,), 0), ctx)
            with method.apply(model, None):
                for name in ("reading", "visual-reasoning"):
                    shards = list(TASKS.get(name)().evaluate(model, ctx, 0))
                    errors[size, name, count] = float(np.concatenate([s.errors for s in shards]).mean())
    for count in COUNTS:
        assert errors["d96", "visual-reasoning", count] < 0.65 * errors["d24", "visual-reasoning", count]
    for size in ("d24", "d96"):
        assert errors[size, "reading", 36] < 0.2 * errors[size, "reading", 1]
