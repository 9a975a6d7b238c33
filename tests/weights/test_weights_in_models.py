"""Weight methods in the models and stages of real jobs: vision-language models with a compressor, classifiers, English."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from isoflop.core.errors import Infeasible
from isoflop.core.stage import walk
from isoflop.methods.base import build
from isoflop.methods.weights.views import linear_views
from isoflop.models.base import family_of
from isoflop.models.vlm import VlmModel
from isoflop.tasks.base import TASKS
from isoflop.testing import FolderContext

CELL = {"steps": 40, "batch": 16, "reading_scenes": 256, "coarse_scenes": 128, "tower_steps": 8}
QUICK: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 4},
    "gptq": {"bits": 4, "n_calib": 16},
    "bitstack": {"bits": 8.0, "k": 1, "n_iter": 5, "n_calib": 16, "n_sort": 8},
}


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    torch.set_num_threads(1)
    return FolderContext(tmp_path_factory.mktemp("weight-stages"))


@pytest.mark.parametrize("name", sorted(QUICK))
def test_together_with_the_compressor_the_model_was_trained_with(name: str, ctx: FolderContext) -> None:
    """Calibrated behind the compressor, applied before it; tower, projector, embeddings and head stay as they are."""
    family = family_of("tiny-llava/d24")
    info = family.info("tiny-llava/d24", CELL)
    visual, weights_method = build("quecc", {"k": 3}), build(name, QUICK[name])
    weights = family.weights(info, (visual, weights_method), 0)
    stage = weights_method.prepare(info, weights, 0, (visual,))
    compressor_stage = visual.prepare(info, weights, 0, (visual,))
    if stage is not None:
        assert weights.key in {s.key for s in walk((stage,))}  # type: ignore[union-attr]
    model = family.load(info, weights, ctx)
    assert isinstance(model, VlmModel)
    task = TASKS.get("reading")(examples=60, shard=60)  # type: ignore[call-arg]
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    prepared = ctx.get(stage) if stage is not None else None
    compressor = ctx.get(compressor_stage) if compressor_stage is not None else None
    with visual.apply(model, compressor):
        dense = np.concatenate([s.metrics["nll"] for s in task.evaluate(model, ctx, 0)])
    with weights_method.apply(model, prepared), visual.apply(model, compressor):
        served = np.concatenate([s.metrics["nll"] for s in task.evaluate(model, ctx, 0)])
        costs = task.measure(model, ctx)
        own = weights_method.footprint(model, ctx)
        changed = {n for n, p in model.module.named_parameters() if not torch.equal(p, before[n])}
        compressor_bytes = visual.footprint(model, ctx)["method_bytes"]
        assert costs["weight_bytes"] == pytest.approx(model.weight_bytes() + compressor_bytes)
    assert own["ratio"] > 1
    assert own["model_ratio"] > 1
    views = {view.parameter for view in linear_views(model)}
    assert views <= changed
    norms = {n for n in changed - views if "layernorm" in n}
    assert changed - views == norms, "besides the matrices only norms may take up scales"
    assert bool(norms) == (name == "bitstack")
    assert not np.array_equal(served, dense)
    assert abs(served.mean() - dense.mean()) < 0.5
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())


def test_an_image_classifier(ctx: FolderContext) -> None:
    family = family_of("tiny-vit/c64")
    ref = family.members()[0]
    info = family.info(ref, {"steps": 2})
    method = build("gptq", {"bits": 3, "n_calib": 32})
    if "weights" not in info.hooks:
        pytest.skip(f"{ref} does not offer its weights")
    weights = family.weights(info, (method,), 0)
    model = family.load(info, weights, ctx)
    stage = method.prepare(info, weights, 0)
    assert stage is not None
    with method.apply(model, ctx.get(stage)):
        assert method.footprint(model, ctx)["bits"] == pytest.approx(3 + 1, abs=0.1)


def test_a_model_without_matrices_is_refused_at_plan() -> None:
    import dataclasses

    info = family_of("tiny-llava/d24").info("tiny-llava/d24", {})
    bare = dataclasses.replace(info, hooks=frozenset({"visual-tokens"}))
    with pytest.raises(Infeasible, match="bitstack needs weights"):
        build("bitstack", {}).check(bare)
