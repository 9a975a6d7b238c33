"""Weight methods in the models and stages of real jobs: vision-language models with a compressor, classifiers, English."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isoflop.core.errors import Infeasible
from isoflop.core.stage import walk
from isoflop.jobs.job import Job, MethodSpec, ResolvedJob
from isoflop.jobs.runner import merge_footprints
from isoflop.methods.base import build
from isoflop.methods.visual_tokens.probe import VisualTokenProbe
from isoflop.methods.weights.views import linear_views
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import CacheReport
from isoflop.models.hooks.visual_tokens import VISUAL_TOKENS
from isoflop.models.vlm import VlmModel
from isoflop.models.worlds import recall_world
from isoflop.tasks.base import TASKS
from isoflop.tasks.footprint import byte_costs
from isoflop.testing import FolderContext

CELL = {"steps": 40, "batch": 16, "reading_scenes": 256, "coarse_scenes": 128, "tower_steps": 8}
QUICK: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 4},
    "gptq": {"bits": 4, "n_calib": 16},
    "bitstack": {"bits": 8.0, "k": 1, "n_iter": 5, "n_calib": 16, "n_sort": 8},
}


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
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
    assert own["model_ratio"] == pytest.approx(costs["weight_bytes_dense"] / costs["weight_bytes"])
    views = {view.parameter for view in linear_views(model)}
    assert views <= changed
    norms = {n for n in changed - views if "layernorm" in n}
    assert changed - views == norms, "besides the matrices only norms may take up scales"
    assert bool(norms) == (name == "bitstack")
    assert not np.array_equal(served, dense)
    assert abs(served.mean() - dense.mean()) < 0.5
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())


def test_the_ratio_of_all_weights_is_that_of_the_row_where_a_resampler_replaces_the_projector() -> None:
    probe = VisualTokenProbe()
    rtn, mqt = build("rtn", {"bits": 4}), build("mqt", {"m": 4, "queries": 16})
    with rtn.apply(probe.model, None), mqt.apply(probe.model, probe.prepared(mqt, 0)):
        own, row = (
            rtn.footprint(probe.model, probe.ctx),
            byte_costs(probe.model, CacheReport(0, 0, 0, 0, 0), 0.0),
        )
    assert own["model_ratio"] == pytest.approx(row["weight_bytes_dense"] / row["weight_bytes"])


@pytest.mark.parametrize("joint", [True, False])
def test_only_methods_that_the_model_was_trained_with_enter_calibration(joint: bool) -> None:
    keys = set()
    for tokens in (4, 9):
        methods = (MethodSpec.of("avgpool", {"tokens": tokens}), MethodSpec.of("gptq", {"bits": 4}))
        options = (("joint", joint),)
        job = Job("tiny-llava/d24", methods, "reading", 0, 0, options)
        stage = ResolvedJob.of(job).prepared[1]
        assert stage is not None
        keys.add(stage.key)
    assert len(keys) == (2 if joint else 1)


def test_an_image_classifier(ctx: FolderContext) -> None:
    family = family_of("tiny-vit/c64")
    info = family.info("tiny-vit/c64", {"steps": 2})
    method = build("gptq", {"bits": 3, "n_calib": 32})
    weights = family.weights(info, (method,), 0)
    model = family.load(info, weights, ctx)
    stage = method.prepare(info, weights, 0)
    assert stage is not None
    with method.apply(model, ctx.get(stage)):
        assert method.footprint(model, ctx)["bits"] == pytest.approx(3 + 1)


def test_a_model_without_matrices_is_refused_at_plan() -> None:
    import dataclasses

    info = family_of("tiny-llava/d24").info("tiny-llava/d24", {})
    bare = dataclasses.replace(info, hooks=frozenset({VISUAL_TOKENS}))
    with pytest.raises(Infeasible, match="bitstack needs matrices"):
        build("bitstack", {}).check(bare)


@pytest.mark.parametrize(("name", "dtype"), [("gptq", "bfloat16"), ("bitstack", "bfloat16"), ("wanda", "float16")])
def test_a_checkpoint_in_half_precision(name: str, dtype: str, ctx: FolderContext, tmp_path: Path) -> None:
    """The same code on files in ``save_pretrained`` form: stages by the checkpoint's content, bytes by its type."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recall_world.VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, isoflop={"vocabulary": recall_world.VOCABULARY},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    ref = f"hf:{tmp_path / 'model'}"
    family = family_of(ref)
    info = family.info(ref, {"dtype": dtype})
    knobs = {"n_calib": 8, **({"n_iter": 6, "k": 1, "n_sort": 4} if name == "bitstack" else {})}
    method = build(name, knobs)
    stage = method.prepare(info, None, 0)
    assert stage is not None
    model = family.load(info, None, ctx)
    task = TASKS.get("kv-recall")(examples=4)  # type: ignore[call-arg]
    dense = np.concatenate([shard.metrics["nll"] for shard in task.evaluate(model, ctx, 0)])
    with method.apply(model, ctx.get(stage)):
        served = np.concatenate([shard.metrics["nll"] for shard in task.evaluate(model, ctx, 0)])
        assert method.footprint(model, ctx)["bits"] <= {"gptq": 5, "bitstack": 4, "wanda": 9}[name]
    assert not np.array_equal(dense, served)
    assert np.allclose(dense, served, atol=1.0)


def test_bits_of_weights_and_of_the_cache_stand_side_by_side() -> None:
    weights, cache = build("rtn", {}), build("kv-rtn", {})
    assert merge_footprints({}, [(weights, {"bits": 5.0})]) == {"bits": 5.0}
    both = merge_footprints({}, [(weights, {"bits": 5.0, "ratio": 3.2}), (cache, {"bits": 4.5, "ratio": 3.5})])
    assert both == {"bits_weights": 5.0, "bits_kv_cache": 4.5, "ratio_weights": 3.2, "ratio_kv_cache": 3.5}
