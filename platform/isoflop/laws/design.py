"""Which runs to make next: greedy choice by the gain in what one wants to know, per cost.

State: the covariance Sigma of the parameters (logarithms of amplitudes) with a weak prior. A run at x with sensitivities j
reduces the variance at targets t by ||J_t Sigma j||^2/(sigma^2 + j^T Sigma j) (V-optimal), or the volume of Sigma by
ln(1 + j^T Sigma j/sigma^2) (D-optimal). Gains are divided by (cost/total)^gamma: gamma = 1 picks only tiny runs, 0 only the
largest (arXiv 2604.22753).

Shapes: M candidates, T targets, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from scipy.optimize import minimize

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array, parse
from isoflop.laws.base import LawForm
from isoflop.laws.result import Fit

Criterion = Literal["V", "D"]


@dataclass(frozen=True)
class Design:
    """Chosen candidates in order of choice.

    Attributes:
        rows: positions in the candidate list; spent: their summed cost.
        target_sd: standard deviation of the law's mean at the targets, before the first choice and after each (len(rows) + 1, T).
        table: the chosen candidates with their cost and gain.
    """

    rows: list[int]
    spent: float
    target_sd: Array
    table: pa.Table


def sensitivities(form: LawForm, x: Mapping[str, Any], p: Array) -> Array:
    """Derivatives (M, P) of the law with respect to ln(parameter) for amplitudes > 0 and to the parameter itself otherwise."""
    return form.jacobian(x, p) * _units(form, p)


def _units(form: LawForm, p: Array) -> Array:
    return np.array(
        [
            v if q.low >= 0 and v > 0 and (q.linear or q.scale == "log") else 1.0
            for q, v in zip(form.parameters, p, strict=True)
        ]
    )


def prior_covariance(form: LawForm, p: Array) -> Array:
    """A weak prior: standard deviation a quarter of a decade-wide range for logarithms, a quarter of the search range otherwise."""
    logs = _units(form, p) != 1.0
    width = np.array(
        [np.log(1e4) if log else q.search[1] - q.search[0] for log, q in zip(logs, form.parameters, strict=True)]
    )
    return np.diag((width / 4) ** 2)


def posterior(j_NP: Array, sigma2: float, prior_PP: Array) -> Array:
    """(J^T J/sigma^2 + prior^-1)^-1."""
    return np.linalg.inv(j_NP.T @ j_NP / sigma2 + np.linalg.inv(prior_PP))


def v_gain(cov_PP: Array, sigma2: float, j_MP: Array, targets_TP: Array) -> Array:
    """Reduction of the summed variance at the targets by one run at each candidate, (M,)."""
    moved = j_MP @ cov_PP
    return np.sum((moved @ targets_TP.T) ** 2, axis=1) / (sigma2 + np.sum(moved * j_MP, axis=1))


def d_gain(cov_PP: Array, sigma2: float, j_MP: Array) -> Array:
    """ln(1 + j^T Sigma j/sigma^2) of one run at each candidate, (M,)."""
    return np.log1p(np.sum((j_MP @ cov_PP) * j_MP, axis=1) / sigma2)


def greedy(
    j_MP: Array,
    targets_TP: Array,
    cost_M: Array,
    budget: float,
    cov_PP: Array,
    sigma2: float,
    gamma: float = 0.4,
    criterion: Criterion = "V",
    repeat: bool = False,
) -> tuple[list[int], list[Array], list[float]]:
    """Choose until the budget is spent.

    Returns positions, the targets' standard deviations before and after each choice, and the gains. ``repeat`` allows the
    same candidate again (another seed).
    """
    chosen: list[int] = []
    gains: list[float] = []
    left, cov = budget, cov_PP.copy()
    open_ = np.ones(len(j_MP), dtype=bool)
    deviations = [np.sqrt(np.einsum("tp,pq,tq->t", targets_TP, cov, targets_TP))]
    while True:
        possible = open_ & (cost_M <= left)
        if not possible.any():
            return chosen, deviations, gains
        gain = v_gain(cov, sigma2, j_MP, targets_TP) if criterion == "V" else d_gain(cov, sigma2, j_MP)
        best = int(np.argmax(np.where(possible, gain / (cost_M / budget) ** gamma, -np.inf)))
        moved = cov @ j_MP[best]
        cov = cov - np.outer(moved, moved) / (sigma2 + j_MP[best] @ moved)
        chosen.append(best)
        gains.append(float(gain[best]))
        left -= float(cost_M[best])
        open_[best] = repeat
        deviations.append(np.sqrt(np.maximum(np.einsum("tp,pq,tq->t", targets_TP, cov, targets_TP), 0.0)))


def propose_runs(
    fit: Fit,
    candidates: Mapping[str, Any],
    target: Mapping[str, Any],
    budget: float,
    cost: str = "6*N*D",
    gamma: float = 0.4,
    criterion: Criterion = "V",
    constants: Mapping[str, float] | None = None,
) -> Design:
    """The next batch of runs for a fitted pilot: what narrows the prediction at ``target`` most per cost.

    Args:
        candidates: arrays (M,) per variable; target: arrays (T,) or numbers per variable.
        budget: for the sum of the chosen runs' costs.
        cost: formula in the variables and ``constants``.
    """
    form = fit.form
    x = {v: np.atleast_1d(np.asarray(candidates[v], dtype=np.float64)) for v in form.variable_names}
    at = {v: np.atleast_1d(np.asarray(target[v], dtype=np.float64)) for v in form.variable_names}
    if fit.data is None:
        raise UserError("propose_runs needs the fit's rows, in memory")
    prices = np.broadcast_to(parse(cost, "cost")({**x, **(constants or {})}), x[form.variable_names[0]].shape)
    if budget < prices.min():
        raise UserError(f"budget = {budget:g} is below the cheapest candidate, which costs {prices.min():.6g}")
    sigma2 = fit.sse / max(1, fit.n - int(fit.box.free.sum()))
    free = fit.box.free
    cov = posterior(
        sensitivities(form, fit.data.x, fit.p)[:, free], sigma2, prior_covariance(form, fit.p)[np.ix_(free, free)]
    )
    j, targets = sensitivities(form, x, fit.p)[:, free], sensitivities(form, at, fit.p)[:, free]
    rows, deviations, gains = greedy(j, targets, prices, budget, cov, sigma2, gamma, criterion)
    table = pa.table({**{v: a[rows] for v, a in x.items()}, "cost": prices[rows], "gain": gains})
    return Design(rows, float(prices[rows].sum()), np.array(deviations), table)


def d_optimal_points(form: LawForm, p: Array, variable: str, low: float, high: float) -> Array:
    """The locally D-optimal design with as many points as parameters, on [low, high] of a one-variable law.

    Maximises |det J| over the points' logarithms, both ends being free to move.
    """
    k = len(form.names)
    ends = np.log(low), np.log(high)

    def minus_log_det(z: Array) -> float:
        j = sensitivities(form, {variable: np.exp(np.clip(np.sort(z), *ends))}, p)
        norm = np.linalg.norm(j, axis=0)
        sign, value = np.linalg.slogdet(j / np.maximum(norm, 1e-300))
        return float(-(value + np.sum(np.log(np.maximum(norm, 1e-300))))) if sign else 1e300

    best = None
    for skew in (0.6, 1.0, 1.6):
        start = ends[0] + (ends[1] - ends[0]) * np.linspace(0, 1, k) ** skew
        for _ in range(3):
            found = minimize(
                minus_log_det,
                start,
                method="Nelder-Mead",
                bounds=[ends] * k,
                options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000},
            )
            start = found.x
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    return np.exp(np.sort(best.x))
