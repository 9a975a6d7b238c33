"""Rows that share a batch, and what measuring costs runs: no row is lost, little is padding, nothing is run twice for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from isoflop.methods.base import build
from isoflop.methods.kv_cache.probe import untrained_decoder
from isoflop.models import budget
from isoflop.models.budget import tokens_at_once
from isoflop.models.contexts import Contexts, Scores, read_contexts
from isoflop.models.hooks.attention import ATTENTION
from isoflop.models.metering import metered
from isoflop.tasks.data.costs import Priced, _measured, costs_of
from isoflop.tasks.data.language import FREE_PADDING, MOST_MASKED, MOST_PADDING, batches_of, score_tails

RNG = np.random.default_rng(3)


@pytest.mark.parametrize(
    "lengths",
    [
        RNG.integers(20, 400, 60),
        RNG.lognormal(4, 1.5, 80).astype(int) + 1,
        np.full(300, 150),
        np.array([2**15, 5, 5]),
        np.array([7]),
    ],
    ids=["even", "skewed", "equal", "beyond", "one"],
)
def test_batches_hold_every_row_once_and_little_padding(lengths: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = untrained_decoder()
    monkeypatch.setattr(budget, "HOST_BYTES", 2**25)
    kinds = [n % 2 for n in range(len(lengths))]
    batches = list(batches_of(lm, kinds, lengths.tolist()))
    assert sorted(n for batch in batches for n in batch) == list(range(len(lengths)))
    for batch in batches:
        size, real = lengths[batch].max() * len(batch), lengths[batch].sum()
        assert len({kinds[n] for n in batch}) == 1
        assert len(batch) == 1 or size <= tokens_at_once(lm, int(lengths[batch].max()))
        assert size - real <= FREE_PADDING + MOST_PADDING * real
    if len(set(lengths.tolist())) == 1:  # nothing would be padding: as few batches as fit
        room = tokens_at_once(lm, int(lengths[0])) // int(lengths[0])
        assert room > 1 or len(lengths) == 1
        assert len(batches) == sum(-(-kinds.count(kind) // room) for kind in set(kinds))


def test_long_contexts_that_would_need_a_mask_stand_apart() -> None:
    """Hugging Face's own attention masks every pair of tokens where contexts are padded; ours leaves padding out."""
    lm = untrained_decoder()
    lengths = [10, 11, MOST_MASKED + 3, MOST_MASKED + 2, MOST_MASKED + 3]
    arguments = lm, [None] * 5, [n + 5 for n in lengths], lengths
    assert sorted(batches_of(*arguments)) == [[0, 1], [2, 4], [3]]
    with build("full-cache", {}).apply(lm, None):
        assert sorted(map(sorted, batches_of(*arguments))) == [[0, 1], [2, 3, 4]]
    assert sorted(map(sorted, batches_of(*arguments[:3]))) == [[0, 1], [2, 3, 4]]


class Counted(Contexts):
    """Scores a tail by its own numbers, and counts the tokens of the passes."""

    def __init__(self) -> None:
        self.tokens = 0

    def score(self, tails: Sequence[Sequence[int]], scored: Sequence[int]) -> Scores:
        self.tokens += len(tails) * max(map(len, tails))
        values = np.array([sum(tail[-count:]) for tail, count in zip(tails, scored, strict=True)], dtype=float)
        return Scores(values, np.zeros(len(tails)), np.asarray(scored, dtype=float))


def test_options_of_similar_length_are_scored_together() -> None:
    rows = [
        ([RNG.integers(1, 99, n).tolist() for n in RNG.permutation(sizes)], 1)
        for sizes in ([4, 9, 30, 31], [5, 10, 28], [6, 32])
    ]
    counted = Counted()
    found = score_tails(counted, rows)
    assert [[nll for nll, _ in row] for row in found] == [[sum(tail[1:]) for tail in tails] for tails, _ in rows]
    assert counted.tokens == 3 * (6 + 32 + 32 + 32)


@pytest.mark.parametrize("method", ["", "snapkv"])
def test_an_example_is_run_no_more_than_its_costs_need(method: str) -> None:
    """Counted and its cache measured in one pass where a method keeps it; the first is timed, and measured for its peak."""
    lm = untrained_decoder()
    runs: list[int] = []

    def priced(number: int) -> Priced:
        def run(prepared: Any) -> None:
            runs.append(number)
            with read_contexts(lm, [list(range(1, 20 + 10 * number))]) as contexts:
                contexts.score([[1, 2, 3]], [2])

        return Priced(lambda: None, run, 20, 18, 20)

    examples = [priced(n) for n in range(3)]
    if not method:
        costs_of(lm, examples)
    else:
        with build(method, {"keep": 0.5, "window": 4}).apply(lm, None):
            costs_of(lm, examples)
            told = metered(lm, ATTENTION)
            costs_of(lm, examples[:1])
            assert told == metered(lm, ATTENTION)  # of the first example
    measured = 1 if method else 2
    whole = runs[: runs.index(0) + 1] if method else runs
    assert [whole.count(n) for n in (1, 2)] == [measured, measured]
    assert 2 + measured <= runs.count(0) <= (2 if method else 1) * (7 + measured)


@pytest.mark.parametrize(
    ("lengths", "measured"),
    [
        ([1023, 1, 1, 1], [1, 2, 3]),  # the mean is 256.5
        ([300, 300, 200, 200], [0, 1, 2, 3]),
        ([1024, 1024, 1024, 1024], [0]),
        ([3000, 2000, 100, 2900], [1]),  # nothing fits, and 2,000 is the mean
        ([5000, 600, 500, 100], [1]),  # the mean is 1,550
        ([7], [0]),
    ],
)
def test_long_examples_are_measured_where_they_are_most_like_the_mean(lengths: list[int], measured: list[int]) -> None:
    examples = [Priced(len, len, length, place, length) for place, length in enumerate(lengths)]  # type: ignore[arg-type]
    assert [one.context for one in _measured(examples)] == measured
