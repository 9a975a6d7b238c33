"""``isoflop bench search``: how many FLOPs it takes to know an answer, for every way of choosing runs.

All strategies of a case draw on the same simulated study (:mod:`isoflop.bench.search_worlds`): the same candidates, budgets
and noise, repeats allowed to all. Their rows are judged by one estimator, the belief that ``LawSampler`` itself uses. The
law sampler pays for its check run, which is kept out of its fits.

* ``grid``: every candidate once. ``random``, ``qmc``, ``tpe``, ``gp``: Optuna's samplers, TPE and GP minimising the error;
  what exceeds the money left is skipped. ``halving``: successive halving over sizes. ``d-optimal``: the planner with the
  volume of the parameters for its target.
* ``best*``: what the best design would need for a row's error (:func:`bound`), over what the row spent. A goal below it is
  out of reach for any way of choosing runs.
* error of a seed: root mean square over the target's quantities (logarithms, so relative errors). Reported: the median over
  seeds with a 95 % bootstrap interval, and the root mean square over seeds, from which FLOP ratios are interpolated.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from isoflop.bench.search_asks import bench_ask
from isoflop.bench.search_results import Saved, Score, finite, share_for, summarise, table
from isoflop.bench.search_strategies import CAP, Outcome, strategy_of
from isoflop.bench.search_worlds import Lab, World, measured_worlds, truth_of, worlds
from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array
from isoflop.search.law import Policy
from isoflop.search.law.belief import Belief
from isoflop.search.law.best_method import BestMethod
from isoflop.search.law.contenders import make_blocks, make_contender
from isoflop.search.law.design import Linear, best_counts
from isoflop.search.law.hypotheses import Hypothesis
from isoflop.search.law.mapfit import map_fit, search_starts
from isoflop.search.law.planner import Planner
from isoflop.search.law.rows import Row, RowTable
from isoflop.search.law.targets import Setting


@dataclass(frozen=True)
class Case:
    """Which strategies meet on a world, at which shares of the full grid's cost; ``more`` shares are ours alone.

    Without a smaller share than the peers' one could not tell how much less the law sampler needs for their errors.
    """

    world: str
    strategies: tuple[str, ...]
    shares: tuple[float, ...]
    goal: str
    more: tuple[float, ...] = ()

    def shares_of(self, strategy: str) -> tuple[float, ...]:
        """Where a strategy is run: the grid only whole; the law sampler not beyond what settles its goal."""
        if strategy == "grid":
            return (1.0,)
        if strategy == "law" and self.world == "product-allocation":
            return tuple(s for s in self.shares if s <= 0.05)
        return tuple(sorted({*self.shares, *self.more})) if strategy == "law" else self.shares


_REAL: dict[str, World] = {}  # of the reference that this process was given
_LEAST = 1e-3  # relative half-width of a reference that counts as exact
_OPTUNA = ("random", "qmc", "tpe", "gp")
CASES = {
    c.world: c
    for c in (
        Case(
            "product-allocation", ("grid", "random", "law"), (0.01, 0.02, 0.05, 0.2, 1.0), "≤ 1/10 of the grid's FLOPs"
        ),
        Case("product-frontier", (*_OPTUNA, "law"), (0.03, 0.1), "≤ 1/5 of the best's FLOPs", (0.01,)),
        Case("additive-frontier", (*_OPTUNA, "law"), (0.03, 0.1), "≤ 1/5 of the best's FLOPs", (0.01,)),
        Case("extrapolation", (*_OPTUNA, "d-optimal", "law"), (0.03, 0.1), "≤ 1/2 of D-optimal's FLOPs", (0.01,)),
        Case(
            "best-of-four",
            ("tpe", "gp", "halving", "law"),
            (0.1, 0.2, 0.4, 1.0),
            "right in 95 % at ≤ 1/3 of the FLOPs",
            (0.05, 0.15),
        ),
        Case("wrong-broken", ("random", "law"), (0.05, 0.1, 0.3), "≤ 1.1 of random's error; verdict says so"),
        Case("wrong-saturating", ("random", "law"), (0.05, 0.1, 0.3), "≤ 1.1 of random's error; verdict says so"),
        Case("wrong-additive", ("random", "law"), (0.05, 0.1, 0.3), "≤ 1.1 of random's error; verdict says so"),
    )
}


@lru_cache(maxsize=32)
def _question(name: str) -> tuple[World, Any, Array, tuple[float, ...]]:
    world = find_world(name)
    lab = Lab(world, 0)
    low, high = lab.x.min(axis=0), lab.x.max(axis=0)
    bound = world.target.bind(Setting(world.axes, tuple(map(float, low)), tuple(map(float, high)), world.groups))
    scales = tuple(float(math.sqrt(a * b)) for a, b in zip(low, high, strict=True))
    if world.measured is None:
        return world, bound, truth_of(world, bound), scales
    rows = [(i, y) for i, ys in enumerate(world.measured.outcomes) for y in ys]
    return world, bound, target_of(fitted(world, lab, rows, scales), bound), scales


def find_world(name: str) -> World:
    """A simulated world, or one of the reference."""
    return _REAL[name] if name in _REAL else worlds()[name]


def estimate(world: World, lab: Lab, rows: Sequence[tuple[int, float]]) -> Array | None:
    """The target from rows alone, the same way for every strategy; None with fewer than three."""
    _, bound, _, scales = _question(world.name)
    if len(rows) < 3:
        return None
    return target_of(fitted(world, lab, rows, scales), bound)


def fitted(world: World, lab: Lab, rows: Sequence[tuple[int, float]], scales: tuple[float, ...]) -> Belief:
    """The belief after some rows, fitted from nothing."""
    contenders = [make_contender(law, world.axes) for law in world.laws]
    belief = Belief(contenders, world.axes, scales, len(world.groups), [world.share] * len(contenders))
    table = RowTable()
    table.extend([Row(tuple(lab.x[i]), int(lab.group[i]), y, math.nan, float(lab.cost[i])) for i, y in rows])
    for _ in range(2):  # the second time with what the first learnt of the noise
        belief.update(table)
    return belief


def target_of(belief: Belief, bound: Any) -> Array:
    """The target's mean over hypotheses at their modes (T,)."""
    values = np.stack([bound.values(h, h.u[None])[0] for h in belief.hypotheses])
    return np.asarray(np.array([h.weight for h in belief.hypotheses]) @ values)


