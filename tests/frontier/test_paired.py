"""Paired comparison of runs: matching, intervals, refusals."""

import json

import numpy as np
import pyarrow as pa
import pytest

from isoflop.core.errors import UserError
from isoflop.frontier.paired import _interval, over_repeats, paired
from isoflop.ledger.schema import to_table


def rows(gain: float, noise: float = 0.3, repeats: int = 3, examples: int = 200) -> pa.Table:
    rng = np.random.default_rng(0)
    found = []
    for repeat in range(repeats):
        for budget in (10.0, 20.0):
            hard = rng.uniform(0.2, 0.8, examples)
            for name, shift in (("old", 0.0), ("new", -gain)):
                scores = hard + shift + noise * rng.normal(size=examples) * 0.1
                found.append(
                    {
                        "job_id": f"{name}{repeat}{budget}",
                        "model": "m",
                        "task": "t",
                        "method": name,
                        "knobs": json.dumps({"budget": budget}),
                        "repeat": repeat,
                        "status": "ok",
                        "error": float(scores.mean()),
                        "scores": scores.tolist(),
                        "footprint": [("kv", budget * (1.02 if name == "new" else 1.0))],
                    }
                )
    return to_table(found)


def test_a_planted_gain_is_found_and_its_interval_covers_it() -> None:
    result = paired(rows(0.02), "method = 'new'", "method = 'old'", {"model": 0, "kv": 0.05})
    assert result.verdict == "better"
    assert result.low <= -0.02 <= result.high
    assert (result.pairs, result.repeats) == (6, 3)
    assert [cell["kv"] for cell in result.cells] == [10.2, 20.4]
    assert result.difference == pytest.approx(result.a - result.b)


def test_no_gain_is_not_separated_and_roles_swap_the_sign() -> None:
    table = rows(0.0)
    result = paired(table, "method = 'new'", "method = 'old'", {"model": 0, "kv": 0.05})
    assert result.verdict == "not separated"
    back = paired(table, "method = 'old'", "method = 'new'", {"model": 0, "kv": 0.05})
    assert back.difference == pytest.approx(-result.difference)


def test_examples_of_one_repeat_pair_exactly() -> None:
    table = rows(0.01, noise=0.0, repeats=1)
    result = paired(table, "method = 'new'", "method = 'old'", {"kv": 0.05})
    # the examples' own spread cancels; what is left is the unseen example's weight, which may differ by as much the other way
    assert result.low == pytest.approx(-0.01, abs=1e-6)
    assert result.high == pytest.approx(-0.01, abs=0.0005)
    assert (result.interval, result.examples, result.verdict) == ("examples", 200, "better")


def one_repeat(tasks: dict[str, tuple[list[float], list[float]]]) -> pa.Table:
    return to_table(
        [
            {"job_id": f"{task}-{name}", "task": task, "model": "m", "method": name, "repeat": 0, "status": "ok",
             "error": float(np.mean(scores)), "scores": scores}
            for task, both in tasks.items()
            for name, scores in zip(("new", "old"), both, strict=True)
        ]
    )  # fmt: skip


SIDES = "method = 'new'", "method = 'old'"


@pytest.mark.parametrize(
    ("differ", "verdict"), [(3, "not separated"), (5, "not separated"), (6, "better"), (12, "better")]
)
def test_right_and_wrong_answers_are_separated_as_by_a_sign_test(differ: int, verdict: str) -> None:
    """A percentile bootstrap says "better" of four examples that differ and agree, which chance gives in an eighth of the cases."""
    wrong = [1.0] * differ + [0.0] * (24 - differ)
    assert paired(one_repeat({"t": ([0.0] * 24, wrong)}), *SIDES).verdict == verdict
    assert paired(one_repeat({"t": (wrong, [0.0] * 24)}), *SIDES).verdict == verdict.replace("better", "worse")


