"""Logits of what is scored, without those of the rest: the same numbers, in pieces, and batches by memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lm_cases import FEW_STEPS, TEXT, trained

from isoflop.core.folder_context import FolderContext
from isoflop.methods.base import build
from isoflop.models.budget import HOST_BYTES, tokens_at_once
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel
from isoflop.tasks.language_task import score


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LmModel:
    return trained(FolderContext(tmp_path_factory.mktemp("cache")), TEXT, FEW_STEPS[TEXT])


def batch_of(lm: LmModel, prefix: int = 24) -> LmBatch:
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(lm.info.geometry["vocab_size"], (3, 40), generator=generator)
    asked_BT = torch.rand(3, 40, generator=generator) < 0.3
    asked_BT[1] = False  # nothing is asked of one row
    targets_BT = torch.where(asked_BT, ids_BT.roll(-1, 1), NOT_SCORED)
    return LmBatch(ids_BT, targets_BT, prefix, torch.arange(40) >= torch.tensor([[0], [0], [7]]))


METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "none": None,
    "whole": ("full-cache", {}),
    "evicting": ("snapkv", {"keep": 0.25, "window": 4}),
    "quantising": ("kv-rtn", {"bits": 2, "group": 8}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("most", [1, 5 * 400, 2**24])
def test_scored_logits_are_those_of_the_whole_pass(lm: LmModel, name: str, most: int) -> None:
    batch, method = batch_of(lm, 0 if name == "none" else 24), METHODS[name]
    with nullcontext() if method is None else build(*method).apply(lm, None):
        whole_BTW = lm.logits(batch)
        parts = list(lm.scored_logits(batch, most))
    scored_BT = batch.targets_BT != NOT_SCORED
    torch.testing.assert_close(torch.cat([logits for logits, _ in parts]), whole_BTW[scored_BT], rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([targets for _, targets in parts]), batch.targets_BT[scored_BT])
    vocabulary = lm.info.geometry["vocab_size"]
    assert all(logits.numel() <= max(most, vocabulary) for logits, _ in parts)


@torch.no_grad()
def test_scores_of_rows_are_sums_over_their_own_positions(lm: LmModel) -> None:
    batch = batch_of(lm, 0)
    logits_BTW = lm.logits(batch).double().log_softmax(-1)
    nll_B, right_B, scored_B = score(lm, batch)
    for row in range(3):
        asked_T = batch.targets_BT[row] != NOT_SCORED
        wanted_S = batch.targets_BT[row][asked_T]
        expected = -logits_BTW[row][asked_T].gather(1, wanted_S[:, None]).sum()
        assert nll_B[row] == pytest.approx(float(expected), rel=1e-5)
        assert right_B[row] == int((logits_BTW[row][asked_T].argmax(-1) == wanted_S).sum())
        assert scored_B[row] == int(asked_T.sum())


@torch.no_grad()
def test_nothing_is_scored_where_nothing_is_asked(lm: LmModel) -> None:
    batch = batch_of(lm, 0)
    empty = replace(batch, targets_BT=torch.full_like(batch.targets_BT, NOT_SCORED))
    assert [x.tolist() for x in score(lm, empty)] == [[0.0] * 3] * 3


def test_gradients_flow_through_scored_logits(lm: LmModel) -> None:
    weight = lm.module.get_input_embeddings().weight
    before = weight.requires_grad
    weight.requires_grad_(True)
    sum(logits.sum() for logits, _ in lm.scored_logits(batch_of(lm, 0), 5 * 400)).backward()
    assert float(weight.grad.abs().sum()) > 0
    weight.grad = None
    weight.requires_grad_(before)


@pytest.mark.parametrize("length", [1, 64, 1024, 8192])
def test_batches_go_by_bytes(lm: LmModel, length: int) -> None:
    tokens = tokens_at_once(lm, length)
    geometry = lm.info.geometry
    widest = 4 * tokens * (24 * geometry["width"] + geometry["heads"] * length)
    assert tokens == length or widest <= HOST_BYTES < widest * (tokens + 1) / tokens
    assert tokens >= length
    assert np.isfinite(tokens)