def reference_half_width(name: str) -> float:
    """Half the 95 % interval of the widest quantity, from all rows of the reference."""
    world, bound, _, scales = _question(name)
    assert world.measured is not None
    lab = Lab(world, 0)
    rows = [(i, y) for i, ys in enumerate(world.measured.outcomes) for y in ys]
    planner = Planner(fitted(world, lab, rows, scales), bound, Policy(), None, np.random.default_rng(0))
    low, high = (np.quantile(planner.draws()[0], q, axis=0) for q in (0.025, 0.975))
    return float(np.max(0.5 * (high - low)))


def error_of(world: World, lab: Lab, out: Outcome) -> float:
    """Root mean square error of the target; for the best method 0 (right) or 1 (wrong)."""
    _, _, truth, _ = _question(world.name)
    guess = estimate(world, lab, out.rows)
    if isinstance(world.target, BestMethod):  # peers choose the method of the best value that they have seen
        pick = out.pick if out.fits is None else None if guess is None else int(np.argmin(guess))
        if out.fits is None and pick is None and out.rows:
            pick = _best_seen(lab, out.rows)
        return float(pick != int(np.argmin(truth)))
    return math.inf if guess is None else float(np.sqrt(np.mean((guess - truth) ** 2)))


def _best_seen(lab: Lab, rows: Sequence[tuple[int, float]]) -> int:
    """The method of the candidate with the least mean."""
    seen: dict[int, list[float]] = {}
    for i, y in rows:
        seen.setdefault(i, []).append(y)
    return int(lab.group[min(seen, key=lambda i: float(np.mean(seen[i])))])


