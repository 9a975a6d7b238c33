"""A belief seen from its target: hypotheses linearised at their modes, and what they say of the target together.

Shapes: M candidates, O observations per candidate, P parameters, T quantities, K hypotheses, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from isoflop.core.expressions import Array
from isoflop.search.law.belief import Belief
from isoflop.search.law.gains import disagreement, linearise, normal_draws, root_of
from isoflop.search.law.hypotheses import Hypothesis
from isoflop.search.law.policy import Pool, TargetState

_DRAWS = 64
_FEWEST = 8  # at least an eighth of the draws carries the weight
_END = 1e-9  # of a logarithm: rounding


@dataclass
class View:
    """A hypothesis linearised at its mode.

    Attributes:
        h_MOP: candidates' sensitivities; mean_MO: their predictions.
        cov: of the parameters (P, P); cross: of target and parameters (T, P); target_T: the target at the mode.
    """

    hypothesis: Hypothesis
    h_MOP: Array
    cov: Array
    cross: Array
    target_T: Array
    mean_MO: Array

    @property
    def target_variance(self) -> Array:
        """diag(J Sigma J^T) from C = J Sigma (T,)."""
        solved = np.linalg.solve(self.cov + 1e-14 * np.diag(np.diag(self.cov)), self.cross.T)
        return np.maximum(np.einsum("tp,pt->t", self.cross, solved), 0.0)


def make_views(belief: Belief, target: Any, pool: Pool) -> list[View]:
    """Every hypothesis linearised, with the target's contrasts applied."""
    raw = []
    for h in belief.hypotheses:
        z = normal_draws(len(h.u), max(_DRAWS, 4 * len(h.u)))
        root = root_of(h.cov)
        draws = target.values(h, h.clip(h.u + z @ root.T))
        at = target.values(h, h.u[None])[0]
        raw.append((h, z, root, np.nan_to_num(draws, nan=0.0, posinf=30.0, neginf=-30.0), at))
    mean = np.asarray(sum(r[0].weight * np.nan_to_num(r[4]) for r in raw))
    contrast = np.asarray(target.contrasts(mean)) if hasattr(target, "contrasts") else np.eye(len(mean))
    out = []
    for h, z, root, draws, at in raw:
        cross = linearise(np.asarray(draws @ contrast.T, dtype=np.float64), z, root)
        at = np.where(np.isfinite(at), at, 0.0)
        out.append(View(h, stack(h, pool), h.cov, cross, contrast @ at, _means(h, pool)))
    return out


def importance_of(views: Sequence[View], target: Any) -> Array:
    """How much variance of each quantity counts (T,)."""
    mean = sum(v.hypothesis.weight * v.target_T for v in views)
    variance = sum(v.hypothesis.weight * v.target_variance for v in views)
    return np.asarray(target.weights(mean, np.sqrt(variance)))


def between(views: Sequence[View], noise_MO: Array, importance_T: Array, weight_K: Array) -> Array:
    """Between-hypothesis variance that each candidate is expected to settle (M,)."""
    variances = [np.einsum("mop,pq,moq->mo", v.h_MOP, v.cov, v.h_MOP) + noise_MO for v in views]
    return disagreement(
        weight_K,
        np.stack([v.target_T for v in views]),
        importance_T,
        np.stack([v.mean_MO for v in views]),
        np.stack(variances),
    )


def doubt(views: Sequence[View], importance_T: Array) -> tuple[float, float]:
    """The target's variance within hypotheses, and between them, weighted by importance."""
    weight = np.array([v.hypothesis.weight for v in views])
    at = np.stack([v.target_T for v in views])
    within = float(weight @ np.stack([v.target_variance for v in views]) @ importance_T)
    return within, float(weight @ (at - weight @ at) ** 2 @ importance_T)


