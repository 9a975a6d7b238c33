"""``isoflop bench laws``: the law engine against named peers, each pair measured in one run on one core.

Fits are timed in CPU seconds of this process (wall time on an idle core), so that other users of the machine do not count;
the ledger part, where DuckDB and Arrow use several threads, in wall seconds.

Peers: the first seed's own search (random points of its 4-D grid in a Python loop), SciPy's L-BFGS-B from the 4,500 starts of
Hoffmann et al. (Huber on log residuals, summed, analytic gradient, tight tolerances), and pandas on a synthetic ledger.
"""

from __future__ import annotations

import itertools
import json
import resource
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.csv

from isoflop.core.expressions import Array

MAP = {"N": "params_b", "V": "visual_tokens"}
_EXACT_SSE = 3.79380e-4


def bench_laws(
    rows: int = 1_000_000, resamples: int = 4000, scipy_starts: int = 90, scipy_refits: int = 12
) -> dict[str, Any]:
    """Run all parts.

    Args:
        rows: of the synthetic ledger.
        resamples: bootstrap refits of the additive law.
        scipy_starts: starts of the peer that are really run (spread over its 4,500); its time is extrapolated.
        scipy_refits: resamples that the peer refits.
    """
    return {
        "ledger": bench_ledger(rows),
        "published": bench_published(),
        "additive": bench_additive(scipy_starts),
        "bootstrap": bench_bootstrap(resamples, scipy_refits),
    }


def best_time(run: Callable[[], Any], repeats: int = 7, clock: Callable[[], float] = time.perf_counter) -> float:
    """The least time of several runs, after one that warms up, in seconds."""
    run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def bench_published(evaluations: int = 20_000) -> dict[str, Any]:
    """The published table: our fit against the paper's loop over a random fifth of its grid (a million candidates)."""
    from isoflop.laws import Fit, fit

    table = pyarrow.csv.read_csv(files("isoflop.sweeps") / "published" / "inference_optimal_vlms.csv")
    n, v, y = (table[c].to_numpy().astype(float) for c in ("params_b", "visual_tokens", "error"))
    axes = [np.linspace(0.2, 0.7, 50), np.linspace(0, 0.2, 100), np.linspace(0, 0.05, 100), np.linspace(0, 0.3, 10)]
    rng = np.random.default_rng(0)
    picks = np.stack([rng.choice(axis, evaluations) for axis in axes], axis=1)
    sizes, tokens = list(dict.fromkeys(n.tolist())), list(dict.fromkeys(int(t) for t in v))
    scores = {str(size): (1 - y[n == size]).tolist() for size in sizes}
    best = np.inf
    start = time.process_time()
    for params in picks:
        loss = _paper_loss(params, scores, sizes, tokens)
        if loss < best:
            best = loss
    per_evaluation = (time.process_time() - start) / evaluations
    exhaustive = _exhaustive_grid(axes, n, v, y)
    fitted = fit(table, map=MAP, bootstrap=0, profile=False)
    assert isinstance(fitted, Fit)
    ours = best_time(lambda: fit(table, map=MAP, bootstrap=0, profile=False), 30, time.process_time)
    return {
        "ours_ms": 1e3 * ours,
        "ours_sse": fitted.sse,
        "distance_from_exact_optimum": abs(fitted.sse - _EXACT_SSE),
        "paper_loop_us_per_candidate": 1e6 * per_evaluation,
        "paper_loop_s_per_million": 1e6 * per_evaluation,
        "paper_loop_sse_of_sample": best,
        "paper_grid_best_sse": exhaustive,
        "ratio": 1e6 * per_evaluation / ours,
    }


def _paper_law(params: Array, inputs: list[float]) -> float:
    a, alpha, beta, d = params
    n, v = inputs
    return a / n**alpha / v**beta + d


def _paper_loss(params: Array, scores: dict[str, list[float]], sizes: list[float], tokens: list[int]) -> float:
    """Squared error of one candidate as the paper's script computes it: cell by cell, with look-ups (no progress bar)."""
    loss = 0.0
    for n in sizes:
        for v in tokens:
            loss += (_paper_law(params, [n, v]) - (1 - scores[str(n)][tokens.index(v)])) ** 2
    return float(loss)


def _exhaustive_grid(axes: list[Array], n: Array, v: Array, y: Array) -> float:
    """The best value anywhere on the paper's grid: no random fifth of it can do better."""
    best = np.inf
    for alpha in axes[1]:
        shape = n[None] ** -alpha * v[None] ** -axes[2][:, None]
        for a, d in itertools.product(axes[0], axes[3]):
            best = min(best, float(np.min(np.sum((a * shape + d - y) ** 2, axis=1))))
    return best