@lru_cache(maxsize=32)
def _ideal(name: str) -> tuple[Linear, Array] | None:
    """The law linearised at its true parameters with the true noise, and costs as shares of the full grid's.

    None where the truth is no contender, and for choices between methods.
    """
    world, question, _, scales = _question(name)
    if name.startswith("wrong") or world.measured is not None or isinstance(world.target, BestMethod):
        return None
    lab = Lab(world, 0)
    y = world.truth(lab.x, lab.group)
    blocks = make_blocks(make_contender(world.laws[0], world.axes), world.axes, scales, 1, (), float(np.median(y)))
    start = np.concatenate(
        [blocks[0].prior_mean[None], search_starts(blocks[0], lab.x, lab.group, y, np.ones(len(y)), 6)]
    )
    u, loss = map_fit(blocks[0], lab.x, lab.group, y, np.full(len(y), 1e6), start, 200, 1e-12)
    h = Hypothesis("truth", 0, blocks, u[int(np.argmin(loss))])
    steps = 1e-4 * np.eye(len(h.u))
    slope = (question.values(h, h.u + steps) - question.values(h, h.u - steps)).T / 2e-4
    white = h.jacobian(lab.x, lab.group) / world.sd(lab.x, lab.group)[:, None]
    linear = Linear(1.0, np.diag(h.prior_sd**-2.0), white[:, None], slope / math.sqrt(len(slope)))
    return linear, lab.cost / lab.total


def bound(name: str, share: float) -> float | None:
    """The least standard error (root mean square over quantities) that any design within the limits can have.

    A law linearised at the true parameters, with known noise, known parameters to design by, fractions of runs, and no
    check: what a sequential search cannot do. A fit's error can be a little smaller where rows are few and the prior tells.
    """
    ideal = _ideal(name)
    if ideal is None:
        return None
    linear, cost = ideal
    n = best_counts([linear], np.stack([cost / share, np.full(len(cost), 1 / CAP)]), rounds=400, prune=False)
    return math.sqrt(linear.variance(n))


def best_share(name: str, level: float) -> float | None:
    """The least share at which some design has an error of at most ``level``, by bisection; inf when the cap forbids it."""
    if _ideal(name) is None:
        return None
    low, high = math.log(1e-5), math.log(10.0)
    if (least := bound(name, math.exp(high))) is None or least > level:
        return math.inf
    for _ in range(16):
        middle = 0.5 * (low + high)
        error = bound(name, math.exp(middle))
        assert error is not None
        low, high = (low, middle) if error <= level else (middle, high)
    return math.exp(high)


def run_case(
    name: str,
    seeds: Sequence[int],
    strategies: Sequence[str] = (),
    shares: Sequence[float] = (),
    saved: Saved | None = None,
) -> dict[str, Any]:
    """All strategies of one case; errors per share and seed, their summaries, and the ratios that the goal is about."""
    case = CASES[name] if not shares else replace(CASES[name], shares=tuple(shares))
    saved = Saved(None) if saved is None else saved
    out: dict[str, Any] = {"case": name, "goal": case.goal, "strategies": {}}
    for strategy in strategies or case.strategies:
        points = []
        for share in case.shares_of(strategy):
            scores = [_score(name, strategy, share, seed, saved) for seed in seeds]
            points.append(_with_best(name, summarise(share, scores)))
        out["strategies"][strategy] = {"points": points}
    out["ratios"] = ratios(case, out["strategies"])
    return out


def _score(name: str, strategy: str, share: float, seed: int, saved: Saved) -> Score:
    if (old := saved.get(name, strategy, share, seed)) is not None:
        return old
    world = find_world(name)
    lab = Lab(world, seed)
    found = strategy_of(strategy)(lab, share * lab.total, seed)
    score = Score(name, strategy, share, seed, error_of(world, lab, found), len(found.rows), found.fits)
    saved.add(score)
    return score


def _with_best(name: str, point: dict[str, Any]) -> dict[str, Any]:
    """``best``: the FLOPs that the best design needs for the point's error, over the point's."""
    least = best_share(name, point["rms"]) if math.isfinite(point["rms"]) else None
    return point if least is None else {**point, "best": least / point["share"]}


