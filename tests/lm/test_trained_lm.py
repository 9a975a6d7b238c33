"""What the trained members reach at their default options. Minutes of training, hence slow."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from lm_cases import trained

from isoflop.core.folder_context import FolderContext
from isoflop.core.knobs import check_knobs
from isoflop.methods.base import build
from isoflop.models.lm import LmModel
from isoflop.tasks.base import TASKS

pytestmark = pytest.mark.slow


def mean_error(
    model: LmModel, ctx: FolderContext, name: str, method: tuple[str, dict[str, Any]] | None, **options: Any
) -> float:
    task = TASKS.get(name)(**check_knobs(TASKS.get(name), options, f"task {name}"))
    with build(*method).apply(model, None) if method else nullcontext():
        return float(np.concatenate([shard.errors for shard in task.evaluate(model, ctx, 0)]).mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_recall_model_looks_up_and_copies(seed: int, lm_ctx: FolderContext) -> None:
    model = trained(lm_ctx, "tiny-lm/recall-d128", {}, seed)
    for name in ("kv-recall", "kv-copy"):
        for query in ("blind", "aware"):
            assert mean_error(model, lm_ctx, name, None, query=query) < 0.03


def test_what_is_evicted_cannot_be_recalled(lm_ctx: FolderContext) -> None:
    """A window over the last half of the prompt loses the first half of the pairs, whatever is asked."""
    model = trained(lm_ctx, "tiny-lm/recall-d128", {})
    lost = mean_error(model, lm_ctx, "kv-recall", ("streaming-llm", {"keep": 0.5}))
    assert 0.4 < lost < 0.75


def test_outliers_make_two_bits_hard(lm_ctx: FolderContext) -> None:
    plain, scaled = (trained(lm_ctx, "tiny-lm/recall-d128", {"outliers": n}) for n in (0, 2))
    coarse = ("kv-rtn", {"bits": 2})
    assert mean_error(plain, lm_ctx, "kv-recall", coarse) < 0.05
    assert mean_error(scaled, lm_ctx, "kv-recall", None) < 0.03
    assert mean_error(scaled, lm_ctx, "kv-recall", coarse) > 0.2


def test_the_model_of_english_has_learned_some(lm_ctx: FolderContext) -> None:
    model = trained(lm_ctx, "tiny-lm/text-d128", {})
    assert mean_error(model, lm_ctx, "bits-per-byte", None, prefix=0.0) < 2.7
