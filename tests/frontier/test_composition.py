"""Joint frontiers of composed sweeps: planted gains, brute force, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.core.errors import UserError
from isoflop.dashboards.outcomes import composition_page
from isoflop.frontier.composition import compose, efficient
from isoflop.ledger.schema import to_table


def row(method: str, cost: float, error: float, repeat: int = 0, knob: int = 0, examples: int = 4) -> dict[str, object]:
    return {
        "job_id": f"{method}{knob}{repeat}{cost}",
        "model": "m",
        "task": "t",
        "method": method,
        "knobs": json.dumps({"k": knob}),
        "repeat": repeat,
        "status": "ok",
        "error": error,
        "scores": [error] * examples,
        "footprint": [("bytes", cost)],
    }


def test_a_combination_that_halves_the_cost_gains_two_with_certainty() -> None:
    rows = [
        row(m, cost, error, repeat)
        for repeat in range(3)
        for m, cost, error in (("none", 100, 0.1), ("a", 60, 0.15), ("b", 50, 0.3), ("a+b", 30, 0.15))
    ]
    found = compose(to_table(rows), "bytes", margins=(0.06, 0.01))
    at_six, at_one = found.gains
    assert (at_six.cost, at_six.alone, at_six.factor, at_six.low, at_six.high) == (30, 60, 2, 2, 2)
    assert math.isnan(at_one.cost)
    assert at_one.alone == 100
    assert math.isnan(at_one.factor)
    assert [c.method for c in found.frontier] == ["a+b", "none"]
    page = composition_page([found])
    assert "| a+b | 0.160 | 30 | 60 | 2.000 [2.000, 2.000] |" in page
    assert "a+b: no configuration within an error of 0.110." in page


def test_what_a_combination_is_made_of_does_not_include_other_methods() -> None:
    rows = [row("none", 100, 0.1), row("c", 1, 0.1), row("a+b", 50, 0.1), row("a+b+c", 0.5, 0.1)]
    gains = {g.method: g for g in compose(to_table(rows), "bytes", margins=(0.01,)).gains}
    assert gains["a+b"].alone == 100  # not 1: c is not part of it
    assert gains["a+b+c"].alone == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_the_frontier_is_that_of_a_brute_force(points: list[tuple[int, int]]) -> None:
    rows = [row("a", cost, error / 20, knob=i) for i, (cost, error) in enumerate(points)]
    found = compose(to_table(rows), "bytes")
    for c in found.configurations:
        beaten = any(
            o.cost <= c.cost and o.error <= c.error and (o.cost < c.cost or o.error < c.error)
            for o in found.configurations
        )
        assert c.efficient is not beaten


def test_a_cheap_configuration_that_is_just_within_the_error_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for repeat in range(3):
        for method, knob, cost, error in (
            ("none", 0, 100, 0.0),
            ("a", 0, 60, 0.0),
            ("a+b", 0, 40, 0.05),
            ("a+b", 1, 80, 0.0),
        ):
            noise = rng.normal(size=200) * 0.1
            scores = error + noise - noise.mean()
            rows.append(row(method, cost, error, repeat, knob) | {"scores": scores.tolist()})
    (gain,) = compose(to_table(rows), "bytes", margins=(0.05,)).gains
    assert (gain.low, gain.high) == (60 / 80, 60 / 40)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=10))
def test_what_is_efficient_in_several_costs_is_beaten_by_nothing(points: list[tuple[int, int, int]]) -> None:
    rows = [
        row("a", x, error / 20, knob=i) | {"footprint": [("bytes", x)], "flops": y}
        for i, (x, y, error) in enumerate(points)
    ]
    found = {json.loads(entry["knobs"])["k"] for entry in efficient(to_table(rows), ("bytes", "flops"))}
    beaten = {
        i
        for i, p in enumerate(points)
        if any(all(a <= b for a, b in zip(q, p, strict=True)) and q != p for q in points)
    }
    assert found == set(range(len(points))) - beaten


def test_an_unknown_cost_is_named() -> None:
    with pytest.raises(UserError, match="'watts'"):
        compose(to_table([row("a", 1, 0.1)]), "watts")
    with pytest.raises(UserError, match="flops is missing in a row of a"):
        compose(to_table([row("a", 1, 0.1)]), "flops")
    with pytest.raises(UserError, match="no finished row"):
        compose(to_table([]), "bytes")


def test_configurations_are_compared_on_the_same_repeats_only() -> None:
    rows = [
        row(m, cost, error, r)
        for m, cost, shift in (("none", 100, 0.0), ("a", 60, 0.02))
        for r, error in enumerate((0.1 + shift, 0.3 + shift, 0.5 + shift))
    ]
    found = compose(to_table([*rows, row("a+b", 30, 0.15, 0)]), "bytes", margins=(0.05,))
    assert [c.method for c in found.configurations] == ["none", "a"]
    assert not found.gains
    assert found.left_out == ['a+b {"k": 0} on m, t']


def test_a_tie_with_the_accepted_error_counts_as_within() -> None:
    def scored(method: str, cost: float, wrong: int) -> dict[str, object]:
        scores = [1.0] * wrong + [0.0] * (100 - wrong)
        return row(method, cost, wrong / 100) | {"scores": scores}

    rows = [scored("none", 100, 15), scored("a", 60, 17), scored("a+b", 30, 17)]
    (gain,) = compose(to_table(rows), "bytes", margins=(0.02,)).gains
    assert (gain.cost, gain.alone) == (30, 60)


def test_the_same_task_with_other_options_is_another_task() -> None:
    rows = [
        row("none", cost, error) | {"job_id": kind, "spec": json.dumps({"task_options": {"pairs": kind}})}
        for kind, cost, error in (("easy", 10, 0.1), ("hard", 30, 0.5))
    ]
    found = compose(to_table(rows), "bytes").configurations
    assert [(c.task, c.cost) for c in found] == [("t pairs=easy", 10), ("t pairs=hard", 30)]


def test_a_repeat_that_stands_twice_is_refused() -> None:
    with pytest.raises(UserError, match="repeat 0 of a on m stands twice"):
        compose(to_table([row("a", 1, 0.1), row("a", 1, 0.1) | {"job_id": "other"}]), "bytes")


def test_a_cost_of_nothing_gives_no_factor() -> None:
    (gain,) = compose(to_table([row("a", 0, 0.1), row("a+b", 0, 0.1)]), "bytes", margins=(0.1,)).gains
    assert math.isnan(gain.factor)
