"""Pareto fronts and hypervolume: Optuna's numbers against a sum of rectangles, and the report against the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pytest

from isoflop.search.hypervolume import front, history, share

if TYPE_CHECKING:
    from conftest import Reported


def area(points: Sequence[Sequence[float]], reference: tuple[float, float]) -> float:
    """What minimised points dominate below a reference point, by strips from left to right."""
    total, height = 0.0, reference[1]
    for x, y in sorted(map(tuple, points)):
        if x < reference[0] and y < height:
            total += (reference[0] - x) * (height - y)
            height = y
    return total


def undominated(points: Sequence[Sequence[float]]) -> list[int]:
    array = np.asarray(points)
    return [i for i, p in enumerate(array) if not any((q <= p).all() and (q < p).any() for q in array)]


def test_history_is_the_area_that_was_dominated_by_then() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((60, 2)).tolist()
    found = history(points, ["minimize", "minimize"], [0.9, 0.8])
    assert found == pytest.approx([area(points[: i + 1], (0.9, 0.8)) for i in range(60)], abs=1e-12)
    assert found == sorted(found)


def test_directions_turn_objectives_around() -> None:
    points = np.random.default_rng(1).random((30, 2))
    turned = np.column_stack([points[:, 0], -points[:, 1]]).tolist()
    same = history(points.tolist(), ["minimize", "minimize"], [1, 1])
    assert history(turned, ["minimize", "maximize"], [1, -1]) == pytest.approx(same)
    assert front(turned, ["minimize", "maximize"]) == front(points.tolist(), ["minimize", "minimize"])
    assert share(turned, ["minimize", "maximize"]) == pytest.approx(share(points.tolist(), ["minimize", "minimize"]))


def test_optuna_speaks_as_loudly_as_before() -> None:
    before = optuna.logging.get_verbosity()
    try:
        optuna.logging.set_verbosity(optuna.logging.DEBUG)
        front([[1.0, 2.0], [2.0, 1.0]], ["minimize", "minimize"])
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)


def test_front_is_what_no_other_dominates() -> None:
    points = np.random.default_rng(2).integers(0, 6, (40, 2)).astype(float).tolist()  # with ties and doubles
    assert front(points, ["minimize", "minimize"]) == undominated(points)


def test_share_does_not_depend_on_units_and_a_flat_objective_has_none() -> None:
    points = np.random.default_rng(3).random((25, 2))
    found = share(points.tolist(), ["minimize", "minimize"])
    assert found is not None
    assert share((points * [1e9, 1e-3] + [5, -7]).tolist(), ["minimize", "minimize"]) == pytest.approx(found)
    low, high = points.min(axis=0), points.max(axis=0)
    assert found[-1] == pytest.approx(area(((points - low) / (high - low)).tolist(), (1, 1)))
    assert share([[1.0, 2.0], [1.0, 3.0]], ["minimize", "minimize"]) is None
    assert share([[1.0, 2.0]], ["minimize", "minimize"]) is None


def panels(section: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for g in section["groups"] for p in g["panels"]]


def test_front_of_the_report_is_that_of_the_ledger(searched: Reported) -> None:
    rows = [r for r in searched.sweep.results().to_pylist() if r["status"] == "ok"]
    values = [(r["error"], r["flops"]) for r in rows]
    best = {values[i] for i in undominated(values)}
    shown = panels(searched.section("search"))[0]
    series = {s["name"]: {(p["y"], p["x"]) for p in s["points"]} for s in shown["chart"]["series"]}
    assert series["Pareto front"] == best
    assert series["other trials"] == set(values) - best
    assert 0 < len(best) < len(values) == 10
    assert f"{len(best)} of 10 trials" in shown["text"]
    assert (shown["chart"]["x"]["label"], shown["chart"]["x"]["unit"]) == ("flops (minimize)", "FLOPs")


def test_history_of_the_report_ends_where_the_ledger_says(searched: Reported) -> None:
    rows = [r for r in searched.sweep.results().to_pylist() if r["status"] == "ok"]
    values = np.array([(r["error"], np.log10(r["flops"])) for r in rows])
    low, high = values.min(axis=0), values.max(axis=0)
    expected = area(((values - low) / (high - low)).tolist(), (1, 1))
    for panel in panels(searched.section("search"))[1:]:  # of the objectives, and of error and cost: here the same
        heights = [p["y"] for p in panel["chart"]["series"][0]["points"]]
        assert len(heights) == len(rows)
        assert heights[-1] == pytest.approx(expected)
        assert heights == sorted(heights)
        assert [p["x"] for p in panel["chart"]["series"][0]["points"]] == list(range(1, 11))


def test_one_objective_has_the_history_of_error_and_cost(
    lawful: Reported, compared: Reported, failed: Reported
) -> None:
    assert lawful.section("search")["title"] == "Hypervolume"
    for reported, configurations in ((lawful, 16), (compared, 10)):
        (panel,) = panels(reported.section("search"))
        assert len(panel["chart"]["series"][0]["points"]) == configurations
    assert any(line.startswith("Hypervolume: no finished job") for line in failed.data["left_out"])
