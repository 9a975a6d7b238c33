"""Selections of a budget, the controls, DSIR, and the lessons that are cut from what is kept."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pool_cases import pool, target

from isoflop.methods.base import METHODS, build
from isoflop.methods.data_selection.base import DataSelectionMethod, scored, selection_of
from isoflop.methods.data_selection.dsir import SMOOTHING, WORD, DsirScorer
from isoflop.methods.data_selection.probe import documents_of
from isoflop.methods.data_selection.scorers import LengthMatchedScorer, OracleScorer, RandomScorer
from isoflop.methods.data_selection.select import Budget, select
from isoflop.models.worlds.lm_text import Tokens
from isoflop.models.worlds.text_pool import Text, pool_lessons

NAMES = [name for name in METHODS.names() if issubclass(METHODS.get(name), DataSelectionMethod)]
DOCUMENTS = st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 50)), min_size=1, max_size=30)


@given(DOCUMENTS, st.floats(0.0, 1.0), st.sampled_from(["tokens", "documents"]))
def test_kept_is_at_most_the_budget_and_the_next_document_exceeds_it(
    documents: list[tuple[int, int]], fraction: float, unit: str
) -> None:
    scores, tokens = (np.array(column) for column in zip(*documents, strict=True))
    kept = select(scores.astype(float), tokens, Budget(fraction=fraction), unit)
    sizes = tokens if unit == "tokens" else np.ones_like(tokens)
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
    assert kept.tolist() == order[: len(kept)]
    assert sizes[kept].sum() <= fraction * sizes.sum()
    if len(kept) < len(order):
        assert sizes[kept].sum() + sizes[order[len(kept)]] > fraction * sizes.sum()


@given(DOCUMENTS, st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6))
def test_selections_are_nested_as_the_budget_grows(documents: list[tuple[int, int]], fractions: list[float]) -> None:
    scores, tokens = (np.array(column) for column in zip(*documents, strict=True))
    before: list[int] = []
    for fraction in sorted(fractions):
        kept = select(scores.astype(float), tokens, Budget(fraction=fraction)).tolist()
        assert kept[: len(before)] == before
        before = kept
    assert len(select(scores.astype(float), tokens, Budget(fraction=1.0))) == len(documents)


def test_amounts_and_thresholds() -> None:
    scores, tokens = np.array([0.1, 0.5, 0.3, 0.5]), np.array([10, 20, 30, 40])
    assert select(scores, tokens, Budget(amount=60)).tolist() == [1, 3]
    assert select(scores, tokens, Budget(amount=3), "documents").tolist() == [1, 3, 2]
    assert select(scores, tokens, Budget(threshold=0.3)).tolist() == [1, 3]
    with pytest.raises(ValueError, match="one of fraction, amount and threshold"):
        Budget(fraction=0.5, amount=3)
    with pytest.raises(ValueError, match="not finite"):
        select(np.array([np.nan]), np.array([1]), Budget(fraction=1.0))


@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_nested_sets_that_a_seed_gives(name: str) -> None:
    documents, examples = pool(), target(50, 60)
    sets = []
    for keep in (0.1, 0.3, 0.6, 1.0):
        method = build(name, {"keep": keep})
        assert isinstance(method, DataSelectionMethod)
        first, again = (scored(method.scorer(3), documents, examples) for _ in range(2))
        assert (first.scores_N == again.scores_N).all()
        sets.append(set(selection_of(documents, first, keep, "tokens").kept_K.tolist()))
    assert all(a < b for a, b in pairwise(sets))
    assert sets[-1] == set(range(len(documents)))


def test_seconds_are_those_of_the_processor_while_fitting_and_scoring() -> None:
    class Slow(RandomScorer):
        """Works 20 ms in each, and rests."""

        def _toil(self) -> None:
            until = time.process_time() + 0.02
            while time.process_time() < until:
                pass
            time.sleep(0.2)

        def fit(self, pool: Sequence[Text], target: Sequence[Text]) -> None:
            self._toil()

        def score(self, documents: Sequence[Text]) -> np.ndarray:
            self._toil()
            return super().score(documents)

    assert 0.04 <= scored(Slow(0), pool(4), target()).seconds < 0.3


def test_the_oracle_keeps_the_domain_first() -> None:
    documents = pool(10)
    order = np.argsort(-scored(OracleScorer(0), documents, target()).scores_N)
    assert {documents[n].domain for n in order[:10]} == {"code"}
    assert [d.domain for d in documents[:10]] == ["code"] * 10
    assert order[:10].tolist() != list(range(10))


def test_length_matched_documents_have_the_lengths_of_the_reference() -> None:
    documents = [d for domain in ("code", "prose") for d in documents_of(domain, 40, 200, 0)]
    tokens = np.array([d.tokens for d in documents])
    bins = {n: group for group, ns in enumerate(np.array_split(np.argsort(tokens, kind="stable"), 8)) for n in ns}

    wanted = tokens + np.random.default_rng(0).random(len(tokens))  # prefers long ones; no two are equal

    class ByLength(RandomScorer):
        def score(self, documents: object) -> np.ndarray:
            return wanted

    matched = LengthMatchedScorer(ByLength(0), 8, seed=1)
    orders = [np.argsort(-scores, kind="stable") for scores in (wanted, scored(matched, documents, []).scores_N)]
    for count in (10, 20, 40):
        kept = [Counter(bins[n] for n in order[:count]) for order in orders]
        assert kept[0] == kept[1]
    assert set(orders[0][:15].tolist()) != set(orders[1][:15].tolist())


def test_dsir_weights_equal_a_direct_count() -> None:
    """With so many buckets that nothing collides: sums of log ratios of n-gram frequencies."""
    documents, examples = pool(2, 150), target(2, 150)
    scorer = DsirScorer(ngrams=2, buckets=1_000_003)
    result = scored(scorer, documents, examples)

    def grams(text: str) -> Counter[str]:
        words = WORD.findall(text.lower())
        return Counter([*words, *(f"{a} {b}" for a, b in pairwise(words))])

    totals = [sum((grams(d.text) for d in part), Counter[str]()) for part in (examples, documents)]
    wanted, present = ({g: n / sum(t.values()) for g, n in t.items()} for t in totals)
    assert result.work == {"ngrams": totals[0].total() + 2 * totals[1].total()}, (
        "the pool is counted to fit and to score"
    )
    for document, found in zip(documents, result.scores_N, strict=True):
        expected = sum(
            n * (np.log(wanted.get(g, 0.0) + SMOOTHING) - np.log(present[g] + SMOOTHING))
            for g, n in grams(document.text).items()
        )
        assert found == pytest.approx(expected, rel=1e-9)


def test_gumbel_noise_draws_in_proportion_to_the_weights() -> None:
    documents = [document.unlabelled() for document in documents_of("code", 3, 40, 0)]
    weights = np.array([0.6, 0.3, 0.1])
    winners = []
    for seed in range(2000):
        noisy = DsirScorer(buckets=16, seed=seed)
        winners.append(int((np.log(weights) + noisy.score(documents)).argmax()))  # unfitted: the noise alone
    assert np.bincount(winners, minlength=3) / 2000 == pytest.approx(weights, abs=0.04)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3))
def test_every_arm_trains_on_equally_many_tokens(kept: int, steps: int, batch: int, context: int, seed: int) -> None:
    lengths = np.arange(2, 10)
    starts = np.concatenate([[0], lengths.cumsum()])
    tokens = Tokens(np.arange(starts[-1]), np.arange(starts[-1]), starts)
    kept_K = np.sort(np.random.default_rng(seed).permutation(8)[:kept])
    lessons = list(pool_lessons(tokens, kept_K, steps, batch, context, seed))
    inputs = np.concatenate([x.flatten().numpy() for x, _ in lessons])
    targets = np.concatenate([y.flatten().numpy() for _, y in lessons])
    assert len(inputs) == len(targets) == steps * batch * context
    assert (inputs[1:] == targets[:-1]).all()
    allowed = np.concatenate([tokens.ids_N[starts[n] : starts[n + 1]] for n in kept_K])
    seen = np.bincount(inputs, minlength=starts[-1])[allowed]
    assert seen.sum() == len(inputs), "something else was seen"
    assert seen.max() - seen.min() <= 1, "one document was seen more often than another"
