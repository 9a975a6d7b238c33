"""The family ``tiny-lm``: sizes as described, training by seed, outliers that change nothing, refusals."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from lm_cases import FEW_STEPS, RECALL, TEXT, trained

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.family import family_of
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.hooks.matrices import MATRICES
from isoflop.models.lm import LmModel
from isoflop.models.tiny.lm_config import RECALL_SIZES, TEXT_SIZES, LmSize
from isoflop.models.tiny.lm_training import RecallLessons, RecallRecipe, add_outliers, untrained_lm
from isoflop.models.worlds import recall_world as world


@pytest.mark.parametrize("size", [*RECALL_SIZES.values(), *TEXT_SIZES.values()])
def test_the_size_is_that_of_the_decoder_layers(size: LmSize) -> None:
    module = untrained_lm(size, 64, 0)
    assert size.n_params == sum(p.numel() for p in module.model.layers.parameters())
    assert size.geometry(64)["head_width"] * size.heads == size.width


@pytest.mark.parametrize("ref", sorted(FEW_STEPS))
def test_a_member_is_what_it_says(ref: str, lm_ctx: FolderContext) -> None:
    model = trained(lm_ctx, ref, FEW_STEPS[ref])
    config = model.module.config
    assert model.info.n_params == sum(p.numel() for p in model.decoder.layers.parameters())
    described = {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_width": config.head_dim,
        "vocab_size": config.vocab_size,
        "positions": config.max_position_embeddings,
    }
    assert described.items() <= model.info.geometry.items()
    assert {ATTENTION, MATRICES} < model.info.hooks
    logits_SW, targets_S = model.supervised(next(iter(model.calibration(lm_ctx, 2, 0))))
    assert logits_SW.shape == (len(targets_S), config.vocab_size)


@pytest.mark.parametrize("ref", sorted(FEW_STEPS))
def test_a_seed_names_the_weights(ref: str, lm_ctx: FolderContext, tmp_path_factory: pytest.TempPathFactory) -> None:
    family = family_of(ref)
    info = family.info(ref, FEW_STEPS[ref])
    stages = [family.weights(info, (), seed) for seed in (0, 1)]
    first, other = (lm_ctx.get(stage).folder / "model.safetensors" for stage in stages if stage is not None)
    again = tmp_path_factory.mktemp("again")
    assert stages[0] is not None
    stages[0].compute(lm_ctx, again)
    assert (again / "model.safetensors").read_bytes() == first.read_bytes()
    assert other.read_bytes() != first.read_bytes()


def test_training_records_what_was_reached(lm_ctx: FolderContext) -> None:
    family = family_of(RECALL)
    stage = family.weights(family.info(RECALL, FEW_STEPS[RECALL]), (), 0)
    assert stage is not None
    record = json.loads((lm_ctx.get(stage).folder / "training.json").read_text())
    assert record["steps"] == 3
    assert 0 <= record["recall_accuracy"] <= 1
    assert {"copy_accuracy", "final_loss", "cpu_seconds", "pairs_reached"} <= record.keys()


def test_outliers_change_no_logits(recall_lm: LmModel) -> None:
    module = recall_lm.module
    scaled = deepcopy(module)
    add_outliers(scaled, 2, 10.0, seed=3)
    ids = world.recalling(np.random.default_rng(0), 4, 12, 12).ids_BT
    with torch.no_grad():
        plain, other = module(ids, use_cache=True), scaled(ids, use_cache=True)
    assert (plain.logits - other.logits).abs().max() <= 1e-4 * plain.logits.abs().max()
    for before, after in zip(plain.past_key_values.layers, other.past_key_values.layers, strict=True):
        for a, b in ((before.keys, after.keys), (before.values, after.values)):
            ratio = (b.square().mean((0, 2)) / a.square().mean((0, 2))).sqrt()
            assert (torch.isclose(ratio, torch.tensor(10.0), rtol=1e-3).sum(1) == 4).all()
            assert (torch.isclose(ratio, torch.tensor(1.0), rtol=1e-3).sum(1) == ratio.shape[1] - 4).all()


def test_outliers_are_an_option_of_the_model(lm_ctx: FolderContext, recall_lm: LmModel) -> None:
    scaled = trained(lm_ctx, RECALL, {**FEW_STEPS[RECALL], "outliers": 2})
    assert scaled.info.version != recall_lm.info.version
    weights = [m.module.model.layers[0].self_attn.k_proj.weight.abs().max() for m in (recall_lm, scaled)]
    assert weights[1] > 3 * weights[0]


def test_lessons_become_harder_when_they_are_solved() -> None:
    lessons = RecallLessons(RecallRecipe(steps=30, batch=2, pairs=10), seed=0)
    seen, losses = [], iter([9.0, 0.1, *[0.0] * 20, *[9.0] * 8])
    for _ in lessons:
        lessons.learned(next(losses))
        seen.append(lessons.pairs)
    assert seen[:2] == [0, 4]
    assert seen[-1] == 10
    assert sorted(seen) == seen


def test_a_few_steps_lower_the_loss(lm_ctx: FolderContext, tmp_path_factory: pytest.TempPathFactory) -> None:
    family = family_of(TEXT)
    losses = []
    for steps in (1, 25):
        options = {**FEW_STEPS[TEXT], "steps": steps, "batch": 8}
        stage = family.weights(family.info(TEXT, options), (), 0)
        assert stage is not None
        losses.append(json.loads((lm_ctx.get(stage).folder / "training.json").read_text())["final_loss"])
    assert losses[1] < losses[0] - 0.3


def test_options_that_repeat_defaults_are_left_out() -> None:
    family = family_of(RECALL)
    assert family.canonical_options(RECALL, {"batch": 32.0, "outliers": 2}) == {"outliers": 2}
    assert family.info(RECALL, {"batch": 32}).version == family.info(RECALL, {}).version
    assert family.info(RECALL, {"batch": 31}).version != family.info(RECALL, {}).version


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("tiny-lm/recall-d65", {}, r"did you mean 'tiny-lm/recall-d"),
        ("tiny-lm/text", {}, r"unknown model"),
        (RECALL, {"context": 64}, r"unknown knob of model tiny-lm/recall-d128x4 'context'"),
        (TEXT, {"vocabulary": 100}, r"vocabulary = 100 is out of range"),
    ],
)
def test_wrong_references_and_options_are_told(ref: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        family_of(ref).info(ref, options)


def test_no_method_takes_part_in_the_training() -> None:
    family = family_of(RECALL)
    with pytest.raises(
        Infeasible, match="method avgpool takes part in training at visual_tokens, and models of the family tiny-lm"
    ):
        family.weights(family.info(RECALL, {}), (build("avgpool", {"tokens": 4}),), 0)
