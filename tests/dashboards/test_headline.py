"""What a report recommends: by all that was measured, and never what something cheaper was measured to beat."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from report_sweeps import store_of

from isoflop.cli import cli
from isoflop.core.numbers import quantity
from isoflop.dashboards.report import lawful
from isoflop.dashboards.report.savings import Pairing
from isoflop.jobs import Job, Outcome, ResolvedJob
from isoflop.sweep.api import SweepResults
from isoflop.sweep.configs import read_configs
from isoflop.sweep.measured_cost import MEASURED, PLAIN
from isoflop.sweep.results import usable

TOWER = 3.66e6
TOKENS = [1, 4, 9, 36]


def swept(folder: Path, seed: int, cost: str | None, beta: float = 0.1, noise: float = 0.15) -> SweepResults:
    """Four sizes by four token counts around a law, with a vision tower that costs the same whatever they are."""
    rng = np.random.default_rng(seed)

    def outcome(job: Job) -> Outcome:
        size, tokens = ResolvedJob.of(job).info.n_params, float(job.knobs()["tokens"])
        error = min(0.95, 0.5 * (size / 14_000) ** -0.25 * tokens**-beta * float(np.exp(rng.normal(0, noise))))
        scores = (rng.permutation(200) < round(200 * error)).astype(float).tolist()
        llm = 1.1 * 2 * size * (tokens + 2)
        axes = {"N": size, "V": tokens, "Q": 2.0, "ratio": 36 / tokens}
        costs = {"flops": TOWER + llm, "flops_llm": llm, "flops_vision": TOWER}
        return Outcome("ok", errors=scores, shard_sizes=[200], axes=axes, footprint=costs, seconds=1.0)

    frontier = {"law": "product"} | ({} if cost is None else {"cost": cost})
    law = {"law": "product", "by": ["task"], "objective": "squared-log", "fixed": {"E": 0}, "bootstrap": 0}
    spec: dict[str, Any] = {
        "name": "s",
        "models": ["tiny-llava/d24", "tiny-llava/d32", "tiny-llava/d48", "tiny-llava/d96"],
        "methods": [{"avgpool": {"tokens": TOKENS}}],
        "tasks": ["reading"],
        "laws": [law],
        "frontiers": [frontier],
    }
    return store_of(folder, spec, outcome)


def headline_of(sweep: SweepResults) -> str:
    table = usable(sweep.results())
    (text,) = lawful.headline(lawful.pairs(sweep.findings()), read_configs(table), Pairing(table))
    return text


@pytest.mark.parametrize(("seed", "cost"), [(0, None), (1, None), (2, PLAIN), (3, PLAIN)])
def test_nothing_cheaper_was_measured_to_be_better_than_what_is_recommended(
    seed: int, cost: str | None, tmp_path: Path
) -> None:
    sweep = swept(tmp_path, seed, cost)
    headline = headline_of(sweep)
    configs = read_configs(usable(sweep.results()))
    recommended = headline.partition("; the law would take")[0]
    (chosen,) = [c for c in configs if f", {c.title}, " in recommended]
    beaten = [c for c in configs if c.costs["flops"] <= chosen.costs["flops"] and c.error < chosen.error]
    assert not beaten
    assert f"at {quantity(chosen.costs['flops'], 'FLOPs')} per answer (all measured FLOPs)" in headline
    assert "but measured" not in headline
    if "the law would take" in headline:  # measured is the headline; the law's own choice is worse, and no cheaper
        (law,) = [c for c in configs if c.title in headline.partition("; the law would take")[2]]
        assert law.error > chosen.error
        assert law.costs["flops"] >= chosen.costs["flops"]
        assert "by the law" not in recommended
    saved = re.search(r"([\d.]+) × cheaper than the cheapest uncompressed model that is as good \(([^,]+),", headline)
    if saved:
        (dense,) = [c for c in configs if c.uncompressed and c.model == saved[2]]
        assert float(saved[1]) == pytest.approx(dense.costs["flops"] / chosen.costs["flops"], rel=0.01)


def test_where_measured_beats_the_law_it_is_the_headline_and_the_slider(tmp_path: Path) -> None:
    clean, noisy = swept(tmp_path / "clean", 0, None, noise=0.0), swept(tmp_path / "noisy", 0, None)
    assert "the law would take" not in headline_of(clean)
    assert "the law would take" in headline_of(noisy)
    table = usable(noisy.results())
    configs, pairing = read_configs(table), Pairing(table)
    ((_, line),) = lawful.pairs(noisy.findings())
    texts = [lawful.at_hand(p, line, configs, pairing) for p in line.points[::8]]
    assert any(text.startswith("Best of those swept, as measured: ") for text in texts)
    assert not any("but measured" in text for text in texts)


def test_the_default_cost_is_all_that_was_measured_and_another_is_named(tmp_path: Path) -> None:
    sweep = swept(tmp_path, 0, None)
    drawn = sweep.frontier()
    assert drawn.cost == MEASURED["N", "Q", "V"]
    assert drawn.constants["fixed"] == pytest.approx(TOWER, rel=1e-6)
    assert drawn.constants["scale"] == pytest.approx(1.1, rel=1e-6)
    flops = sweep.results(["flops"])["flops"].to_pylist()
    assert (drawn[0].budget, drawn[len(drawn) - 1].budget) == pytest.approx((min(flops), max(flops)))
    assert drawn.cost_note.startswith("cost: all measured FLOPs of an answer, fitted within")
    text = CliRunner().invoke(cli, ["show", "s", "--store", str(tmp_path)]).output
    assert "cost fixed + scale*2*N*(Q+V)" in " ".join(text.split())
    asked = sweep.frontier(cost=PLAIN)
    assert (asked.cost, asked.cost_note) == (PLAIN, "")
    assert asked[len(asked) - 1].budget < max(flops)


def test_rows_without_flops_fall_back_to_the_named_formula(tmp_path: Path) -> None:
    sweep = swept(tmp_path, 0, None)
    table = sweep.results()
    blank = table.set_column(table.schema.get_field_index("flops"), "flops", [[None] * table.num_rows]).cast(
        table.schema
    )
    sweep.results = lambda *a, **k: blank  # type: ignore[method-assign]
    drawn = sweep.frontier()
    assert drawn.cost == PLAIN
    assert "the rows know no FLOPs" in drawn.cost_note


def test_where_the_law_misses_its_own_choice_a_line_says_so(tmp_path: Path) -> None:
    """A law of both variables on errors that hardly depend on the tokens but for one column."""
    sweep = swept(tmp_path, 3, None, beta=0.6, noise=0.3)
    points = sweep.frontier().points
    missed = [p for p in points if p.missed is not None]
    assert missed
    out = " ".join(CliRunner().invoke(cli, ["show", "s", "--store", str(tmp_path)]).output.split())
    for p in missed:
        best = p.discrete[0]
        assert abs(best.error.value - p.missed) > 0.1 * p.missed
        assert f"the law says {best.error.value:.3g}, measured {p.missed:.3g}" in out
    for p in points:
        assert p.to_dict()["choice_measured"] == p.choice_measured
