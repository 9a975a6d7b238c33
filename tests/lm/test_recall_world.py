"""The world of symbols: every scored token can be looked up in the prompt, and in one way only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.core.folder_context import FolderContext
from isoflop.models.lm import NOT_SCORED, LmBatch
from isoflop.models.worlds import recall_world as world


def looked_up(batch: LmBatch) -> Any:
    """For every scored position the token behind the one other occurrence of its token, in the prompt."""
    ids, targets = batch.ids_BT.numpy(), batch.targets_BT.numpy()
    answers = np.full_like(targets, NOT_SCORED)
    for row, column in zip(*np.nonzero(targets != NOT_SCORED), strict=True):
        places = np.flatnonzero(ids[row, : batch.prefix - 1] == ids[row, column])
        places = [p for p in places if ids[row, p + 1] != world.SEP and ids[row, p] != world.SEP]
        answers[row, column] = ids[row, places[0] + 1]
    return answers


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.booleans(), st.integers(0, 99))
def test_recall_is_answered_by_looking_the_key_up(
    pairs: int, asked: int, filler: int, announced: bool, seed: int
) -> None:
    asked = min(asked, pairs)
    batch = world.recalling(np.random.default_rng(seed), 3, pairs, asked, filler, announced)
    scored = batch.targets_BT != NOT_SCORED
    assert (scored.sum(1) == asked).all()
    assert not scored[:, : batch.prefix].any()
    assert (looked_up(batch) == batch.targets_BT.numpy()).all()
    assert (batch.ids_BT[:, 1:][scored[:, :-1]] == batch.targets_BT[:, :-1][scored[:, :-1]]).all()


@given(st.integers(4, 60), st.integers(0, 30), st.integers(1, 3), st.integers(0, 99))
def test_copies_are_answered_by_looking_back(length: int, gap: int, cue: int, seed: int) -> None:
    batch = world.copying(np.random.default_rng(seed), 3, length, gap, cue)
    assert batch.prefix == 1 + length + gap
    assert ((batch.targets_BT != NOT_SCORED).sum(1) == length - cue - 1).all()
    assert (looked_up(batch) == batch.targets_BT.numpy()).all()


def test_repeated_sequences_are_scored_after_the_first_period() -> None:
    batch = world.repeated(np.random.default_rng(0), 2, 5, 16)
    assert (batch.ids_BT[:, 6:] == batch.ids_BT[:, 1:-5]).all()
    assert (batch.targets_BT[:, :6] == NOT_SCORED).all()
    assert (batch.targets_BT[:, 6:-1] == batch.ids_BT[:, 7:]).all()


@pytest.mark.parametrize("examples", [3, 16, 50])
def test_calibration_has_as_many_rows_as_asked(examples: int) -> None:
    ctx = FolderContext("unused")
    batches = list(world.RecallText(6).batches(ctx, examples, 0))
    assert sum(len(b) for b in batches) == examples
    assert all((a == b).all() for a, b in zip(batches, world.RecallText(6).batches(ctx, examples, 0), strict=True))
