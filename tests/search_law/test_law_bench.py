"""``isoflop bench search``: its arithmetic, its input, and a small smoke check with wide margins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from click.testing import CliRunner

from isoflop.bench.search import CASES, best_share, bound, run_case, search
from isoflop.bench.search_results import Saved, Score, digest, finite, share_for, table
from isoflop.bench.search_worlds import Lab, measured_worlds, worlds
from isoflop.core.errors import UserError
from isoflop.search.law import Exponents, LawSampler, OptimalAllocation, Policy, replay


def test_few_well_chosen_flops_beat_random_ones() -> None:
    found = run_case("product-allocation", range(6), ("law", "random"), (0.03,))
    law, random = (found["strategies"][s]["points"][0] for s in ("law", "random"))
    assert law["median"] < 0.8 * random["median"]
    assert law["says_misfit"] < 0.5
    assert all(len(line) <= 80 for line in table(found))
    assert found["ratios"]


def test_no_design_beats_the_bound_and_money_narrows_it() -> None:
    tight, loose = bound("product-frontier", 0.1), bound("product-frontier", 0.03)
    assert tight is not None
    assert loose is not None
    assert loose / tight == pytest.approx(
        np.sqrt(10 / 3), rel=0.02
    )  # variance falls with money while the prior is weak
    assert bound("wrong-additive", 0.1) is None
    assert best_share("wrong-additive", 0.1) is None
    assert best_share("product-frontier", loose) == pytest.approx(0.03, rel=0.01)
    capped = bound("additive-frontier", 100.0)  # hundreds of runs at most, whatever the money
    assert capped is not None
    assert best_share("additive-frontier", 0.5 * capped) == np.inf


def test_saved_scores_are_not_run_again_and_other_code_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    first = run_case("product-allocation", range(2), ("random",), (0.03,), Saved(path))
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    made_up = lines[0].replace(f'"error": {first["strategies"]["random"]["points"][0]["errors"][0]}', '"error": 7.0')
    path.write_text("\n".join([made_up, lines[1]]) + "\n")
    again = run_case("product-allocation", range(3), ("random",), (0.03,), Saved(path))
    assert again["strategies"]["random"]["points"][0]["errors"][0] == 7.0  # read, not run
    assert len(path.read_text().splitlines()) == 3  # one seed was missing
    path.write_text(path.read_text().replace(digest("random"), "0" * 12))
    assert Saved(path).get("product-allocation", "random", 0.03, 0) is None
    assert Saved(path, b"rows of a reference").get("product-allocation", "random", 0.03, 0) is None
    path.write_text("no score\n")
    with pytest.raises(UserError, match="line 1 is no score"):
        Saved(path)


def test_a_score_whose_writing_was_cut_is_run_again_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    kept = Saved(path)
    scores = [Score("case", "random", 0.1, seed, 0.5, 3) for seed in range(3)]
    kept.add(scores[0])
    kept.add(scores[1])
    text = path.read_bytes()
    for end in range(len(text)):
        path.write_bytes(text[:end])
        again = Saved(path)
        again.add(scores[2])
        found = [Saved(path).get("case", "random", 0.1, seed) for seed in range(3)]
        whole = text[:end].count(b"\n")
        assert found == [*scores[:whole], *[None] * (2 - whole), scores[2]]


def test_no_infinity_reaches_json() -> None:
    found = finite({"a": [1.0, np.inf, {"b": float("nan")}], "c": "text"})
    assert found == {"a": [1.0, None, {"b": None}], "c": "text"}


def test_the_table_tells_what_the_best_design_would_need() -> None:
    found = run_case("product-frontier", range(2), ("random",), (0.03,))
    (point,) = found["strategies"]["random"]["points"]
    level = bound("product-frontier", 0.03 * point["best"])
    assert level == pytest.approx(point["rms"], rel=0.01)
    assert f"{point['best']:.3g}" in "\n".join(table(found))


def test_all_strategies_see_the_same_outcomes() -> None:
    world = worlds()["product-frontier"]
    one, two = Lab(world, 3), Lab(world, 3)
    assert [one.run(5), one.run(7), one.run(5)] == [two.run(5), two.run(7), two.run(5)]
    assert Lab(world, 4).run(5) != Lab(world, 3).run(5)
    assert set(CASES) == set(worlds())


def test_shares_are_interpolated_in_logarithms() -> None:
    points = [{"share": 0.01, "rms": 0.4}, {"share": 0.1, "rms": 0.2}, {"share": 1.0, "rms": 0.1}]
    assert share_for(points, 0.2) == pytest.approx(0.1)
    assert share_for(points, 0.2 / np.sqrt(2)) == pytest.approx(np.sqrt(0.1))
    assert share_for(points, 0.5) == 0.01
    assert share_for(points, 0.05) == np.inf


def test_a_measured_reference_takes_the_place_of_a_simulation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"N": n, "V": v, "error": 0.08 + 0.6 * n**-0.25 * v**-0.1 + 0.004 * rng.standard_normal()}
        for n in (1.0, 4.0, 16.0, 64.0)
        for v in (1.0, 8.0, 64.0)
        for _ in range(2)
    ]
    world = measured_worlds(pa.Table.from_pylist(rows))["real-allocation"]
    lab = Lab(world, 0)
    assert len(lab) == 12
    drawn = sorted(lab.run(4) for _ in range(2))
    assert drawn == sorted(r["error"] for r in rows[8:10])
    assert not lab.left(4)
    path = tmp_path / "reference.csv"
    pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    options = ["--reference", str(path), "--only", "real-allocation", "--seeds", "2", "--strategy", "random"]
    shown = CliRunner().invoke(search, options).output
    assert "real-allocation: FLOPs to be within the reference's interval" in shown


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "product"], "unknown case 'product'"),
        (["--reference", "none.csv"], "is no file"),
        (["--reference", "none"], "SWEEP@STORE"),
        (["--only", "wrong-broken", "--strategy", "tpee"], "unknown strategy 'tpee'"),
    ],
)
def test_bad_options_are_named(arguments: list[str], words: str) -> None:
    error = CliRunner().invoke(search, arguments).exception
    assert isinstance(error, UserError)
    assert words in str(error)


def test_too_small_a_reference_is_refused() -> None:
    with pytest.raises(UserError, match="at least 8"):
        measured_worlds(pa.table({"N": [1.0, 2.0], "V": [1.0, 1.0], "error": [0.5, 0.4]}))


def test_a_replay_hands_out_what_the_table_holds() -> None:
    rng = np.random.default_rng(0)
    outcomes = []
    for n in (1e7, 4e7, 1.6e8, 6.4e8):
        for v in (1, 4, 16, 64):
            for _ in range(2):
                y = 0.08 + 0.6 * (n / 1e7) ** -0.25 * v**-0.1 + 0.003 * rng.standard_normal()
                outcomes.append(({"n": n, "v": v}, y))
    configs = [c for c, _ in outcomes[::2]]
    sampler = LawSampler({"N": "n", "V": "v"}, Exponents(), candidates=configs, cost="2*N*(50+V)", seed=0)
    found = replay(sampler, outcomes)
    assert found.runs.num_rows == len(outcomes)  # no width, no budget: everything is run, each outcome once
    assert sorted(found.runs["value"].to_pylist()) == sorted(y for _, y in outcomes)
    assert found.share == pytest.approx(1.0)
    once = LawSampler(
        {"N": "n", "V": "v"},
        OptimalAllocation(budget=1e10, width=0.5),
        candidates=configs,
        cost="2*N*(50+V)",
        policy=Policy(replicates=False),
        seed=0,
    )
    few = replay(once, outcomes)
    assert few.report.stop is not None
    assert few.runs.num_rows <= len(configs)
    assert few.share < 0.5