def target_draws(belief: Belief, target: Any) -> tuple[Array, Array]:
    """Draws of the target from the mixture (n, T) with weights (n,); heavier tails while the noise is uncertain.

    Gaussian draws in (ln E, ln A, alpha) leave the curved ridge along which these trade off; importance weights (the posterior
    over the Gaussian, both widened alike) bring them back, tempered where too few draws would carry the weight.
    """
    parts, weights = [], []
    dof = max(2.0, belief.noise.dof)
    # the quantile of |z| that corresponds to Student's t with the noise's degrees of freedom, at 95 %
    wide = float(special.stdtrit(dof, 0.975)) / 1.959964
    for h in belief.hypotheses:
        if h.weight < 1e-4:
            continue
        z = normal_draws(len(h.u), 512)
        u = h.clip(h.u + wide * z @ root_of(h.cov).T)
        log_weight = (belief.log_posterior(h, u) - belief.log_posterior(h, h.u[None])) / wide**2
        parts.append(target.values(h, u))
        weights.append(h.weight * tempered(log_weight + 0.5 * np.sum(z**2, axis=1), len(z) / _FEWEST))
    return np.concatenate(parts), np.concatenate(weights)


def tempered(log_weight_R: Array, least: float) -> Array:
    """Weights (R,) of sum 1, raised to the largest power <= 1 at which their effective number is at least ``least``."""
    log_weight = np.where(np.isfinite(log_weight_R), log_weight_R, -np.inf)
    if not np.isfinite(log_weight).any():
        return np.full(len(log_weight), 1 / len(log_weight))
    log_weight = log_weight - log_weight.max()
    for power in (1.0, *np.geomspace(0.9, 0.01, 24)):
        w = np.exp(power * log_weight)
        w /= w.sum()
        if 1 / float(np.sum(w**2)) >= least:
            return np.asarray(w)
    return np.full(len(w), 1 / len(w))


def target_state(belief: Belief, target: Any) -> TargetState:
    """The target's estimate: the mean of the hypotheses' modes, the mixture's interval."""
    draws, weight = target_draws(belief, target)
    ok = np.isfinite(draws)
    safe = np.where(ok, draws, 0.0)
    total = np.maximum((ok * weight[:, None]).sum(0), 1e-300)
    mean = (safe * weight[:, None]).sum(0) / total
    low, high = (np.array([_quantile(c, weight, q) for c in draws.T]) for q in (0.025, 0.975))
    modes = np.stack([target.values(h, h.u[None])[0] for h in belief.hypotheses])
    p = np.array([h.weight for h in belief.hypotheses])[:, None] * np.isfinite(modes)
    centre = (p * np.nan_to_num(modes)).sum(0) / np.maximum(p.sum(0), 1e-300)
    spread = (p * (np.nan_to_num(modes) - centre) ** 2).sum(0)
    variance = (np.where(ok, draws - mean, 0.0) ** 2 * weight[:, None]).sum(0) / total
    first, last = target.ends
    return TargetState(
        list(target.labels),
        centre,
        np.sqrt(variance),
        low,
        high,
        spread / np.maximum(variance, 1e-300),
        bool(target.log),
        low <= first + _END,
        high >= last - _END,
    )


def stack(h: Hypothesis, pool: Pool) -> Array:
    """Sensitivities of all candidates' observations (M, O, P)."""
    m, o, k = pool.x.shape
    return h.jacobian(pool.x.reshape(m * o, k), pool.group.ravel()).reshape(m, o, -1)


def _means(h: Hypothesis, pool: Pool) -> Array:
    m, o, k = pool.x.shape
    return h.predict(h.u[None], pool.x.reshape(m * o, k), pool.group.ravel())[0].reshape(m, o)


def _quantile(values: Array, weight: Array, q: float) -> float:
    ok = np.isfinite(values)
    if not ok.any():
        return math.nan
    order = np.argsort(values[ok], kind="stable")
    share = np.cumsum(weight[ok][order])
    return float(values[ok][order][np.searchsorted(share, q * share[-1])])
