"""The scenes, the vocabulary and the facts of the tiny world."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.models.worlds import digit_world as world

MIX = world.TEST_READING_MIX


@given(count=st.integers(1, 600), longer=st.integers(1, 300))
@settings(max_examples=15, deadline=None)
def test_a_shorter_set_is_a_prefix_of_a_longer_one(count: int, longer: int) -> None:
    short, long = world.SceneSet("test", count, MIX, 3), world.SceneSet("test", count + longer, MIX, 3)
    assert np.array_equal(short.classes(), long.classes()[:count])
    assert np.array_equal(short.regions(), long.regions()[:count])
    assert len(short.classes()) == count


def test_images_of_a_range_are_those_of_the_whole_set() -> None:
    scenes = world.SceneSet("train", 600, MIX, 1)
    whole = np.concatenate(list(scenes.images()))
    assert whole.shape == (600, 3, 48, 48)
    assert whole.dtype == np.float32
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert np.array_equal(np.concatenate(list(scenes.images(250, 520))), whole[250:520])
    assert np.array_equal(next(scenes.images(300, 301)), whole[300:301])


def test_all_tiles_of_a_region_show_one_class() -> None:
    scenes = world.SceneSet("test", 64, MIX, 0)
    for regions, classes_P in zip(scenes.regions(), scenes.classes(), strict=True):
        side = int(regions**0.5)
        size = world.GRID // side
        grid = classes_P.reshape(world.GRID, world.GRID)
        for row in range(side):
            for column in range(side):
                assert len(np.unique(grid[row * size : (row + 1) * size, column * size : (column + 1) * size])) == 1


@pytest.mark.parametrize("mix", [world.TRAIN_READING_MIX, world.TEST_READING_MIX, (0.95, 0.0, 0.0, 0.05)])
def test_shares_of_levels_are_met_evenly(mix: tuple[float, ...]) -> None:
    regions = world.SceneSet("test", 2000, mix, 0).regions()
    for start in (0, 1000):
        part = regions[start : start + 1000]
        assert [np.mean(part == level) for level in world.LEVELS] == pytest.approx(mix, abs=0.005)


def test_tiles_are_the_handwritings_in_a_colour() -> None:
    """Without noise every tile is one of its class's writings of the split, times one of the colours."""
    scenes = world.SceneSet("train", 4, (0.0, 0.0, 0.0, 1.0), 5)
    images, colours = scenes.draw(0)
    writings, by_class = world.writings("train")
    classes = scenes.classes()
    for tile in (0, 7, 35):
        row, column = divmod(tile, world.GRID)
        pixels = images[1, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        candidates = writings[by_class[classes[1, tile]]][:, None] * world.COLOURS[colours[1, tile]][:, None, None]
        rms = np.sqrt(((candidates - pixels) ** 2).mean((1, 2, 3)))
        assert rms.min() < 1.1 * world.NOISE


def test_training_and_test_handwritings_are_disjoint() -> None:
    train = np.concatenate(world.writings("train")[1])
    test = np.concatenate(world.writings("test")[1])
    assert len(train) == world.TRAIN_WRITINGS
    assert len(test) == 397
    assert not set(train) & set(test)


def test_questions_and_answers() -> None:
    rng = np.random.default_rng(0)
    classes = world.SceneSet("train", 200, world.COARSE_MIX, 0).classes()
    questions, answers = world.reading_questions(rng, classes)
    assert (questions[:, 0] == world.READ).all()
    assert np.array_equal(answers - world.FIRST_DIGIT, classes[np.arange(200), questions[:, 1] - world.FIRST_PLACE])
    questions, answers = world.recall_questions(rng, classes)
    assert (questions[:, 0] == world.PAD).all()
    assert np.array_equal(
        answers - world.FIRST_ANSWER, world.fact_table()[questions[:, 1] - world.FIRST_ENTITY, classes[:, 0]]
    )
    assert questions.max() < world.VOCAB_SIZE


def test_a_blind_model_knows_little() -> None:
    """The best answer without seeing the image errs on about 0.72 of the recall questions."""
    best = np.array([np.bincount(row).max() / world.CLASSES for row in world.fact_table()])
    assert 1 - world.entity_probabilities() @ best == pytest.approx(0.72, abs=0.02)