def ratios(case: Case, found: dict[str, Any]) -> dict[str, float]:
    """FLOPs of the law sampler over a peer's at the peer's own error; for wrong forms, errors at equal FLOPs."""
    if "law" not in found:
        return {}
    ours = found["law"]["points"]
    out: dict[str, float] = {}
    if case.world in _REAL:
        level = max(reference_half_width(case.world), _LEAST)  # an optimum on a limit has no width
        return {
            f"share until ± {level:.3f}, {name}": share_for(f["points"], level, "median") for name, f in found.items()
        }
    for name, peer in found.items():
        if name == "law":
            continue
        if case.world.startswith("wrong"):
            for mine, theirs in zip(ours, peer["points"], strict=True):
                at = f"error / {name} at {theirs['share']:g}"
                out |= {f"rms {at}": mine["rms"] / theirs["rms"], f"median {at}": mine["median"] / theirs["median"]}
        elif case.world == "best-of-four":
            level = 0.05 + 1e-9
            own, other = share_for(ours, level, "mean"), share_for(peer["points"], level, "mean")
            top = peer["points"][-1]["share"]
            reached = math.isfinite(other)
            label = f"FLOPs / {name} for 95 % right" + ("" if reached else ", which it never is: at most")
            out[label] = own / (other if reached else top)
        else:
            for p in peer["points"]:
                label = f"FLOPs / {name} at its error {p['rms']:.4f} (share {p['share']:g})"
                out[label] = share_for(ours, p["rms"]) / p["share"]
    return out


def read_reference(text: str, where: str | None) -> pa.Table:
    """The rows of a file, or of a sweep in a store. Raises UserError for neither."""
    from isoflop.laws.table import where as rows_where
    from isoflop.sweep import api
    from isoflop.sweep.results import usable

    path = Path(text)
    if path.suffix in (".csv", ".parquet"):
        if not path.is_file():
            raise UserError(f"--reference: {text!r} is no file")
        table = pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pyarrow.parquet.read_table(path)
    elif "@" in text:
        name, _, store = text.partition("@")
        table = usable(api.open_sweep(name, store or None).results())
    else:
        raise UserError(f"--reference: {text!r}; allowed: a .csv or .parquet file, or SWEEP@STORE")
    return rows_where(table, where)


@click.command("search")
@click.option("--only", multiple=True, help="A case (repeatable); 'ask' times proposals. Default: all.")
@click.option("--strategy", "strategies", multiple=True, help="Only these strategies of the chosen cases.")
@click.option("--seeds", type=click.IntRange(2), default=50, show_default=True, help="Simulated studies per point.")
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep every seed's error in this file of JSON lines as it comes, and run only what it lacks.",
)
@click.option(
    "--reference", help="A CSV or Parquet file, or SWEEP@STORE, of a sweep with repeats (N, V, error, flops)."
)
@click.option("--where", help="SQL condition on the reference's rows, e.g. \"task = 'visual-reading'\".")
@click.option("--q", default=50.0, show_default=True, help="Text tokens per answer of the reference's questions.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def search(
    only: tuple[str, ...],
    strategies: tuple[str, ...],
    seeds: int,
    save: Path | None,
    reference: str | None,
    where: str | None,
    q: float,
    as_json: bool,
) -> None:
    """Search that sharpens a law: FLOPs to an answer against grids and Optuna's samplers."""
    data = b""
    if reference is not None:
        rows = read_reference(reference, where)
        _REAL.update(measured_worlds(rows, q))
        used = [name for name in ("N", "V", "error", "flops") if name in rows.column_names]
        data = repr((rows.select(used).to_pydict(), q)).encode()
        goal = "FLOPs to be within the reference's interval"
        CASES.update({n: Case(n, ("grid", "random", "tpe", "law"), (0.03, 0.1, 0.3), goal) for n in _REAL})
        only = only or tuple(_REAL)
    for name in only:
        if name not in (*CASES, "ask"):
            raise unknown("case", name, (*CASES, "ask"), "--only")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results, saved = [], Saved(save, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in only or (*CASES, "ask"):
            if name == "ask":
                results.append({"case": "ask", **bench_ask()})
            else:
                results.append(run_case(name, range(seeds), strategies, saved=saved))
            if not as_json:
                found = results[-1]
                shown = (
                    table(found) if name != "ask" else [f"ask: {k} {v:.3g}" for k, v in found.items() if k != "case"]
                )
                click.echo("\n".join(shown) + "\n")
    if as_json:
        click.echo(json.dumps(finite(results), indent=1, allow_nan=False))