def test_answers_that_all_agree_leave_room_for_those_that_were_not_asked() -> None:
    result = paired(one_repeat({"t": ([0.0] * 24, [0.0] * 24)}), *SIDES)
    bound = 1 - 0.025 ** (1 / 24)  # of a share, where none of 24 was seen
    assert (result.low, result.high) == (pytest.approx(-bound, rel=0.05), pytest.approx(bound, rel=0.05))


def test_intervals_over_examples_cover_what_they_say() -> None:
    """Of right and wrong answers, and of skewed scores, in two tasks of as many examples each."""
    rng, studies = np.random.default_rng(7), 100
    held = np.zeros(2)
    for _ in range(studies):
        easy = [(rng.random((20, 2)) < [0.3, 0.4]).astype(float) for _ in range(2)]
        skewed = [rng.exponential([1.0, 1.5], (20, 2)) for _ in range(2)]
        for place, (blocks, truth) in enumerate(((easy, -0.1), (skewed, -0.5))):
            low, high = _interval(("one", "two"), blocks, seed=0)
            held[place] += low <= truth <= high
    assert (held / studies >= 0.91).all()  # at least 95 %, less two standard errors of 100 studies


def test_single_rows_without_scores_of_examples_separate_nothing() -> None:
    table = to_table([{**row, "scores": None} for row in one_repeat({"t": ([0.0] * 9, [1.0] * 9)}).to_pylist()])
    result = paired(table, *SIDES)
    assert (result.interval, result.verdict, result.examples) == ("unbounded", "not separated", 0)
    assert (
        paired(one_repeat({"t": ([0.0], [1.0])}), *SIDES).verdict == "not separated"
    )  # one example says nothing of chance


def test_nothing_to_pair_and_unknown_columns_are_told() -> None:
    with pytest.raises(UserError, match="nothing to compare: 6 rows"):
        paired(rows(0.0), "method = 'new'", "method = 'old'", ["kv"])
    with pytest.raises(UserError, match="no column 'kvs'"):
        paired(rows(0.0), "method = 'new'", "method = 'old'", {"kvs": 0.1})
    with pytest.raises(UserError, match="Binder Error"):
        paired(rows(0.0), "methods = 'new'", "method = 'old'")


def test_models_are_kept_apart_unless_they_may_differ() -> None:
    table = to_table(
        [{**row, "model": "m" if row["method"] == "old" else "other"} for row in rows(0.02, noise=0.0).to_pylist()]
    )
    sides = "method = 'new'", "method = 'old'"
    with pytest.raises(UserError, match="none agree in task, repeat, model, kv"):
        paired(table, *sides, {"model": 0, "kv": 0.05})
    result = paired(table, *sides, {"model": float("inf"), "kv": 0.05})
    assert (result.pairs, result.difference) == (6, pytest.approx(-0.02, abs=1e-6))
    assert {cell["model"] for cell in result.cells} == {"other"}


def test_intervals_over_few_repeats_cover_what_they_say() -> None:
    """Repeats that differ as much as their examples: 95 % intervals of three hold the true gap in 95 % of studies."""
    rng, studies = np.random.default_rng(5), 2000
    held = 0
    for study in range(studies):
        differences = [(n, shift + rng.normal(0.0, 3.0, 16)) for n, shift in enumerate(rng.normal(0.0, 1.0, 3))]
        low, high = over_repeats(differences)
        held += low <= 0.0 <= high
        if study < 2:  # rows of a ledger give the same
            found = []
            for repeat, gaps in differences:
                for name, scores in (("old", np.zeros(16)), ("new", gaps)):
                    row = {"job_id": f"{name}{repeat}", "task": "t", "model": "m", "method": name, "repeat": repeat}
                    found.append({**row, "status": "ok", "error": float(scores.mean()), "scores": scores.tolist()})
            result = paired(to_table(found), "method = 'new'", "method = 'old'")
            assert (result.low, result.high) == pytest.approx((low, high), rel=1e-5)
    # three standard errors of 2000 studies; a bootstrap over repeats holds it in .80
    assert 0.935 <= held / studies <= 0.965
