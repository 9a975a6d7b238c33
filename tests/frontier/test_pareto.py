"""Raw frontiers against brute force: dominance, hypervolume, probabilities, budgets, SQL."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import isoflop
from isoflop.core.errors import UserError
from isoflop.costs import add_cost, cost_of
from isoflop.frontier import best_under_budget, hypervolume, non_dominated, pareto, sql
from isoflop.frontier.raw import _blocks, _staircase


def brute(points: np.ndarray) -> np.ndarray:
    at_most = (points[:, None] <= points[None]).all(-1)
    smaller = (points[:, None] < points[None]).any(-1)
    return ~(at_most & smaller).any(0)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 4), st.integers(1, 120), st.integers(2, 40), st.integers(0, 10_000))
def test_non_dominated_equals_brute_force_with_ties(k: int, m: int, levels: int, seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, levels, (m, k)).astype(float)
    np.testing.assert_array_equal(non_dominated(points), brute(points))


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("decimals", [1, 8])
def test_the_prefilter_of_large_tables_changes_nothing(k: int, decimals: int) -> None:
    points = np.round(np.random.default_rng(k).standard_normal((60_000, k)), decimals)
    expected = _staircase(points) if k == 2 else _blocks(points)
    np.testing.assert_array_equal(non_dominated(points), expected)


def test_hypervolume_by_hand_and_by_counting() -> None:
    assert hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([3.0, 3.0])) == 3.0
    assert hypervolume(np.array([[4.0, 4.0]]), np.array([3.0, 3.0])) == 0.0
    rng = np.random.default_rng(0)
    for k in (2, 3, 4):
        points = rng.random((25, k))
        front = points[non_dominated(points)]
        cells = rng.random((100_000, k))
        covered = np.mean((front[None] <= cells[:, None]).all(-1).any(1))
        assert hypervolume(front, np.ones(k)) == pytest.approx(covered, abs=0.006)


def rows() -> pa.Table:
    return pa.table(
        {
            "N": [1.0, 2, 4, 8],
            "V": [10.0, 10, 10, 10],
            "error": [0.5, 0.6, 0.3, 0.3],
            "se": [0.01, 0.05, 0.01, 0.01],
            "name": list("abcd"),
        }
    )


def test_pareto_of_a_table() -> None:
    found = pareto(rows(), {"N": "min", "error": "min"})
    assert found.table["name"].to_pylist() == ["a", "c"]
    assert found.rows.tolist() == [0, 2]
    assert pareto(rows(), {"N": "max", "error": "min"}).table["name"].to_pylist() == ["d"]
    formula = pareto(rows(), {"2*N*(50+V)": "min", "error": "min"})
    assert formula.table["name"].to_pylist() == ["a", "c"]
    assert formula.table["2*N*(50+V)"].to_pylist() == [120.0, 480.0]
    assert pareto(rows(), ["error"]).table["name"].to_pylist() == ["c", "d"]
    assert "2 of 4" in str(found)
    assert len(isoflop.plot(found).data) == 1
    assert found.to_dict()["n"] == 4


def test_rows_without_a_value_are_left_out() -> None:
    table = pa.table({"N": [1.0, None, 3.0], "error": [0.5, 0.1, float("nan")]})
    found = pareto(table, ["N", "error"])
    assert (found.rows.tolist(), found.n, found.dropped) == ([0], 1, 2)


def test_probability_of_membership() -> None:
    found = pareto(rows(), ["N", "error"], stderr={"error": "se"}, simulations=2000)
    p = found.probability
    assert p[0] == 1.0  # the cheapest row is always on it
    assert 0.4 < p[3] < 0.6  # as good as the cheaper c: half of the time
    assert 0.01 < p[1] < 0.08  # needs to beat a by two combined standard errors
    assert found.table.column_names[-1] == "pareto_probability"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: pareto(rows(), []), "at least one objective"),
        (lambda: pareto(rows(), {"N": "down"}), "allowed: min, max"),
        (lambda: pareto(rows(), ["M"]), "unknown column 'M'"),
        (lambda: pareto(rows(), ["name"]), "a number is needed"),
        (lambda: pareto(rows(), ["N", "error"], reference={"N": 9}), "lacks 'error'"),
        (lambda: best_under_budget(rows(), "N", "error", [0.5]), "below the cheapest row"),
        (lambda: sql("select nothing from results", rows()), "sql:"),
        (lambda: sql("select * from read_csv('/etc/passwd')", rows()), "sql:"),
        (lambda: cost_of(rows(), "2*N*(Q+V)"), "unknown column in cost 'Q'"),
        (lambda: cost_of(rows(), "N-4"), "a cost must be > 0"),
    ],
)
def test_wrong_calls_say_so_in_one_line(call, words: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_best_row_under_each_budget() -> None:
    found = best_under_budget(rows(), "N", "error", [1, 3, 5, 100])
    assert found["name"].to_pylist() == ["a", "a", "c", "c"]
    formula = best_under_budget(rows(), "2*N", "error", [2, 8])
    assert formula["name"].to_pylist() == ["a", "c"]


def test_sql_and_costs_on_tables() -> None:
    found = sql("select name, N*V as c from results where error < 0.55 order by c desc limit 1", rows())
    assert found.to_pylist() == [{"name": "d", "c": 80.0}]
    priced = add_cost(rows(), "inference", constants={"Q": 50})
    assert priced["cost"].to_pylist() == [120.0, 240.0, 480.0, 960.0]


def test_hypervolume_of_three_objectives_with_ties_equals_slices_by_hand() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        points = rng.integers(0, 5, (int(rng.integers(1, 12)), 3)).astype(float)
        corner = np.full(3, 5.0)
        cells = np.stack(np.meshgrid(*[np.arange(5) + 0.5] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        assert hypervolume(points, corner) == (points[None] <= cells[:, None]).all(-1).any(1).sum()
