"""Scenes in which few tiles carry a digit, and what is asked and taught about them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.models.base import Checkpoint
from isoflop.models.family import family_of
from isoflop.models.tiny import vision as tiny_vision
from isoflop.models.tiny.llava_training import Recipe, recipe_fields
from isoflop.models.training.frozen import CompressorStage
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmInfo
from isoflop.models.worlds import digit_world as world
from isoflop.models.worlds.lessons import Lessons
from isoflop.tasks.base import TASKS
from isoflop.testing import FolderContext

SPARSE = world.SceneSet("train", 300, world.FINE_MIX, 3, digits=5)


def test_sparse_scenes_hold_as_many_digits_as_they_say() -> None:
    classes = SPARSE.classes()
    assert set((classes != world.BLANK).sum(1)) == {5}
    places = (classes != world.BLANK).mean(0)
    assert float(np.abs(places - 5 / 36).max()) < 0.11  # 5 standard errors
    shorter = dataclasses.replace(SPARSE, count=7)
    np.testing.assert_array_equal(shorter.classes(), classes[:7])


def test_tiles_without_a_digit_are_empty_or_shuffled_and_the_others_as_in_full_scenes() -> None:
    images, colours = SPARSE.draw(0)
    full, same_colours = dataclasses.replace(SPARSE, digits=0).draw(0)
    np.testing.assert_array_equal(colours, same_colours)
    tiles, others = (
        i.reshape(-1, 3, 6, 8, 6, 8).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 36, 192) for i in (images, full)
    )
    blank = SPARSE.classes()[:256] == world.BLANK
    np.testing.assert_array_equal(tiles[~blank], others[~blank])
    energy = tiles[blank].std(-1)
    clutter = energy > 0.15
    assert abs(clutter.mean() - world.CLUTTER) < 0.03
    # neither brightness nor contrast gives clutter away
    for statistic in (np.mean, np.std):
        a, b = statistic(tiles[blank][clutter], axis=-1), statistic(tiles[~blank], axis=-1)
        assert abs(a.mean() - b.mean()) < 0.2 * b.std()


def test_full_scenes_are_what_they_were() -> None:
    """Sparse scenes came later; results on full ones must not move."""
    images, _ = world.SceneSet("train", 2, world.TRAIN_READING_MIX, 3).draw(0)
    assert images[:2].astype(np.float64).sum() == pytest.approx(2826.5637, abs=0.01)


def test_questions_ask_for_places_that_carry_a_digit() -> None:
    classes = SPARSE.classes()
    questions, answers = world.find_questions(np.random.default_rng(0), classes)
    found = classes[np.arange(300), questions[:, 1] - world.FIRST_PLACE]
    assert int(found.max()) < world.CLASSES
    np.testing.assert_array_equal(answers, world.FIRST_DIGIT + found)


def test_lessons_of_a_cls_tower_teach_finding_in_half_of_each_batch() -> None:
    lessons = Recipe(tower="cls", reading_scenes=64, coarse_scenes=32).lessons
    assert lessons == Lessons(64, 32, 64)
    classes = np.concatenate([s.classes() for s in lessons.scenes()])
    for step in lessons.steps(5, 16, seed=0):
        assert step.rows_B.shape == (16,)
        assert bool((step.rows_B[:4] < 64).all())
        assert bool((step.rows_B[8:] >= 96).all())
        for row, question, answer in zip(step.rows_B[8:], step.questions_BQ[8:], step.answers_B[8:], strict=True):
            assert int(answer) == world.FIRST_DIGIT + classes[row, int(question[1]) - world.FIRST_PLACE]


def test_options_that_came_later_leave_names_of_older_models_alone() -> None:
    names = {name for name, _ in recipe_fields(Recipe())}
    assert not names & {"tower", "joint"}
    assert dict(recipe_fields(Recipe(joint=False)))["joint"] is False


def test_find_digit_needs_a_model_that_was_taught_it() -> None:
    family = family_of("tiny-llava/d24")
    task = TASKS.get("find-digit")(examples=10)  # type: ignore[call-arg]
    task.check(family.info("tiny-llava/d24", {"tower": "cls"}))
    with pytest.raises(Infeasible, match="task find-digit needs scenes:sparse-1"):
        task.check(family.info("tiny-llava/d24", {}))


def test_the_class_token_is_trained_and_the_projector_reads_the_layer_before() -> None:
    """Every weight of the last layer learns from the class token's loss alone."""
    tower = tiny_vision.train_tower(4, 16, 3e-3, 0, "cls")
    with torch.random.fork_rng(devices=[]):
        from transformers import CLIPVisionModel

        from isoflop.core.hashing import derive_seed

        torch.manual_seed(derive_seed("tower", 0))
        fresh = CLIPVisionModel(tiny_vision.tower_config("cls"))
    before, after = fresh.state_dict(), tower.state_dict()
    moved = [key for key in before if "encoder.layers.3" in key and not torch.equal(before[key], after[key])]
    assert any("mlp" in key for key in moved)
    info = family_of("tiny-llava/d24").info("tiny-llava/d24", {"tower": "cls"})
    assert isinstance(info, VlmInfo)
    assert (info.feature_layer, info.geometry["vision_layers"]) == (3, 4)


def test_a_method_with_weights_learns_on_the_frozen_model_where_training_is_not_joint(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ctx = FolderContext(tmp_path_factory.mktemp("stages"))
    options = {"steps": 30, "batch": 16, "reading_scenes": 256, "coarse_scenes": 128, "tower_steps": 8, "joint": False}
    family = family_of("tiny-llava/d24")
    info = family.info("tiny-llava/d24", options)
    method, seed = build("mqt", {"m": 4}), 1
    weights = family.weights(info, (method,), seed)
    stage = method.prepare(info, weights, seed)
    assert isinstance(stage, CompressorStage)
    assert stage.key == build("mqt", {"m": 9}).prepare(info, weights, seed).key  # type: ignore[union-attr]
    prepared: Checkpoint = ctx.get(dataclasses.replace(stage, steps=20, batch=16))
    assert prepared.state("projector") is None  # W is part of the compressor
    model = family.load(info, weights, ctx)
    assert isinstance(model, VlmModel)
    task = TASKS.get("reading")(examples=40, shard=40)  # type: ignore[call-arg]
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    losses = []
    for part in (method.untrained(info, seed), prepared):  # type: ignore[attr-defined]
        with method.apply(model, part):
            losses.append(next(iter(task.evaluate(model, ctx, 0))).metrics["nll"].mean())
    assert losses[1] < losses[0] - 0.2  # .6; over five seeds .02 to 3, by what the untrained one happens to say
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
