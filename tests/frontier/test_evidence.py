"""Probabilities and intervals against worlds whose truth is known, and what they may say at most."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.frontier.answers import Asked
from isoflop.frontier.evidence import Candidate, gather
from isoflop.frontier.questions import largest_ratio
from isoflop.frontier.speed_up import growing, log_cost_at, speed_up

ASKED = Asked({"task": "t"}, "FLOPs", "FLOPs")


def candidate(name: str, scores: dict[int, object], cost: float = 1.0, **more: object) -> Candidate:
    arrays = {r: np.asarray(s, dtype=float) for r, s in scores.items()}
    errors = {r: float(a.mean()) for r, a in arrays.items()}
    return Candidate(
        name, name.split()[0], name.split()[0], "m", cost, errors, arrays, uncompressed=name == "none", **more
    )


def rows(name: str, errors: list[float], cost: float = 1.0, first: int = 0) -> Candidate:
    method = name.split()[0]
    by_repeat = {first + r: e for r, e in enumerate(errors)}
    return Candidate(name, method, method, "m", cost, by_repeat, uncompressed=name == "none")


# what nothing is known of


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ([candidate("a", {0: [0.0]}), candidate("b", {0: [1.0]})], "one example"),
        ([rows("a", [0.1]), rows("b", [0.9])], "one row per configuration"),
        ([rows("a", [0.1]), rows("b", [0.9], first=1)], "one row per configuration"),
    ],
)
def test_of_one_example_or_one_row_nothing_is_known(candidates: list[Candidate], reason: str) -> None:
    found = gather(candidates)
    assert reason in found.unknown
    assert not found.told


@pytest.mark.parametrize("k", [2, 3, 5, 9])
@pytest.mark.parametrize("rest", [0, 12])
def test_agreement_of_k_examples_is_a_sign_test(k: int, rest: int) -> None:
    """With a flat prior on the share of examples, of those that differ, in which one is better: 1 - 2**-(k+1)."""
    scores = np.r_[np.zeros(k), np.tile([0.0, 1.0], rest // 2)]
    other = np.r_[np.ones(k), np.tile([0.0, 1.0], rest // 2)]
    found = gather([candidate("a", {0: scores}), candidate("b", {0: other})], draws=40_000).best()
    assert found[0] == pytest.approx(1 - 0.5 ** (k + 1), abs=0.01)
    assert found.sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("n", [8, 59, 300])
def test_no_difference_on_n_examples_is_the_rule_of_succession(n: int) -> None:
    """That fewer than a share of examples get worse: 1 - (1 - share)**n, when none of n did."""
    same = np.tile([0.0, 1.0], n)[:n]
    found = gather([candidate("a", {0: same}), candidate("none", {0: same})], draws=40_000)
    assert found.at_most(0, 1, 0.01) == pytest.approx(1 - 0.99**n, abs=0.01)


@pytest.mark.parametrize("repeats", [2, 3, 6])
def test_whole_rows_say_no_more_than_a_sign_test(repeats: int) -> None:
    found = gather([rows("a", [0.1] * repeats), rows("b", [0.2] * repeats)])
    assert found.best()[0] == 1 - 0.5 ** (repeats + 1)
    assert found.at_most(0, 1, 0.0) == 1 - 0.5 ** (repeats + 1)


@pytest.mark.parametrize("unit", [1.0, 0.3, 1e-4])
@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("paired", [True, False])
def test_scores_of_any_kind_say_no_more_than_a_sign_test(n: int, unit: float, paired: bool) -> None:
    """Nearly equal scores of a handful of examples are no evidence that all examples are."""
    scores = np.linspace(1.0, 1.3, n)
    found = gather([candidate("a", {0: scores + 1e-3 * unit}), candidate("none", {0 if paired else 1: scores})])
    most = 1 - 0.5 ** (n + 1)
    assert max(found.at_most(0, 1, margin) for margin in (0.01, 1.0, 100.0)) <= most
    assert found.best().max() <= most
    if n == 2:
        pair = [candidate("none", {0: scores}), candidate("a", {0: scores + 1e-4}, cost=0.5)]
        assert largest_ratio(pair, ASKED, 0.01).values["ratio"] is None


def test_equals_share_and_copies_of_a_repeat_count_once() -> None:
    rng = np.random.default_rng(0)
    scores, worse = (rng.random(50) < 0.2).astype(float), np.ones(50)
    twins = gather([candidate("a", {0: scores}), candidate("b", {0: scores}), candidate("c", {0: worse})])
    np.testing.assert_allclose(twins.best(), [0.5, 0.5, 0], atol=1e-3)
    other = (rng.random(50) < 0.25).astype(float)
    once = gather([candidate("a", {0: scores}), candidate("b", {0: other})])
    copied = gather([candidate("a", dict.fromkeys(range(4), scores)), candidate("b", dict.fromkeys(range(4), other))])
    np.testing.assert_array_equal(once.draws, copied.draws)
    assert copied.told == once.told == "50 paired examples"
    assert "count as one" in copied.notes[0]


def test_only_repeats_and_examples_that_all_have_are_compared() -> None:
    rng = np.random.default_rng(0)
    full = {r: (rng.random(30) < 0.5).astype(float) for r in range(3)}
    some = {r: full[r] for r in (0, 2)}
    found = gather([candidate("a", full), candidate("b", some)])
    assert found.error[0] == np.mean([full[0].mean(), full[2].mean()])
    assert found.told == "30 paired examples in each of 2 repeats"
    assert "only 2 of 3 repeats" in found.notes[0]
    cut = gather([candidate("a", full), candidate("b", {r: s[:20] for r, s in full.items()})])
    assert cut.told == "3 repeats"
    assert "same examples" in cut.notes[0]


def test_one_that_is_far_off_says_nothing_of_the_others() -> None:
    """Fifty that nobody would take left each of three good ones a fiftieth, since an unseen example might have been theirs."""
    rng = np.random.default_rng(2)
    level = rng.normal(1, 0.3, 10)
    good = [level + shift + rng.normal(0, 0.004, 10) for shift in (0.0, 0.003, 0.02)]
    far = [level + 0.4 + 0.2 * rng.random(10) for _ in range(50)]
    alone = gather([candidate(f"m{i}", {0: s}) for i, s in enumerate(good)]).best()
    beside = gather([candidate(f"m{i}", {0: s}) for i, s in enumerate([*good, *far])]).best()
    np.testing.assert_allclose(beside[:3], alone, atol=0.1)  # the fifty have .04 together
    assert beside[3:].max() < 0.01
    assert alone[0] > 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda c: st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=c, max_size=c), min_size=2, max_size=8)
    ),
    st.randoms(use_true_random=False),
)
def test_probabilities_are_probabilities_whatever_the_order(table: list[list[float]], random: object) -> None:
    scores = np.array(table).T
    names = [f"m{i}" for i in range(len(scores))]
    found = gather([candidate(n, {0: s}) for n, s in zip(names, scores, strict=True)], draws=400)
    best = found.best()
    assert (best >= 0).all()
    assert best.sum() <= 1 + 1e-9
    order = list(range(len(scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    again = gather([candidate(names[i], {0: scores[i]}) for i in order], draws=400).best()
    np.testing.assert_allclose(again, best[order], atol=1e-9)
    if len(scores) > 1:
        assert best.max() <= 1 - 0.5 ** (len(table) + 1) + 0.06  # draws are few


# coverage


def paired_world(rng: np.random.Generator, n: int, truth: np.ndarray, kind: str) -> np.ndarray:
    """Scores (n, C) of configurations with these true errors, on examples of varied difficulty."""
    count = len(truth)
    if kind == "binary":
        hard = rng.random((n, 1))
        level = np.where(
            rng.random((n, count)) < 0.5, hard, rng.random((n, count))
        )  # uniform each, and they go together
        return (level < truth).astype(float)
    return rng.normal(0, 0.3, (n, 1)) + truth + rng.normal(0, 0.3, (n, count))


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_probability_of_being_best_is_as_often_right_as_it_says(kind: str) -> None:
    """Over worlds in which any difference is as likely as any other: of statements with probability p, p are right."""
    rng = np.random.default_rng(7)
    said, right = [], []
    for world in range(600):
        truth = rng.uniform(0.1, 0.6, 3)
        scores = paired_world(rng, int(rng.choice([10, 30, 60])), truth, kind)
        said.append(gather([candidate(f"m{i}", {0: s}) for i, s in enumerate(scores.T)], seed=world, draws=300).best())
        right.append(truth == truth.min())
    p, hit = np.concatenate(said), np.concatenate(right)
    for low, high in ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.01)):
        inside = (p >= low) & (p < high)
        assert inside.sum() > 100
        assert hit[inside].mean() == pytest.approx(p[inside].mean(), abs=0.06)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
@pytest.mark.parametrize("n", [5, 50])
def test_of_two_that_are_equal_neither_is_called_best_with_95_percent_more_often_than_one_of_ten(
    kind: str, n: int
) -> None:
    rng = np.random.default_rng(n)
    called = 0
    for world in range(400):
        scores = paired_world(rng, n, np.array([0.3, 0.3]), kind)
        found = gather([candidate(f"m{i}", {0: s}) for i, s in enumerate(scores.T)], seed=world, draws=500)
        called += found.best().max() > 0.95
    assert called <= 40 + 2 * np.sqrt(400 * 0.1 * 0.9)


@pytest.mark.parametrize("kind", ["binary", "continuous", "repeats"])
@pytest.mark.parametrize("n", [6, 40, 200])
def test_a_ratio_that_is_too_large_is_called_sure_in_no_more_than_one_of_twenty(kind: str, n: int) -> None:
    """Every setting of two methods lies just outside the margin: each sure answer is wrong, of both methods together."""
    rng = np.random.default_rng(n)
    wrong, worlds = 0, 240
    margin = 0.05
    for world in range(worlds):
        hard = rng.random(n)
        found = [("none", 1.0, 0.3)] + [(f"{m} {k}", 1 / k, 0.3 + margin + 1e-9) for m in ("a", "b") for k in (2, 4)]
        made = []
        for name, cost, error in found:
            if kind == "continuous":
                made.append(candidate(name, {0: hard + error + rng.normal(0, 0.1, n)}, cost))
            elif kind == "binary":
                mixed = np.where(rng.random(n) < 0.7, hard, rng.random(n))
                made.append(candidate(name, {0: mixed < error}, cost))
            else:
                drift = {r: error + rng.normal(0, 0.02) for r in range(3)}
                made.append(candidate(name, {r: rng.random(n) < e for r, e in drift.items()}, cost))
        answer = largest_ratio(made, Asked({"task": "t"}, "FLOPs", "FLOPs", seed=world), margin)
        wrong += answer.values["ratio"] is not None
    assert wrong <= 0.05 * worlds + 2 * np.sqrt(worlds * 0.05 * 0.95)


@pytest.mark.parametrize(("n", "repeats"), [(40, 1), (300, 1), (60, 3)])
@pytest.mark.parametrize("margin", [0.0, 0.03])
def test_intervals_of_speed_ups_hold_the_truth(n: int, repeats: int, margin: float) -> None:
    """The true curve is a straight line over the logarithm of the cost, so that its speed-up at any error is known."""
    rng = np.random.default_rng(n + repeats)
    keeps = np.array([1.0, 0.5, 0.25, 0.125])
    truth = 0.25 + 0.05 * np.log2(1 / keeps)
    wanted = 2 ** (margin / 0.05)
    inside, worlds = 0, 150
    for world in range(worlds):
        made = []
        examples = {r: rng.random(n) for r in range(repeats)}
        for keep, error in zip(keeps, truth, strict=True):
            scores = {
                r: np.where(rng.random(n) < 0.7, hard, rng.random(n))
                < error + (rng.normal(0, 0.01) if repeats > 1 else 0)
                for r, hard in examples.items()
            }
            made.append(candidate("none" if keep == 1 else f"a {keep}", scores, keep))
        (answer,) = speed_up(made, Asked({"task": "t"}, "FLOPs", "FLOPs", seed=world), margin)
        low, high = answer.values["low"], answer.values["high"]
        inside += low - 1e-9 <= wanted <= high + 1e-9
    assert inside / worlds >= 0.95 - 2 * np.sqrt(0.95 * 0.05 / worlds)


# curves


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_the_growing_series_is_isotonic_regression(values: list[float]) -> None:
    from sklearn.isotonic import IsotonicRegression

    wanted = IsotonicRegression().fit_transform(np.arange(len(values)), np.array(values))
    np.testing.assert_allclose(growing(np.array([values]))[0], wanted, atol=1e-9)


def test_a_curve_is_read_between_its_points_and_not_beyond() -> None:
    costs, errors = np.log([[8.0, 4.0, 1.0]]), np.array([[0.1, 0.2, 0.4]])

    def at(error: float) -> tuple[float, bool]:
        cost, end = log_cost_at(np.array([error]), errors, costs)
        return float(np.exp(cost[0])), bool(end[0])

    assert at(0.05) == (np.inf, False)
    assert at(0.1) == pytest.approx((8.0, False))
    assert at(0.15) == pytest.approx((np.sqrt(32), False))
    assert at(0.3) == pytest.approx((2.0, False))
    assert at(0.4) == pytest.approx((1.0, True))
    assert at(0.9) == pytest.approx((1.0, True))
