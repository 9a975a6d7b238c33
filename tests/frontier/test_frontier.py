"""Law-based frontiers: closed form against numeric search and brute force, discrete menus, intervals, methods."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import isoflop
from isoflop.core.errors import UserError
from isoflop.frontier import Frontiers, compare_methods, extra_compute, frontier
from isoflop.laws import fit
from isoflop.laws.allocation import allocate
from isoflop.laws.result import GroupedFit

SIZES, TOKENS = (0.5e9, 1.8e9, 4e9, 7e9), (1, 4, 16, 36, 64, 144, 576)


def table(alpha: float, beta: float, noise: float = 0.0, scale: float = 0.6, seed: int = 0) -> dict[str, np.ndarray]:
    n, v = (a.ravel() for a in np.meshgrid(SIZES, np.array(TOKENS, dtype=float), indexing="ij"))
    clean = 0.05 + scale * (n / 1e9) ** -alpha * v**-beta
    return {"N": n, "V": v, "error": clean + noise * np.random.default_rng(seed).standard_normal(len(n))}


def exact(alpha: float, beta: float):
    return fit(table(alpha, beta), bootstrap=0, profile=False)


@settings(max_examples=25, deadline=None)
@given(
    alpha=st.floats(0.04, 0.4),
    beta=st.floats(0.01, 0.35),
    q=st.sampled_from([0.0, 5.0, 50.0, 300.0]),
    budget=st.floats(11.5, 14),
)
def test_closed_form_equals_brute_force_over_whole_tokens(alpha: float, beta: float, q: float, budget: float) -> None:
    fitted = exact(alpha, beta)
    point = frontier(fitted, q=q, budget=10**budget)[0]
    v = np.arange(1, 577)
    n = 10**budget / (2 * (q + v))
    best = v[np.argmin(fitted.predict(N=n, V=v))]
    assert abs(point.continuous["V"].value - best) <= 1.0
    assert point.closed_form


def test_the_optimal_tokens_do_not_depend_on_amplitude_floor_or_budget() -> None:
    found = [
        frontier(fit(table(0.2, 0.08, scale=s), bootstrap=0, profile=False), q=50, budget=b)[0].continuous["V"].value
        for s in (0.3, 0.9)
        for b in (1e12, 1e13, 1e14)
    ]
    np.testing.assert_allclose(found, 0.08 * 50 / 0.12, rtol=1e-6)


def test_limits_of_the_closed_form() -> None:
    assert frontier(exact(0.2, 0.08), q=0, budget=1e12)[0].continuous["V"].value == 1
    assert frontier(exact(0.08, 0.2), q=50, budget=1e13)[0].continuous["V"].value == 576
    assert frontier(exact(0.2, 0.08), q=50, budget=1e13, limits={"V": (64, 576)})[0].continuous["V"].value == 64
    point = frontier(exact(0.2, 0.08), q=0, budget=1e12)[0]
    assert any("end of its allowed range" in note for note in point.notes)


def test_closed_form_agrees_with_the_numeric_search() -> None:
    for q in (5, 50, 200):
        point = frontier(exact(0.3, 0.1), q=q, budget=1e13)[0]
        assert point.check < 1e-6
    # the same cost written otherwise, which no formula matches, gives the same optimum
    odd = frontier(exact(0.3, 0.1), cost="2*N*(Q+V) + 1e-9*V", q=50, budget=1e13)[0]
    assert not odd.closed_form
    assert odd.continuous["V"].value == pytest.approx(25.0, rel=1e-5)


def test_chinchilla_frontier_is_the_allocation() -> None:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(1e9, 1e12, 6)))
    fitted = fit(
        {"N": n, "D": d, "loss": 1.8 + 480 * n**-0.35 + 2000 * d**-0.365},
        "chinchilla",
        y="loss",
        bootstrap=0,
        profile=False,
    )
    point = frontier(fitted, cost="6*N*D", budget=1e21)[0]
    best = allocate(fitted, 1e21)
    assert point.continuous["N"].value == pytest.approx(best.N, rel=1e-9)
    assert point.error.value == pytest.approx(best.loss, rel=1e-12)
    assert point.check < 1e-6
    # serving two trillion tokens makes the model smaller
    served = frontier(fitted, cost="6*N*D + 2*N*2e12", budget=1e22)[0]
    assert served.continuous["N"].value < allocate(fitted, 1e22).N


def test_units_of_cost_and_law_agree() -> None:
    data = table(0.2, 0.08)
    billions = {**data, "N": data["N"] / 1e9}
    a = frontier(fit(data, bootstrap=0, profile=False), q=50, budget=1e12)[0]
    b = frontier(fit(billions, map={"N": "N*1e9"}, bootstrap=0, profile=False), q=50, budget=1e12)[0]
    c = frontier(fit(billions, bootstrap=0, profile=False), q=50, budget=1e12 / 1e9)[0]
    assert a.continuous["N"].value == pytest.approx(b.continuous["N"].value, rel=1e-8)
    assert a.continuous["N"].value == pytest.approx(1e9 * c.continuous["N"].value, rel=1e-8)
    assert a.error.value == pytest.approx(c.error.value, rel=1e-8)


def test_discrete_choice_is_the_best_affordable_combination() -> None:
    fitted = exact(0.2, 0.08)
    for budget in np.geomspace(6e10, 8e12, 9):
        best = frontier(fitted, q=50, budget=float(budget))[0].discrete[0]
        brute = min(
            ((float(fitted.predict(N=n, V=v)), n, v) for n in SIZES for v in TOKENS if 2 * n * (50 + v) <= budget),
        )
        assert (best.x["N"], best.x["V"]) == brute[1:]
        assert best.cost <= budget


@given(st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_what_measured_best_is_found_and_speaks_where_the_law_chose_worse(seed: int, repeats: int) -> None:
    parts = [table(0.2, 0.02, noise=0.02, seed=seed + k) for k in range(repeats)]
    rows = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    fitted = fit(rows, bootstrap=0, profile=False)
    cells = {(n, v): rows["error"][(rows["N"] == n) & (rows["V"] == v)] for n in SIZES for v in TOKENS}
    mean = {at: float(np.mean(y)) for at, y in cells.items()}
    noise = math.sqrt(np.mean([np.var(y, ddof=1) for y in cells.values()]) * 2 / repeats) if repeats > 1 else None
    for point in frontier(fitted, q=50, budget=np.geomspace(6e10, 8e12, 6).tolist()):
        least, n, v = min((e, *at) for at, e in mean.items() if 2 * at[0] * (50 + at[1]) <= point.budget)
        m, choice = point.measured, point.discrete[0]
        assert (m.x, m.rows) == ({"N": n, "V": v}, repeats)
        assert m.error == pytest.approx(least)
        assert m.choice_error == pytest.approx(mean[choice.x["N"], choice.x["V"]])
        assert m.noise == (pytest.approx(noise) if noise else None)
        assert point.contradicted == (m.cost <= choice.cost and m.choice_error - least > 2 * (noise or 0.0))
        shown = [line for line in str(frontier(fitted, q=50, budget=point.budget)).splitlines() if "measured:" in line]
        assert bool(shown) == point.contradicted
    assert json.loads(json.dumps(point.to_dict()))["measured_best"]["rows"] == repeats


def test_noise_rarely_contradicts_a_true_law_and_rows_of_no_weight_never() -> None:
    said, asked = 0, 0
    for seed in range(6):
        parts = [table(0.2, 0.08, noise=0.01, seed=10 * seed + k) for k in range(3)]
        rows = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        points = frontier(fit(rows, bootstrap=0, profile=False), q=50, budget=np.geomspace(6e10, 8e12, 7).tolist())
        said, asked = said + sum(p.contradicted for p in points), asked + len(points)
    assert said <= 0.12 * asked  # the best of several is looked for, so that it is more than one in 40
    rows["weight"] = np.ones(len(rows["N"]))
    ghost = {"N": [0.5e9], "V": [1.0], "error": [1e-3], "weight": [0.0]}
    rows = {k: np.concatenate([v, ghost[k]]) for k, v in rows.items()}
    for p in frontier(fit(rows, weights="weight", bootstrap=0, profile=False), q=50):
        assert p.measured.error > 0.05


def test_many_rows_cost_little() -> None:
    rng = np.random.default_rng(0)
    n, v = 10 ** rng.uniform(8, 10, 300), 10 ** rng.uniform(0, 2.5, 300)
    rows = {"N": n, "V": v, "error": 0.05 + 0.6 * (n / 1e9) ** -0.2 * v**-0.08}
    point = frontier(fit(rows, bootstrap=0, profile=False), q=50, budget=1e12)[0]  # a menu of 90,000 configurations
    able = 2 * n * (50 + v) <= 1e12
    assert point.measured.error == pytest.approx(rows["error"][able].min())


def test_a_menu_that_has_not_run_is_not_contradicted() -> None:
    point = frontier(exact(0.2, 0.08), q=50, budget=1e12, sizes=[3e9, 6e9], tokens=[2, 8, 32])[0]
    assert point.measured is None
    assert not point.contradicted


def test_menus_can_be_given() -> None:
    point = frontier(exact(0.2, 0.08), q=50, budget=1e12, sizes=[3e9, 6e9], tokens=[2, 8, 32])[0]
    assert point.discrete[0].x["N"] in (3e9, 6e9)
    assert 2 <= point.continuous["V"].value <= 32


def test_intervals_and_probabilities_come_from_the_bootstrap() -> None:
    fitted = fit(table(0.2, 0.08, noise=0.003), bootstrap=300, profile=False)
    point = frontier(fitted, q=50, budget=1e12)[0]
    low, high = point.continuous["V"].interval
    assert low < point.continuous["V"].value < high
    assert 0 <= point.discrete[0].probability <= 1
    assert sum(c.probability for c in point.discrete) <= 1 + 1e-12
    plain = frontier(fit(table(0.2, 0.08), bootstrap=0, profile=False), q=50, budget=1e12)[0]
    assert plain.error.interval is None


def test_extrapolation_is_said() -> None:
    point = frontier(exact(0.2, 0.08), q=50, budget=1e15)[0]
    assert point.extrapolation["N"] == pytest.approx(math.log10(point.continuous["N"].value / 7e9))
    assert any("an extrapolation" in n for n in point.notes)


def test_results_serialise_print_and_plot() -> None:
    data = {
        k: np.concatenate([table(0.2, 0.08, 0.002)[k], table(0.1, 0.09, 0.002, seed=1)[k]]) for k in ("N", "V", "error")
    }
    grouped = frontier({**data, "task": ["a"] * 28 + ["b"] * 28}, q=50, by="task", bootstrap=50)
    assert isinstance(grouped, Frontiers)
    assert json.loads(json.dumps(grouped.to_dict(), allow_nan=False))["groups"][1]["group"] == {"task": "b"}
    assert grouped.to_arrow().num_rows == 14
    assert all(len(line) <= 80 for line in str(grouped).splitlines())
    assert len(isoflop.plot(grouped).data) == 6
    assert "<table>" in grouped._repr_html_()
    assert isinstance(grouped[0].to_arrow(), pa.Table)


def methods(noise: float = 0.0) -> dict[str, object]:
    """Method b is worse when small and better when large; the laws cross."""
    a, b = table(0.10, 0.05, noise, 0.55, 1), table(0.25, 0.05, noise, 0.62, 2)
    return {**{k: np.concatenate([a[k], b[k]]) for k in a}, "method": ["a"] * 28 + ["b"] * 28}


def test_methods_cross_where_their_laws_do() -> None:
    grouped = fit(methods(), by="method", bootstrap=0, profile=False)
    found = compare_methods(grouped, q=50, budgets=np.geomspace(1e10, 1e14, 60))
    assert (found.best(0), found.best(59)) == ("a", "b")
    crossing = found.crossings[0]
    assert (crossing.below, crossing.above) == ("a", "b")

    def gap(budget: float) -> float:
        points = [frontier(f, q=50, budget=budget, sizes=[1.0], tokens=[1, 576])[0].error.value for f in grouped]
        return points[0] - points[1]

    low, high = crossing.budget.value / 1.05, crossing.budget.value * 1.05
    assert gap(low) * gap(high) < 0
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.to_arrow().num_rows == 120


def test_crossings_have_intervals_and_shares() -> None:
    grouped = fit(methods(0.003), by="method", bootstrap=150, profile=False)
    crossing = compare_methods(grouped, q=50, budgets=np.geomspace(1e10, 1e14, 60)).crossings[0]
    assert crossing.budget.interval[0] < crossing.budget.value < crossing.budget.interval[1]
    assert crossing.share > 0.9
    with pytest.raises(UserError, match="at least two groups"):
        compare_methods(fit({**table(0.2, 0.1), "method": ["a"] * 28}, by="method", bootstrap=0, profile=False))


def test_the_price_of_a_wrong_choice() -> None:
    fitted = exact(0.2, 0.08)
    # at a fixed V the error falls as budget^-alpha, so the price follows from the law alone
    v, q = 576.0, 50.0
    best = 0.08 * q / 0.12
    expected = ((best / v) ** 0.08 * ((q + v) / (q + best)) ** 0.2) ** (1 / 0.2) - 1
    assert extra_compute(fitted, {"V": v}, 1e12, q=q).value == pytest.approx(expected, rel=2e-3)
    assert extra_compute(fitted, {"V": best}, 1e12, q=q).value == pytest.approx(0.0, abs=2e-3)


def test_methods_report_the_extra_compute_of_the_losers() -> None:
    found = compare_methods(fit(methods(), by="method", bootstrap=0, profile=False), q=50, budgets=[1e11, 1e13])
    assert found.extra_compute[found.best(0)][0] == 0
    loser = next(m for m in found.methods if m != found.best(1))
    assert found.extra_compute[loser][1] > 0


def small_models() -> object:
    """20 rows of models that a limit on N can bind."""
    n, v = (a.ravel() for a in np.meshgrid([1e6, 4e6, 16e6, 64e6], [1.0, 4, 9, 16, 36], indexing="ij"))
    return fit({"N": n, "V": v, "error": 0.05 + 3.0 * n**-0.3 * v**-0.1}, bootstrap=0, profile=False)


@pytest.mark.parametrize("q, limits", [(0, (1e5, 1e6)), (50, (1e5, 1e6)), (0, (2e6, 3e6)), (50, (8e6, 2e7))])
def test_a_limit_on_the_size_moves_the_optimum(q: float, limits: tuple[float, float]) -> None:
    fitted, budget = small_models(), 1e9
    point = frontier(fitted, q=q, budget=budget, limits={"N": limits})[0]
    n, v = (a.ravel() for a in np.meshgrid(np.geomspace(*limits, 500), np.geomspace(1, 36, 500)))
    brute = np.min(fitted.predict(N=n, V=v)[2 * n * (q + v) <= budget])
    assert point.error.value == pytest.approx(brute, rel=2e-4)
    assert point.error.value <= brute * (1 + 1e-9)
    assert limits[0] <= point.continuous["N"].value <= limits[1] * (1 + 1e-12)
    assert all(limits[0] <= c.x["N"] <= limits[1] for c in point.discrete)
    assert not any("flat" in note for note in point.notes)


def test_a_budget_that_no_allowed_configuration_meets_is_refused() -> None:
    with pytest.raises(UserError, match=r"no configuration within the limits \(N: 1e\+08 … 1e\+09\)"):
        frontier(small_models(), q=50, budget=1e9, limits={"N": (1e8, 1e9)})
    with pytest.raises(UserError, match="no configuration within the limits"):
        extra_compute(small_models(), {"V": 36}, 1e9, q=50, limits={"N": (1e8, 1e9)})


@pytest.mark.parametrize("options", [{"cost": "1e12/N*V", "budget": 1e12}, {"budget": 1e40, "q": 0}])
def test_a_budget_that_is_never_used_up_is_refused(options: dict) -> None:
    with pytest.raises(UserError, match="does not use it up"):
        frontier(small_models(), **options)


def test_no_budget_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="at least one budget"):
        frontier(small_models(), q=0, budget=[])


def test_a_wrong_choice_under_limits_has_no_negative_price() -> None:
    fitted, limits = small_models(), {"N": (1e5, 1e6)}
    assert extra_compute(fitted, {"V": 36}, 1e9, q=0, limits=limits).value == 0.0
    # N cannot make up for the tokens that are missing
    assert extra_compute(fitted, {"V": 4}, 1e9, q=0, limits=limits).value == math.inf


def test_tables_name_the_rows_they_rest_on() -> None:
    grouped = fit(methods(), by="method", bootstrap=0, profile=False)
    hashes = [f.data_hash for f in grouped]
    found = frontier(grouped, q=50, budget=[1e12, 1e13])
    assert found.to_arrow()["data_hash"].to_pylist() == [hashes[0]] * 2 + [hashes[1]] * 2
    assert hashes[0] not in found[0]._repr_html_()
    law = json.loads(grouped.to_arrow().schema.metadata[b"isoflop.law"])
    reloaded = GroupedFit.from_dict(law)
    assert [f.data_hash for f in reloaded] == hashes
    np.testing.assert_array_equal(reloaded["b"].p, grouped["b"].p)


def test_a_ranking_says_when_overhead_is_not_in_the_cost() -> None:
    grouped = fit(methods(), by="method", bootstrap=0, profile=False)
    found = compare_methods(grouped, q=50, budgets=[1e11, 1e13])
    assert "compute that a compressor itself needs is not in it" in found.notes[0]
    assert found.to_dict()["notes"] == found.notes
    assert "! every method is charged 2*N*(Q+V)" in str(found)
    # charged for its own compute, the method that was best there is best no more
    charged = compare_methods(grouped, q=50, budgets=[1e11, 1e13], costs={"b": "2*N*(Q+V)*1000"})
    assert (found.best(1), charged.best(1)) == ("b", "a")
    assert charged.notes == []
