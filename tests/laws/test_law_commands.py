"""The command line does what the functions do, on any file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from law_cases import additive_table

from isoflop.cli.frontier import frontier_command
from isoflop.cli.laws import compare_command, fit_command, parse_map, parse_ranges
from isoflop.core.errors import UserError
from isoflop.laws import fit

PUBLISHED = str(Path(__file__).parents[2] / "sweeps" / "published" / "inference_optimal_vlms.csv")


def run(command, *args: str) -> str:
    result = CliRunner().invoke(command, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_fit_on_a_csv_gives_the_papers_law() -> None:
    out = json.loads(
        run(fit_command, PUBLISHED, "--law", "product", "--y", "error", "--map", "N=params_b,V=visual_tokens", "--json")
    )
    assert {"law", "params", "objective", "r2", "n", "status", "derived", "data_hash"} <= set(out)
    assert 0.013 <= out["params"]["beta"]["value"] <= 0.019
    assert 0.065 <= out["params"]["alpha"]["value"] <= 0.09
    assert out["r2"] >= 0.98
    assert out["params"]["E"]["identified"] is False
    assert {"value", "unit", "interval", "identified"} <= set(out["params"]["alpha"])


def test_fit_options_reach_the_engine(tmp_path: Path) -> None:
    table = {**additive_table(0, 100), "family": ["a", "b"] * 50}
    path = tmp_path / "runs.parquet"
    pa.parquet.write_table(pa.table(table), path)
    out = json.loads(
        run(
            fit_command,
            str(path),
            "--law",
            "chinchilla",
            "--y",
            "loss",
            "--map",
            "N=N,D=D",
            "--objective",
            "huber-log",
            "--delta",
            "1e-3",
            "--where",
            "loss < 3.2",
            "--by",
            "family",
            "--bootstrap",
            "0",
            "--json",
        )
    )
    direct = fit(table, "chinchilla", y="loss", objective="huber-log", where="loss < 3.2", by="family", bootstrap=0)
    assert [g["group"] for g in out["groups"]] == [{"family": "a"}, {"family": "b"}]
    assert out["groups"][0]["params"]["alpha"]["value"] == direct["a"]["alpha"]
    assert out["groups"][0]["columns"]["where"] == "loss < 3.2"
    own = json.loads(
        run(
            fit_command,
            str(path),
            "--law",
            "E + A*N**-alpha",
            "--y",
            "loss",
            "--map",
            "N=N",
            "--fix",
            "E=1.5",
            "--bounds",
            "alpha=0:1",
            "--json",
        )
    )
    assert own["params"]["E"]["value"] == 1.5


def test_frontier_on_a_csv() -> None:
    args = (PUBLISHED, "--map", "N=params_b*1e9,V=visual_tokens", "--budget", "1e12", "--json", "--bootstrap", "100")
    optimum = {q: json.loads(run(frontier_command, *args, "--q", str(q)))["points"][0] for q in (0, 50)}
    assert optimum[0]["optimum"]["V"]["value"] == 1
    assert 11 <= optimum[50]["optimum"]["V"]["value"] <= 16
    assert optimum[50]["optimum"]["V"]["interval"][0] < optimum[50]["optimum"]["V"]["value"]
    assert optimum[50]["choice"]["x"] == {"N": 7e9, "V": 16.0}
    assert optimum[50]["closed_form"] is True


def test_compare_on_a_csv_and_human_output_fits_80_columns() -> None:
    args = (PUBLISHED, "--map", "N=params_b,V=visual_tokens")
    out = json.loads(run(compare_command, *args, "--forms", "product,semilog", "--json"))
    assert [f["form"] for f in out["forms"]] == ["semilog", "product", "carry-forward", "nearest + trend"]
    for command in (fit_command, frontier_command):
        text = run(command, *args, "--bootstrap", "50", *(("--q", "50") if command is frontier_command else ()))
        assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize(
    "command, args, words",
    [
        (fit_command, ("nowhere.csv",), "nowhere.csv: no such file"),
        (fit_command, (PUBLISHED, "--map", "N"), "--map: 'N'; allowed: NAME=COLUMN"),
        (fit_command, (PUBLISHED, "--map", "N=params_b,N=score"), "--map: 'N' is given twice"),
        (fit_command, (PUBLISHED, "--bounds", "E=1"), "allowed: E=LOW:HIGH"),
        (fit_command, (PUBLISHED, "--fix", "E=x"), "--fix: 'x' is not a number"),
        (
            frontier_command,
            (PUBLISHED, "--map", "N=params_b*1e9,V=visual_tokens", "--budget", "1,a"),
            "--budget: 'a' is not a number",
        ),
        (
            frontier_command,
            (PUBLISHED, "--map", "N=params_b*1e9,V=visual_tokens", "--budget", "1", "--q", "50"),
            "below the cheapest configuration",
        ),
    ],
)
def test_wrong_use_is_one_line(command, args: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(command, list(args))
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"not parquet")
    result = CliRunner().invoke(fit_command, [str(path)])
    assert "broken.parquet: cannot be read" in str(result.exception)


def test_maps_and_ranges_are_split_outside_parentheses() -> None:
    assert parse_map("N=min(a, b)*2, V=c") == {"N": "min(a, b)*2", "V": "c"}
    assert parse_ranges("alpha=0:1,E=:3", "--bounds") == {"alpha": (0.0, 1.0), "E": (float("-inf"), 3.0)}


def test_bench_reaches_the_peers_optima_on_small_sizes() -> None:
    from isoflop.bench.laws import bench_laws

    out = bench_laws(rows=2000, resamples=20, scipy_starts=6, scipy_refits=3)
    assert out["published"]["distance_from_exact_optimum"] < 1e-8
    assert (
        out["published"]["ours_sse"]
        < out["published"]["paper_grid_best_sse"]
        <= out["published"]["paper_loop_sse_of_sample"]
    )
    assert out["additive"]["ours_loss"] <= out["additive"]["scipy_loss"] * (1 + 1e-9)
    assert out["bootstrap"]["largest_excess_loss_over_scipy"] < 1e-6
    assert out["bootstrap"]["largest_relative_difference_of_exponents"] < 1e-3
    assert out["bootstrap"]["not_converged"] == 0
    assert out["ledger"]["pareto_2_rows"] > 0
    json.dumps(out)
