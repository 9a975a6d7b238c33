"""Checkpoints along one training, and what they share."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from sparsity_cases import SHORT, loaded, met_to_the_tolerance

from isoflop.core.errors import UserError
from isoflop.core.folder_context import FolderContext
from isoflop.core.stage import walk
from isoflop.jobs.job import Job, MethodSpec, ResolvedJob
from isoflop.methods.activation_sparsity.calibration import CettStage, Thresholds, ThresholdStage
from isoflop.methods.activation_sparsity.cett_rule import SparsingLaw
from isoflop.models.family import family_of, split_ref
from isoflop.models.lm import LmInfo, LmModel
from isoflop.models.tiny.lm_training import TextRecipe, TextSeriesStage
from isoflop.sweep.resolve import resolve

REF = "tiny-lm/text-d32?act=relu&at={}"
FAMILY = family_of(REF)


def weights(ref: str, **options: Any) -> Any:
    return FAMILY.weights(FAMILY.info(ref, {**SHORT, **options}), (), 0)


def test_the_series_has_two_steps_per_octave_and_ends_with_the_last() -> None:
    assert TextRecipe(steps=64).series == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64]
    for steps in (1, 2, 3, 500, 1023):
        series = TextRecipe(steps=steps).series
        assert (series[0], series[-1]) == (1, steps)
        assert series == sorted(set(series))


def test_one_training_serves_every_checkpoint(relu_lm: LmModel, sparsity_ctx: FolderContext) -> None:
    stages = [weights(REF.format(at)) for at in (16, 32, 64)]
    assert len({stage.key for stage in stages}) == 3  # models of their own
    assert len({stage.series.key for stage in stages}) == 1
    before = sorted(path.name for path in sparsity_ctx.root.glob("text-lm-series-*"))
    models = [loaded(sparsity_ctx, REF.format(at)) for at in (16, 32)]
    assert sorted(path.name for path in sparsity_ctx.root.glob("text-lm-series-*")) == before
    norms = [float(m.module.lm_head.weight.norm()) for m in (*models, relu_lm)]
    assert norms == sorted(norms)
    assert len(set(norms)) == 3


def test_the_last_checkpoint_is_the_trained_model(sparsity_ctx: FolderContext, tmp_path: Path) -> None:
    options = {"steps": 3, "batch": 2, "context": 16}
    series, plain = weights(REF.format(3), **options), weights("tiny-lm/text-d32?act=relu", **options)
    for stage, folder in ((series.series, tmp_path / "series"), (plain, tmp_path / "plain")):
        folder.mkdir()
        stage.compute(sparsity_ctx, folder)
    last = (tmp_path / "series" / "step-3" / "model.safetensors").read_bytes()
    assert last == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert last != (tmp_path / "series" / "step-2" / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "series" / "step-3" / "config.json").read_text())
    assert (config["hidden_act"], config["num_hidden_layers"]) == ("relu", 2)


def test_training_tokens_are_those_of_the_checkpoint() -> None:
    tokens = [FAMILY.info(REF.format(at), SHORT).geometry["train_tokens"] for at in (16, 64)]
    assert tokens == [16 * 8 * 64, 64 * 8 * 64]
    assert FAMILY.info("tiny-lm/text-d32", SHORT).geometry["train_tokens"] == tokens[1]


def test_new_options_at_their_defaults_name_nothing() -> None:
    plain = FAMILY.info("tiny-lm/text-d64", {})
    spelt = FAMILY.info("tiny-lm/text-d64", {"act": "silu", "layers": 0, "at": 0})
    assert (plain.version, plain.options) == (spelt.version, spelt.options)
    assert not {"act", "layers", "at"} & dict(plain.options).keys()
    assert FAMILY.weights(plain, (), 0).key == FAMILY.weights(spelt, (), 0).key
    assert FAMILY.info("tiny-lm/text-d64", {"act": "relu"}).version != plain.version


def test_options_in_the_reference_are_options() -> None:
    inline, given = (
        FAMILY.info("tiny-lm/text-d64?act=relu&steps=40", {}),
        FAMILY.info("tiny-lm/text-d64", {"act": "relu", "steps": 40}),
    )
    assert inline.version == given.version
    assert FAMILY.weights(inline, (), 0).key == FAMILY.weights(given, (), 0).key
    assert FAMILY.canonical_options("tiny-lm/text-d64?act=relu", {"act": "relu", "steps": 500, "batch": 4}) == {
        "batch": 4
    }
    assert split_ref("a/b?x=1&y=.5&z=relu&w=true") == ("a/b", {"x": 1, "y": 0.5, "z": "relu", "w": True})


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("tiny-lm/text-d64?at=100", {}, r"at = 100 was not kept; allowed: 1, 2, .*, 354, 500"),
        ("tiny-lm/text-d64?act=tanh", {}, r"act = 'tanh' is not allowed"),
        ("tiny-lm/text-d64?act=relu", {"act": "silu"}, r"act = 'silu' is given beside the reference"),
        ("tiny-lm/text-d64?act", {}, r"'act' is no option of its own"),
        ("tiny-lm/text-d64?act=relu&act=silu", {}, r"is no option of its own"),
        ("tiny-lm/text-d65?act=relu", {}, r"did you mean 'tiny-lm/text-d"),
        ("tiny-lm/recall-d64?act=relu", {}, r"unknown knob of model tiny-lm/recall-d64\?act=relu 'act'"),
    ],
)
def test_wrong_references_are_told(ref: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.info(ref, options)


def job_of(at: int, method: str = "sparsing-law") -> ResolvedJob:
    return ResolvedJob.of(
        Job(
            REF.format(at),
            (MethodSpec.of(method, {"n_calib": 4}),),
            "bits-per-byte",
            0,
            0,
            tuple(sorted(SHORT.items())),
        )
    )


def test_checkpoints_of_a_training_share_the_cett_of_its_last_five() -> None:
    stages = [job_of(at).prepared[0] for at in (8, 64)]
    assert all(isinstance(stage, ThresholdStage) for stage in stages)
    first, last = stages
    assert isinstance(first, ThresholdStage)
    assert isinstance(last, ThresholdStage)
    assert isinstance(first.common, CettStage)
    assert first.common.key == last.common.key
    assert first.key != last.key
    assert [dict(model.options)["at"] for model in first.common.models] == [16, 23, 32, 45, 64]
    trainings = {s.key for s in walk((first, last)) if isinstance(s, TextSeriesStage)}
    assert len(trainings) == 1
    alone = job_of(8, "mlp-cett").prepared[0]
    assert isinstance(alone, ThresholdStage)
    assert alone.common is None


def test_the_shared_cett_meets_the_tolerance_on_average(sparsity_ctx: FolderContext) -> None:
    resolved = job_of(8)
    stage = resolved.prepared[0]
    assert isinstance(stage, ThresholdStage)
    assert stage.common is not None
    found = sparsity_ctx.get(stage.common)
    method = SparsingLaw(n_calib=4)
    with ExitStack() as stack:
        last_five = [(stack.enter_context(model.model(sparsity_ctx)), model.seed) for model in stage.common.models]
        texts = [method.calibration(model, sparsity_ctx, seed) for model, seed in last_five]
        assert met_to_the_tolerance(method, texts)[0] == found
    own: list[float] = []
    for at in (16, 23, 32, 45, 64):
        thresholds: Thresholds = sparsity_ctx.get(job_of(at).prepared[0])
        assert thresholds.figures["cett"] == found.cett
        own.append(thresholds.figures["calibration_ppl_ratio"])
    assert sum(own) / 5 == pytest.approx(found.ppl_ratio, rel=1e-12)
    assert max(own) > found.ppl_ratio > min(own)


def test_a_model_without_a_series_is_its_own() -> None:
    info = FAMILY.info("tiny-lm/text-d32", SHORT)
    stage = SparsingLaw().prepare(info, FAMILY.weights(info, (), 0), 0)
    assert isinstance(stage, ThresholdStage)
    assert stage.common is not None
    assert [model.ref for model in stage.common.models] == ["tiny-lm/text-d32"]
    assert isinstance(info, LmInfo)
    assert FAMILY.series(info, None) == ((info, None),)


def test_a_sweep_holds_several_checkpoints_and_fits_their_law() -> None:
    block = {
        "name": "x", "tasks": ["bits-per-byte"], "methods": ["sparsing-law"],
        "models": [{REF.format(at): dict(SHORT)} for at in (16, 32)],
        "laws": [{"law": "sparsing_relu", "y": "metrics.activation_ratio", "x": {"D": "footprint.train_tokens/1e9"}, "where": "model like '%relu%'"}],
    }  # fmt: skip
    sweep = resolve(block)
    ids = {sweep.jobs_of(config)[0].id for config in sweep.space.grid()}
    assert len(ids) == 2
    block["laws"][0]["x"] = {"D": "footprnt.train_tokens"}
    with pytest.raises(UserError, match=r"is not allowed in 'footprnt\.train_tokens'"):
        resolve(block)


def test_torch_state_is_left_alone(sparsity_ctx: FolderContext) -> None:
    state = torch.random.get_rng_state()
    SparsingLaw(n_calib=2).calibrate(loaded(sparsity_ctx, REF.format(64)), sparsity_ctx, 0)
    assert torch.equal(state, torch.random.get_rng_state())