def additive_table(seed: int = 0, n: int = 240, noise: float = 0.01) -> dict[str, Array]:
    """Synthetic runs: A=480, B=2000, E=1.8, alpha=.35, beta=.365; N in [5e7, 1.6e10], D/N in [2, 200], log-noise."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(np.log(5e7), np.log(1.6e10), n))
    tokens = size * np.exp(rng.uniform(np.log(2), np.log(200), n))
    loss = (1.8 + 480 * size**-0.35 + 2000 * tokens**-0.365) * np.exp(noise * rng.standard_normal(n))
    return {"N": size, "D": tokens, "loss": loss}


class ScipyPeer:
    """Approach 3 with SciPy: parameters (a, b, e, alpha, beta), log-sum-exp, summed Huber terms rescaled by 1/delta^2."""

    def __init__(self, table: dict[str, Array], delta: float = 1e-3, weights: Array | None = None) -> None:
        self.log_n, self.log_d, self.log_l = (np.log(table[k]) for k in ("N", "D", "loss"))
        self.delta, self.w = delta, np.ones_like(self.log_n) if weights is None else weights

    def objective(self, z: Array) -> tuple[float, Array]:
        """Value / delta^2 and its gradient."""
        a, b, e, alpha, beta = z
        t1, t2 = a - alpha * self.log_n, b - beta * self.log_d
        top = np.maximum(np.maximum(t1, t2), e)
        e1, e2, e3 = np.exp(t1 - top), np.exp(t2 - top), np.exp(e - top)
        total = e1 + e2 + e3
        r = top + np.log(total) - self.log_l
        size = np.abs(r)
        value = np.where(size <= self.delta, 0.5 * r * r, self.delta * (size - 0.5 * self.delta))
        psi = self.w * np.clip(r, -self.delta, self.delta) / total
        p1, p2 = psi * e1, psi * e2
        gradient = np.array([p1.sum(), p2.sum(), (psi * e3).sum(), -(p1 @ self.log_n), -(p2 @ self.log_d)])
        scale = 1 / self.delta**2
        return scale * float(self.w @ value), scale * gradient

    def solve(self, start: Array) -> tuple[float, Array]:
        """One L-BFGS-B run with the tight tolerances that the objective needs: (summed Huber loss, parameters)."""
        from scipy.optimize import minimize

        found = minimize(
            self.objective,
            start,
            jac=True,
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 10_000},
        )
        return found.fun * self.delta**2, found.x

    def solve_numeric(self, start: Array) -> tuple[float, Array]:
        """One BFGS run with numerical gradients, as in the replication of 2024 (2404.10102)."""
        from scipy.optimize import minimize

        found = minimize(lambda z: self.objective(z)[0], start, method="BFGS")
        return found.fun * self.delta**2, found.x

    @staticmethod
    def starts() -> Array:
        """The 4,500 starts of Hoffmann et al., (4500, 5)."""
        grid = [
            np.arange(0, 26, 5),
            np.arange(0, 26, 5),
            np.arange(-1, 1.1, 0.5),
            np.arange(0, 2.1, 0.5),
            np.arange(0, 2.1, 0.5),
        ]
        return np.array(list(itertools.product(*grid)), dtype=float)


def bench_additive(scipy_starts: int) -> dict[str, Any]:
    """One global fit of the additive law to 240 points."""
    from isoflop.laws import fit

    table = additive_table()
    peer, starts = ScipyPeer(table), ScipyPeer.starts()
    chosen = starts[np.random.default_rng(0).permutation(len(starts))[:scipy_starts]]
    begin = time.process_time()
    found = min((peer.solve(s) for s in chosen), key=lambda r: r[0])
    per_start = (time.process_time() - begin) / len(chosen)

    def ours() -> Any:
        return fit(table, "chinchilla", y="loss", objective="huber-log", bootstrap=0, profile=False)

    fitted, seconds = ours(), best_time(ours, 5, time.process_time)
    theirs = np.array([np.exp(found[1][2]), np.exp(found[1][0]), np.exp(found[1][1]), found[1][3], found[1][4]])
    return {
        "ours_s": seconds,
        "ours_loss": fitted.loss,
        "ours": {n: fitted[n] for n in fitted.form.names},
        "scipy_starts_run": len(chosen),
        "scipy_s_per_start": per_start,
        "scipy_s_for_4500_starts": 4500 * per_start,
        "scipy_loss": found[0],
        "largest_relative_difference": float(np.max(np.abs(fitted.p / theirs - 1))),
        "ratio": 4500 * per_start / seconds,
    }


def bench_bootstrap(resamples: int, scipy_refits: int, starts: int = 3) -> dict[str, Any]:
    """Bootstrap refits of the additive law: all of ours against a few of the peer's, with equal starts and equal resamples."""
    from isoflop.laws import Fit, fit

    table = additive_table()
    options: dict[str, Any] = {"y": "loss", "objective": "huber-log", "profile": False}
    begin = time.process_time()
    fitted = fit(table, "chinchilla", bootstrap=resamples, **options)
    seconds = time.process_time() - begin
    assert isinstance(fitted, Fit)
    assert fitted.samples is not None
    # the peer gets the same resamples: drawn as fit draws them
    weights = np.random.default_rng([0, 0]).multinomial(240, np.full(240, 1 / 240), size=resamples)
    e, a, b, alpha, beta = fitted.p
    warm = np.array([np.log(a), np.log(b), np.log(e), alpha, beta])
    others = ScipyPeer.starts()[np.random.default_rng(1).permutation(4500)[: scipy_refits * (starts - 1)]].reshape(
        scipy_refits, starts - 1, 5
    )
    begin = time.process_time()
    theirs = []
    for k in range(scipy_refits):
        peer = ScipyPeer(table, weights=weights[k].astype(float))
        theirs.append(min((peer.solve(s) for s in (warm, *others[k])), key=lambda r: r[0]))
    per_refit = (time.process_time() - begin) / scipy_refits
    begin = time.process_time()
    numeric = [ScipyPeer(table, weights=weights[k].astype(float)).solve_numeric(warm) for k in range(scipy_refits)]
    per_numeric = (time.process_time() - begin) / scipy_refits
    estimates = np.array([[np.exp(z[2]), np.exp(z[0]), np.exp(z[1]), z[3], z[4]] for _, z in theirs])
    excess = fitted.samples.loss[:scipy_refits] / np.array([v for v, _ in theirs]) - 1
    return {
        "resamples": resamples,
        "starts_per_resample": starts,
        "ours_s": seconds,
        "ours_ms_per_refit": 1e3 * seconds / resamples,
        "not_converged": fitted.samples.failed,
        "scipy_refits_run": scipy_refits,
        "scipy_ms_per_refit": 1e3 * per_refit,
        "ratio_equal_starts": per_refit / (seconds / resamples),
        "bfgs_numeric_gradient_one_start_ms_per_refit": 1e3 * per_numeric,
        "bfgs_numeric_median_excess_loss": float(
            np.median([v for v, _ in numeric] / fitted.samples.loss[:scipy_refits] - 1)
        ),
        "ratio_bfgs_numeric_one_start": per_numeric / (seconds / resamples),
        "ratio_against_4500_starts": per_refit / starts * 4500 / (seconds / resamples),
        "median_relative_difference": float(np.median(np.abs(fitted.samples.p[:scipy_refits] / estimates - 1))),
        "largest_relative_difference_of_exponents": float(
            np.max(np.abs(fitted.samples.p[:scipy_refits, 3:] / estimates[:, 3:] - 1))
        ),
        "largest_excess_loss_over_scipy": float(np.max(excess)),
    }


