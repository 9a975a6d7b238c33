"""Observational laws: capability measures from a models x benchmarks table (Ruan et al. 2024, arXiv 2405.10938).

Principal components are computed on the training rows only, missing scores are imputed by a one-component model, signs are
fixed so that more of a component means higher scores. The target metric must not be among the benchmarks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array


@dataclass(frozen=True)
class Capabilities:
    """A fitted projection: centre (K,), components (C, K), variance share per component (C,)."""

    centre: Array
    components: Array
    explained: Array

    def __call__(self, scores_MK: Array) -> Array:
        """Capability measures S (M, C) of models with complete or incomplete score rows."""
        filled = _impute(np.asarray(scores_MK, dtype=np.float64), self.centre, self.components[0])
        return (filled - self.centre) @ self.components.T


def capabilities(scores_MK: Array, components: int = 3, rounds: int = 200) -> Capabilities:
    """Fit on training rows (M models, K benchmarks, nan for missing)."""
    scores = np.asarray(scores_MK, dtype=np.float64)
    if scores.ndim != 2 or min(scores.shape) < components:
        raise UserError(
            f"capabilities: a table of at least {components} models x {components} benchmarks is needed, got {scores.shape}"
        )
    if np.any(np.isnan(scores).all(axis=0)):
        raise UserError(f"capabilities: benchmark {int(np.flatnonzero(np.isnan(scores).all(axis=0))[0])} has no scores")
    centre = np.nanmean(scores, axis=0)
    filled = np.where(np.isnan(scores), centre, scores)
    for _ in range(rounds if np.isnan(scores).any() else 0):
        centre = filled.mean(axis=0)
        u, s, vt = np.linalg.svd(filled - centre, full_matrices=False)
        guess = centre + np.outer(u[:, 0] * s[0], vt[0])
        change = np.max(np.abs(np.where(np.isnan(scores), guess - filled, 0.0)))
        filled = np.where(np.isnan(scores), guess, scores)
        if change < 1e-10:
            break
    centre = filled.mean(axis=0)
    _, s, vt = np.linalg.svd(filled - centre, full_matrices=False)
    signs = np.sign(vt.sum(axis=1, keepdims=True))
    return Capabilities(
        centre, (np.where(signs == 0, 1.0, signs) * vt)[:components], (s**2 / np.sum(s**2))[:components]
    )


def _impute(scores: Array, centre: Array, first: Array) -> Array:
    known = ~np.isnan(scores)
    residual = np.where(known, scores - centre, 0.0)
    weight = np.where(known, first**2, 0.0).sum(axis=1)
    strength = (residual * first).sum(axis=1) / np.maximum(weight, 1e-12)
    return np.where(known, scores, centre + strength[:, None] * first)


def family_line(log_compute: Array, capability: Array) -> tuple[float, float]:
    """S = slope ln C + offset within a model family; invert it to express S as equivalent FLOPs of the family."""
    slope, offset = np.polyfit(np.asarray(log_compute, dtype=np.float64), np.asarray(capability, dtype=np.float64), 1)
    return float(slope), float(offset)


def select_models(features_MC: Array, count: int) -> tuple[int, ...]:
    """The subset to evaluate that predicts all others best: minimises tr(X^T X (X_S^T X_S)^-1) (V-optimal).

    Exact for up to 200,000 subsets, greedy removal beyond.
    """
    x = np.column_stack([np.ones(len(features_MC)), np.asarray(features_MC, dtype=np.float64)])
    if not x.shape[1] <= count <= len(x):
        raise UserError(f"select_models: count = {count}; allowed: {x.shape[1]} … {len(x)}")
    total = x.T @ x

    def score(rows: tuple[int, ...]) -> float:
        gram = x[list(rows)].T @ x[list(rows)]
        return float(np.trace(total @ np.linalg.inv(gram))) if np.linalg.cond(gram) < 1e12 else np.inf

    import math

    if math.comb(len(x), count) <= 200_000:
        return min(itertools.combinations(range(len(x)), count), key=score)
    rows = tuple(range(len(x)))
    while len(rows) > count:
        rows = min((tuple(r for r in rows if r != out) for out in rows), key=score)
    return rows
