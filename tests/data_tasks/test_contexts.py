"""Contexts that are read once: scores and generations are those of whole passes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from isoflop.methods.base import build
from isoflop.methods.kv_cache.probe import VOCABULARY, untrained_decoder
from isoflop.models import contexts as module
from isoflop.models.contexts import read_contexts
from isoflop.models.lm import NOT_SCORED, LmBatch, LmModel

CACHES = [
    None,
    ("full-cache", {}),
    ("snapkv", {"keep": 0.5, "window": 4}),
    ("streaming-llm", {"keep": 0.5, "rolling": True}),
    ("h2o", {"keep": 0.5}),
    ("kv-rtn", {}),
    ("zipcache", {}),
]
RNG = np.random.default_rng(5)
CONTEXTS = [RNG.integers(1, VOCABULARY, n).tolist() for n in (24, 31, 17)]
TAILS = [RNG.integers(1, VOCABULARY, n).tolist() for n in (5, 3, 7)]
SCORED = [2, 2, 5]


@pytest.fixture(scope="module")
def lm() -> LmModel:
    return untrained_decoder()


def applied(lm: LmModel, cache: tuple[str, dict] | None) -> ExitStack:
    stack = ExitStack()
    if cache is not None:
        stack.enter_context(build(*cache).apply(lm, None))
    return stack


def one_pass(lm: LmModel, context: list[int], tail: list[int], scored: int) -> tuple[float, int]:
    """The same in one forward pass over one row: log-likelihood, and how many tokens would have been chosen."""
    ids_BT = torch.tensor([[*context, *tail]])
    targets_BT = torch.full_like(ids_BT, NOT_SCORED)
    logits_TW = lm.logits(LmBatch(ids_BT, targets_BT, len(context)))[0].double()
    places = range(len(context) + len(tail) - scored - 1, len(context) + len(tail) - 1)
    nll = sum(float(torch.logsumexp(logits_TW[p], 0) - logits_TW[p, ids_BT[0, p + 1]]) for p in places)
    return nll, sum(int(logits_TW[p].argmax()) == int(ids_BT[0, p + 1]) for p in places)


@pytest.mark.parametrize("cache", CACHES, ids=lambda c: "none" if c is None else c[0])
def test_scores_of_ragged_rows_are_those_of_one_pass_each(lm: LmModel, cache: tuple[str, dict] | None) -> None:
    with applied(lm, cache):
        expected = [one_pass(lm, *row) for row in zip(CONTEXTS, TAILS, SCORED, strict=True)]
        with read_contexts(lm, CONTEXTS) as contexts:
            found = contexts.score(TAILS, SCORED)
    np.testing.assert_allclose(found.nll_B, [nll for nll, _ in expected], rtol=2e-5)
    assert found.right_B.tolist() == [right for _, right in expected]
    assert found.scored_B.tolist() == SCORED


@pytest.mark.parametrize("cache", CACHES, ids=lambda c: "none" if c is None else c[0])
def test_a_context_is_as_before_whatever_was_scored_or_generated_behind_it(
    lm: LmModel, cache: tuple[str, dict] | None
) -> None:
    with applied(lm, cache), read_contexts(lm, CONTEXTS) as contexts:
        first = contexts.score(TAILS, SCORED)
        contexts.score([tail[::-1] * 2 for tail in TAILS], SCORED)
        contexts.generate([tail[:3] for tail in TAILS], 6, frozenset())
        again = contexts.score(TAILS, SCORED)
    np.testing.assert_allclose(first.nll_B, again.nll_B, rtol=1e-6)


@pytest.mark.parametrize("cache", CACHES, ids=lambda c: "none" if c is None else c[0])
def test_long_tails_take_several_passes(
    lm: LmModel, cache: tuple[str, dict] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with applied(lm, cache), read_contexts(lm, CONTEXTS) as contexts:
        whole = contexts.score(TAILS, SCORED)
        monkeypatch.setattr(module, "MOST_LOGITS", 2 * len(TAILS) * lm.info.geometry["vocab_size"])
        pieces = contexts.score(TAILS, SCORED)
    np.testing.assert_allclose(pieces.nll_B, whole.nll_B, rtol=2e-5)
    assert pieces.right_B.tolist() == whole.right_B.tolist()


@pytest.mark.parametrize("cache", CACHES, ids=lambda c: "none" if c is None else c[0])
def test_generation_is_that_of_the_model_row_by_row(lm: LmModel, cache: tuple[str, dict] | None) -> None:
    """Without tokens behind the context the model's own greedy loop does the same."""
    with applied(lm, cache):
        for context in CONTEXTS:
            ids = torch.tensor([context])
            policy_prompt = lm.greedy(ids, 5)[0].tolist()
            first = policy_prompt[0]
            with read_contexts(lm, [context]) as contexts:
                found = contexts.generate([[first]], 4, frozenset())[0]
            assert [first, *found] == policy_prompt


def test_generation_ends_at_end_tokens_and_when_enough_was_said(lm: LmModel) -> None:
    with read_contexts(lm, CONTEXTS) as contexts:
        tails = [[3], [3], [3]]
        free = contexts.generate(tails, 8, frozenset())
        ended = contexts.generate(tails, 8, frozenset({free[0][3]}))
        enough = contexts.generate(tails, 8, frozenset(), lambda ids: len(ids) >= 2)
    for row, ids in enumerate(free):
        cut = ids.index(free[0][3]) if free[0][3] in ids else len(ids)
        assert ended[row] == ids[:cut]
        assert enough[row] == ids[:2]


def test_a_tail_scored_from_its_first_token_on_starts_at_the_contexts_own_logits(lm: LmModel) -> None:
    context, tail = CONTEXTS[0], TAILS[0]
    with read_contexts(lm, [context]) as contexts:
        found = contexts.score([tail], [len(tail)]).nll_B[0]
        alone = contexts.score([tail[:1]], [1]).nll_B[0]
    expected, _ = one_pass(lm, context, tail, len(tail))
    assert found == pytest.approx(expected, rel=2e-5)
    assert alone == pytest.approx(one_pass(lm, context, tail[:1], 1)[0], rel=2e-5)


def test_what_cannot_be_read_or_scored_is_refused(lm: LmModel) -> None:
    with pytest.raises(ValueError, match="at least one token"), read_contexts(lm, [[1], []]):
        pass
    with read_contexts(lm, [[1, 2]]) as contexts:
        with pytest.raises(ValueError, match="cannot be scored"):
            contexts.score([[3]], [2])
        with pytest.raises(ValueError, match="one length"):
            contexts.generate([[3], [3, 4]], 2, frozenset())


def test_positions_behind_the_last_one_are_padding_only(lm: LmModel) -> None:
    """A model with exactly enough room for the longest row scores all rows as with more room."""
    longest = max(len(c) + len(t) for c, t in zip(CONTEXTS, TAILS, strict=True))
    tight = LmModel(replace(lm.info, geometry={**lm.info.geometry, "positions": longest}), lm.module)
    with read_contexts(tight, CONTEXTS) as contexts:
        found = contexts.score(TAILS, SCORED)
    with read_contexts(lm, CONTEXTS) as contexts:
        np.testing.assert_allclose(found.nll_B, contexts.score(TAILS, SCORED).nll_B, rtol=1e-6)
