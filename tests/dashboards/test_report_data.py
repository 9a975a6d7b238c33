"""The report's content: every number is the ledger's or a law's, found here a second way."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pytest

import isoflop
from isoflop.core.errors import UserError
from isoflop.core.numbers import quantity, short, with_interval
from isoflop.dashboards.report import report_data
from isoflop.dashboards.report.measured import STEPS
from isoflop.frontier.paired import paired
from isoflop.search import importance
from isoflop.search.importance import importances
from isoflop.sweep.configs import interval, read_configs
from isoflop.sweep.results import usable

if TYPE_CHECKING:
    from conftest import Reported


def panels(section: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for g in section["groups"] for p in g["panels"]]


def test_numbers_for_people() -> None:
    assert [quantity(3.2443e7, "FLOPs"), quantity(417940, "B"), quantity(0.00279, "s"), quantity(2.5, "×")] == [
        "32.4 MFLOPs", "418 kB", "2.79 ms", "2.5 ×",
    ]  # fmt: skip
    assert [short(v) for v in (0.0, 0.1234, 1234.5, 221568, 1e-7, None, math.nan)] == [
        "0", "0.123", "1,230", "222,000", "1.00e-7", "–", "–",
    ]  # fmt: skip
    assert with_interval(0.2, 0.1, 0.3, "3 repeats") == "0.2 (95 %: 0.1 … 0.3, 3 repeats)"
    assert quantity(999_999.0, "FLOPs") == "1 MFLOPs"


def test_interval_over_repeats_is_students_and_over_one_seed_the_examples() -> None:
    low, high = interval([0.1, 0.2, 0.3], [0.01] * 3)
    assert (low, high) == pytest.approx(
        (max(0, 0.2 - 4.302653 * 0.1 / math.sqrt(3)), 0.2 + 4.302653 * 0.1 / math.sqrt(3)), rel=1e-5
    )
    assert interval([0.5], [0.1]) == pytest.approx((0.5 - 0.1959964, 0.5 + 0.1959964), rel=1e-6)
    assert interval([0.5], [None]) == (None, None)


def test_configurations_are_means_over_repeats(compared: Reported) -> None:
    table = usable(compared.sweep.results())
    configs = read_configs(table)
    assert len(configs) == 10
    assert sorted(j for c in configs for j in c.jobs) == sorted(table["job_id"].to_pylist())
    for c in configs:
        rows = [r for r in table.to_pylist() if r["job_id"] in c.jobs]
        assert {r["method"] for r in rows} == {c.method}
        assert c.error == pytest.approx(np.mean([r["error"] for r in rows]))
        assert c.costs["flops"] == pytest.approx(rows[0]["flops"])
    assert {c.variant for c in configs} == {
        "none",
        "avgpool",
        "uniform-grid",
        "random",
    }  # tokens say how much, not which


def test_measured_slider_states_the_best_row_under_each_budget(compared: Reported) -> None:
    configs = read_configs(usable(compared.sweep.results()))
    group = next(g for g in compared.section("frontier")["groups"] if "compute" in g["name"])
    slider = group["panels"][0]["slider"]
    assert len(slider["states"]) == STEPS
    for state in slider["states"]:
        best = min((c for c in configs if c.costs["flops"] <= state["budget"] * (1 + 1e-9)), key=lambda c: c.error)
        assert state["mark"]["y"] == pytest.approx(best.error)
        assert best.title in state["text"]
        assert short(best.error) in state["text"]
    assert len({s["text"] for s in slider["states"]}) > 2


def test_costs_that_do_not_differ_have_no_frontier(compared: Reported) -> None:
    names = [g["name"] for g in compared.section("frontier")["groups"]]
    assert not any("time" in n or "of the weights" in n for n in names)
    assert any("KV cache" in n for n in names)


def test_law_slider_states_what_the_frontier_says(lawful: Reported) -> None:
    panel = lawful.section("frontier")["groups"][0]["panels"][0]
    assert [s["name"] for s in panel["chart"]["series"]] == ["frontier of the law", "V = 1", "V = 4", "V = 9", "V = 36"]
    for state in panel["slider"]["states"][:: STEPS // 4]:
        point = lawful.sweep.frontier(budget=state["budget"])[0]
        assert state["mark"]["y"] == pytest.approx(point.error.value, rel=1e-9)
        for name, estimate in point.continuous.items():
            assert f"{name} = {short(estimate.value)}" in state["text"]
        assert short(point.discrete[0].error.value) in state["text"]


def test_factor_against_uncompressed_is_a_ratio_of_costs(lawful: Reported) -> None:
    configs = read_configs(usable(lawful.sweep.results()))
    stated = re.search(r"([\d.,]+) × cheaper than .* as good \((\S+), error ([\d.]+);", lawful.data["headline"][0])
    assert stated is not None
    chosen = next(c for c in configs if c.title in lawful.data["headline"][0])
    table = usable(lawful.sweep.results())
    differences = {
        c.model: (
            c,
            paired(table, f"model = '{chosen.model}' AND V = {chosen.V}", f"model = '{c.model}' AND V = 36", ()),
        )
        for c in configs
        if c.V == 36
    }
    cheapest, difference = min(
        (pair for pair in differences.values() if pair[1].verdict != "better"), key=lambda pair: pair[0].costs["flops"]
    )
    assert difference.verdict == "not separated"
    assert stated[2] == cheapest.model
    assert float(stated[1]) == pytest.approx(cheapest.costs["flops"] / chosen.costs["flops"], rel=0.01)
    said = re.search(r"difference to it (\S+) \(95 %: (\S+) … (\S+)\) over 200 paired", lawful.data["headline"][0])
    assert said is not None
    told = [float(x) for x in said.groups()]
    assert told == pytest.approx([difference.difference, difference.low, difference.high], abs=0.02)


def test_iso_cost_curves_cost_the_same_everywhere(lawful: Reported) -> None:
    chart = panels(lawful.section("isoflop"))[0]["chart"]
    lines = [s for s in chart["series"] if s["line"]]
    assert len(lines) == 5
    for line in lines:
        cost = [2 * p["x"] * (2 + float(p["text"].rpartition("= ")[2])) for p in line["points"]]
        assert max(cost) / min(cost) < 1.02  # the text has three digits of V
        fit = lawful.sweep.fit()["reading"]
        middle = line["points"][len(line["points"]) // 2]
        v = float(middle["text"].rpartition("= ")[2])
        assert middle["y"] == pytest.approx(float(fit.predict(N=middle["x"], V=v)), rel=0.01)


def test_held_out_points_come_from_a_fit_that_never_saw_them(lawful: Reported) -> None:
    largest = max(lawful.sweep.results()["N"].to_pylist())
    block = {"y": "error", "objective": "squared-log", "fixed": {"E": 0}, "bootstrap": 0}
    without = isoflop.fit(usable(lawful.sweep.results()), law="product", where=f"N < {largest}", **block)
    chart = panels(lawful.section("predicted"))[0]["chart"]
    inside, held = chart["series"]
    assert (len(inside["points"]), len(held["points"]), held["hollow"]) == (16, 4, True)
    expected = sorted(float(without.predict(N=largest, V=v)) for v in (1, 4, 9, 36))
    assert sorted(p["x"] for p in held["points"]) == pytest.approx(expected, rel=1e-4)


def test_curves_have_a_line_and_points_per_level(lawful: Reported) -> None:
    by_name = {g["name"]: g["panels"][0]["chart"] for g in lawful.section("laws")["groups"]}
    assert set(by_name) == {"product: against N", "product: against V"}
    for chart in by_name.values():
        assert len([s for s in chart["series"] if s["line"]]) == 4
        assert sum(len(s["points"]) for s in chart["series"] if s["dots"]) == 16
        assert chart["x"]["log"]


def test_method_differences_are_paired_on_examples(compared: Reported) -> None:
    panel = panels(compared.section("methods"))[0]
    table = usable(compared.sweep.results())
    best = next(m for m in ("avgpool", "uniform-grid") if m in panel["chart"]["title"])
    rows = {r["label"]: r for r in panel["chart"]["rows"]}
    assert set(rows) == {"avgpool", "uniform-grid", "random"} - {best}
    for method, row in rows.items():
        again = paired(table, f"method = '{method}'", f"method = '{best}'", {"model": 0.0, "ratio": 0.1})
        assert (row["value"], row["low"], row["high"]) == pytest.approx((again.difference, again.low, again.high))
    assert rows["random"]["text"].startswith("worse, 8 pairs")  # one of its nine jobs failed
    assert "none" in panel["text"]  # at ratio 1 there is nothing to pair it with


def test_importance_finds_the_setting_that_matters() -> None:
    points = [{"a": a, "b": b, "c": c, "same": 1} for a in (1, 2, 3, 4) for b in (0.1, 0.2, 0.3) for c in (True, False)]
    shares = importances(points, [10.0 * p["a"] + 0.1 * p["b"] for p in points])
    assert next(iter(shares)) == "a"
    assert shares["a"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) == {"a", "b", "c"}
    assert shares == importances(points, [10.0 * p["a"] + 0.1 * p["b"] for p in points])
    assert importances(points[:5], [1.0, 2.0, 3.0, 4.0, 5.0]) == {}
    assert importances([{"a": i} for i in range(20)], list(range(20))) == {}


def test_a_setting_of_many_names_is_judged_in_seconds() -> None:
    """Optuna alone would take hours: its time doubles with every name."""
    rng = np.random.default_rng(0)
    worth = rng.permutation(24)
    points = [{"model": f"m{i % 24}", "rule": f"r{i // 24 % 3}", "noise": float(rng.random())} for i in range(96)]
    shares = importances(points, [float(worth[i % 24]) + 2.0 * (i // 24 % 3) for i in range(96)])
    assert list(shares)[:2] == ["model", "rule"]
    assert shares["model"] > 0.8
    assert shares["rule"] > 3 * shares["noise"]
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("points", [64, 2000])
def test_of_many_configurations_a_drawn_part_is_judged(points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time grows with the square of what the forest gets. Every second point of this grid has one value of ``on``."""
    judged: list[int] = []
    plain = optuna.importance.get_param_importances
    monkeypatch.setattr(importance, "MOST_ROWS", 32)
    monkeypatch.setattr(
        optuna.importance, "get_param_importances", lambda s, **k: judged.append(len(s.trials)) or plain(s, **k)
    )
    grid = [{"on": i % 2, "size": i // 2 % 8} for i in range(points)]
    shares = importances(grid, [10.0 * p["on"] + 0.01 * p["size"] for p in grid])
    assert shares["on"] > 0.9
    assert judged == [32]


def test_parallel_coordinates_hold_every_configuration(compared: Reported) -> None:
    chart = panels(compared.section("parallel"))[0]["chart"]
    assert len(chart["lines"]) == 10
    assert chart["axes"][0]["name"] == "method"
    assert chart["axes"][-1]["name"] == "error"
    tokens = [a["name"] for a in chart["axes"]].index("tokens")
    assert sum(line["values"][tokens] is None for line in chart["lines"]) == 1  # none has no such knob


def test_sections_that_do_not_apply_say_why(compared: Reported, lawful: Reported) -> None:
    assert "IsoFLOP curves: the sweep asks for no law" in compared.data["left_out"]
    assert "Methods compared: there is one method" in lawful.data["left_out"]
    assert "failures" not in [s["id"] for s in lawful.data["sections"]]


def test_failures_are_counted_and_listed(compared: Reported, failed: Reported) -> None:
    reasons, jobs = panels(compared.section("failures"))
    assert reasons["table"]["rows"][0][:3] == [1, "failed", "RuntimeError"]
    assert len(jobs["table"]["rows"]) == 1
    assert [s["id"] for s in failed.data["sections"]] == ["failures", "provenance"]
    assert failed.data["headline"] == ["No job of this sweep has finished: 2 failed"]


def test_a_sweep_without_rows_is_refused(tmp_path: Any) -> None:
    from report_sweeps import failed_sweep

    failed_sweep(tmp_path)
    for part in (tmp_path / "sweeps" / "failed" / "ledger").rglob("*.parquet"):
        part.unlink()
    with pytest.raises(UserError, match="no results yet"):
        report_data(isoflop.open("failed", store=str(tmp_path)))
