"""What the papers promise, on a small trained decoder with outlier channels (takes minutes)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isoflop.methods.base import build
from isoflop.methods.kv_cache.base import KvCacheMethod
from isoflop.models.family import family_of
from isoflop.tasks.base import TASKS
from isoflop.testing import FolderContext

MODEL, OPTIONS = "tiny-lm/recall-d64", {"outliers": 6}


@pytest.mark.slow
def test_orderings_of_the_papers_on_recall(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An interior forgetting factor beats both ends; normalised saliency and channel scales save bits; labels find tokens."""
    ctx = FolderContext(tmp_path_factory.mktemp("stages"))
    family = family_of(MODEL)
    info = family.info(MODEL, OPTIONS)
    model = family.load(info, family.weights(info, (), 0), ctx)

    def error(query: str, name: str, **knobs: Any) -> float:
        method = build(name, knobs)
        assert isinstance(method, KvCacheMethod)
        calibrate = getattr(method, "calibrate", None)
        with method.apply(model, calibrate and calibrate(model, ctx, 0)):
            shards = list(TASKS.get("kv-recall")(query=query, examples=128).evaluate(model, ctx, 0))
        return float(np.concatenate([shard.errors for shard in shards]).mean())

    assert error("aware", "full-cache") < 0.03
    forgetting = [error("aware", "a2sf", keep=0.25, alpha=alpha, rolling=False) for alpha in (0.0, 0.9, 1.0)]
    assert forgetting[1] < 0.5 * min(forgetting[0], forgetting[2])
    assert (
        abs(error("blind", "a2sf", keep=0.5, rolling=False) - error("blind", "kv-random", keep=0.5)) < 0.2
    )  # no score can know

    salient = {"salient_ratio": 0.2, "probe_recent": 0.2, "probe_random": 0.2}
    zipped = error("aware", "zipcache", **salient)
    assert zipped < 0.7 * error("aware", "mixed-random", salient_ratio=0.2)
    assert zipped < 0.5 * error("aware", "zipcache", v_scheme="token", **salient)

    sparse = {"k_share": 0.125, "group_factor": 8, "dense_layers": 0}
    labelled = {
        channel: error("blind", "double-sparsity", channel=channel, **sparse) for channel in ("qk", "random", "worst")
    }
    assert labelled["qk"] < 0.5 * labelled["random"] < labelled["worst"]
    assert error("blind", "streaming-llm", keep=0.125) > 0.7
