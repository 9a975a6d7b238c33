"""Residual diagnostics: is what the law leaves over noise, or a curve that it cannot bend along?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from isoflop.core.expressions import Array
from isoflop.laws.base import LawForm
from isoflop.laws.table import GroupData


def runs_test(signs: Array) -> tuple[int, float]:
    """Wald-Wolfowitz: number of runs of equal sign and the two-sided p-value (small: residuals are systematic)."""
    signs = signs[signs != 0]
    n, up = len(signs), int(np.sum(signs > 0))
    down = n - up
    runs = 1 + int(np.sum(signs[1:] != signs[:-1])) if n else 0
    if up == 0 or down == 0 or n < 4:
        return runs, math.nan
    mean = 1 + 2 * up * down / n
    variance = (mean - 1) * (mean - 2) / (n - 1)
    return runs, float(2 * stats.norm.sf(abs(runs - mean) / math.sqrt(variance))) if variance > 0 else math.nan


def residual_diagnostics(form: LawForm, data: GroupData, residual: Array) -> dict[str, Any]:
    """Per variable: a runs test on the signs along it and the residual curvature; plus the largest residual.

    ``curvature``: t-value of the squared term when residuals are regressed on 1, ln x, (ln x)^2.
    """
    out: dict[str, Any] = {
        "largest": {"row": int(np.argmax(np.abs(residual))), "residual": float(residual[np.argmax(np.abs(residual))])}
    }
    along: dict[str, Any] = {}
    for name in form.variable_names:
        x = data.x[name]
        levels, where = np.unique(x, return_inverse=True)
        if len(levels) < 3:
            continue
        means = np.bincount(where, residual) / np.bincount(where)
        runs, p = runs_test(np.sign(residual[np.argsort(x, kind="stable")]))
        z = np.log(x) if np.all(x > 0) else x
        along[name] = {
            "runs": runs,
            "runs_p": _none(p),
            "curvature_t": _none(_curvature(z, residual)),
            "mean_by_level": _by_level(levels, means),
        }
    out["along"] = along
    return out


def lack_of_fit(form: LawForm, data: GroupData, p: Array, n_params: int) -> dict[str, float] | None:
    """F test of the law against the scatter between repeats at equal sizes; None without repeats."""
    points = np.stack([data.x[v] for v in form.variable_names], axis=1)
    if len(np.unique(points[:, 0])) == len(points):
        return None
    _, label = np.unique(points, axis=0, return_inverse=True)
    label = label.ravel()
    counts = np.bincount(label, data.w)
    means = np.bincount(label, data.w * data.y) / counts
    pure = float(np.sum(data.w * (data.y - means[label]) ** 2))
    dof_pure, dof_model = data.n - len(counts), len(counts) - n_params
    if dof_pure <= 0 or dof_model <= 0:
        return None
    sse = float(np.sum(data.w * (data.y - form.evaluate(data.x, p)) ** 2))
    if pure <= 0:
        return None
    ratio = ((sse - pure) / dof_model) / (pure / dof_pure)
    return {"F": ratio, "p": float(stats.f.sf(ratio, dof_model, dof_pure)), "seed_noise": math.sqrt(pure / dof_pure)}


def _curvature(z: Array, residual: Array) -> float:
    if len(z) < 5:
        return math.nan
    z = (z - z.mean()) / (z.std() or 1.0)
    design = np.stack([np.ones_like(z), z, z**2], axis=1)
    coefficient, *_ = np.linalg.lstsq(design, residual, rcond=None)
    rest = residual - design @ coefficient
    sigma2 = float(rest @ rest) / (len(z) - 3)
    variance = sigma2 * np.linalg.pinv(design.T @ design)[2, 2]
    return float(coefficient[2] / math.sqrt(variance)) if variance > 0 else math.nan


def _by_level(levels: Array, means: Array) -> list[list[float]] | None:
    return [[float(a), float(b)] for a, b in zip(levels, means, strict=True)] if len(levels) <= 24 else None


def _none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