def synthetic_ledger(rows: int, seed: int = 0) -> pa.Table:
    """Rows with sizes, tokens, FLOPs, bytes, error and its standard error."""
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(np.log(1e8), np.log(1e11), rows))
    v = np.exp(rng.uniform(0, np.log(2880), rows))
    flops = 2 * n * (50 + v)
    error = 0.05 + 2.6 * n**-0.071 * v**-0.015 + 0.02 * np.abs(rng.standard_normal(rows))
    return pa.table({"N": n, "V": v, "flops": flops, "bytes": n * rng.choice([0.5, 1.0, 2.0], rows), "error": error})


def bench_ledger(rows: int) -> dict[str, Any]:
    """Raw frontier and SQL on a synthetic ledger, against pandas."""
    from isoflop.frontier import pareto, sql

    table = synthetic_ledger(rows)
    text = "select round(log10(N), 1) as size, min(error) as best, count(*) as n from results where V < 100 group by 1 order by 1"
    repeats = 3 if rows <= 2_000_000 else 1
    pair, triple = ["flops", "error"], ["flops", "bytes", "error"]
    out = {
        "rows": rows,
        "pareto_2_s": best_time(lambda: pareto(table, pair), repeats),
        "pareto_2_rows": len(pareto(table, pair)),
        "pareto_3_s": best_time(lambda: pareto(table, triple), 1),
        "pareto_3_rows": len(pareto(table, triple)),
        "sql_s": best_time(lambda: sql(text, table), repeats),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    frame = table.to_pandas()

    def pandas_pareto() -> Any:
        ordered = frame.sort_values(["flops", "error"])
        return ordered[ordered["error"] < ordered["error"].cummin().shift(fill_value=np.inf)]

    def pandas_group() -> Any:
        small = frame[frame["V"] < 100]
        return small.groupby(np.log10(small["N"]).round(1))["error"].agg(["min", "count"])

    out["pandas_pareto_2_s"], out["pandas_group_s"] = best_time(pandas_pareto, 1), best_time(pandas_group, 1)
    out["ratio_pareto_2"], out["ratio_sql"] = (
        out["pandas_pareto_2_s"] / out["pareto_2_s"],
        out["pandas_group_s"] / out["sql_s"],
    )
    return out


@click.command("laws")
@click.option(
    "--rows", type=click.IntRange(1000), default=1_000_000, show_default=True, help="Rows of the synthetic ledger."
)
@click.option("--resamples", type=click.IntRange(10), default=4000, show_default=True, help="Bootstrap refits.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def laws(rows: int, resamples: int, as_json: bool) -> None:
    """Laws, bootstrap, frontiers: ratios against the paper's loop, SciPy and pandas."""
    result = bench_laws(rows, resamples)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for part, values in result.items():
        click.echo(part)
        for name, value in values.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v:.6g}" for k, v in value.items())
            click.echo(f"  {name:48}{value if isinstance(value, (int, str)) else f'{value:.6g}'}")
