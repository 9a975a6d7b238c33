"""Compute-optimal and inference-aware allocation for the additive law L = E + A N^-alpha + B D^-beta.

Sources: Hoffmann et al. 2022 (arXiv 2203.15556), approach 3, equation 4; Sardana et al. 2023 (arXiv 2401.00448), section 2.
Exponents rounded to two digits move the recommended tokens per parameter by half, so rounded parameters give a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array
from isoflop.laws.base import LAWS
from isoflop.laws.fitting import natural_array
from isoflop.laws.result import Fit

HOFFMANN_2022 = {
    "E": math.exp(0.5267228),
    "A": math.exp(6.0073404),
    "B": math.exp(6.0179186),
    "alpha": 0.33917084,
    "beta": 0.2849083,
}


class RoundedParameters(UserWarning):
    """An optimum was computed from parameters with few digits; it may be far from the one of the exact parameters."""


@dataclass(frozen=True)
class Allocation:
    """An optimum: parameters N, training tokens D, the loss there, and the compute it was asked for."""

    N: float
    D: float
    loss: float
    compute: float

    @property
    def tokens_per_parameter(self) -> float:
        """D/N."""
        return self.D / self.N


def _params(source: Fit | Mapping[str, float]) -> tuple[float, float, float, float, float]:
    if isinstance(source, Fit):
        if source.form.name != "chinchilla":
            raise UserError(f"allocation needs a fit of law 'chinchilla', got {source.law!r}")
        source = {n: e.value for n, e in source.params.items()}
    e, a, b, alpha, beta = (float(v) for v in natural_array(LAWS.get("chinchilla"), source))
    if min(a, b, alpha, beta) <= 0:
        raise UserError("allocation: A, B, alpha and beta must be > 0; a parameter on its bound 0 has no optimum")
    return e, a, b, alpha, beta


def looks_rounded(*exponents: float) -> bool:
    """True when every exponent has at most four significant digits, as printed in papers."""
    return all(float(f"{v:.4g}") == v for v in exponents)


def warn_rounded(*exponents: float) -> None:
    """Warn when parameters look copied from print."""
    if looks_rounded(*exponents):
        shown = ", ".join(f"{v:g}" for v in exponents)
        warnings.warn(
            f"exponents {shown} look rounded: the optimum depends strongly on their digits; use full precision",
            RoundedParameters,
            stacklevel=3,
        )


def loss(source: Fit | Mapping[str, float], n: float | Array, d: float | Array) -> Array:
    """L(N, D)."""
    e, a, b, alpha, beta = _params(source)
    return np.asarray(e + a * np.power(n, -alpha) + b * np.power(d, -beta))


def allocate(source: Fit | Mapping[str, float], compute: float, per_token: float = 6.0) -> Allocation:
    """The optimum under ``compute = per_token * N * D``: N* = G (C/6)^(beta/(alpha+beta)), D* = (C/6)^(alpha/(alpha+beta)) / G.

    Args:
        source: a chinchilla fit, or its five parameters by name.
        compute: training FLOPs C.
        per_token: FLOPs per parameter and token.
    """
    if not compute > 0:
        raise UserError(f"compute = {compute:g} must be > 0")
    e, a, b, alpha, beta = _params(source)
    if not isinstance(source, Fit):
        warn_rounded(alpha, beta)
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    n = g * (compute / per_token) ** (beta / (alpha + beta))
    d = compute / per_token / n
    return Allocation(n, d, e + a * n**-alpha + b * d**-beta, compute)


def optimum_of_size(source: Fit | Mapping[str, float], n: float) -> Allocation:
    """The compute-optimal model that has N parameters: alpha A N^-alpha = beta B D^-beta."""
    e, a, b, alpha, beta = _params(source)
    d = (beta * b / (alpha * a * n**-alpha)) ** (1 / beta)
    return Allocation(n, d, e + a * n**-alpha + b * d**-beta, 6 * n * d)


def inference_aware(source: Fit | Mapping[str, float], target_loss: float, inference_tokens: float) -> Allocation:
    """Least 6 N D + 2 N D_inf that reaches a loss (Sardana et al.): smaller models, trained for longer.

    With N eliminated, (alpha+beta) B D^-beta + beta B (D_inf/3) D^(-beta-1) = alpha (loss - E), monotone in D: one root.
    ``compute`` of the result is the total, training and inference.
    """
    e, a, b, alpha, beta = _params(source)
    if not isinstance(source, Fit):
        warn_rounded(alpha, beta)
    gap = target_loss - e
    if not gap > 0:
        raise UserError(f"target loss {target_loss:g} is not above the floor {e:g}")
    if inference_tokens < 0:
        raise UserError(f"inference tokens = {inference_tokens:g} must be >= 0")

    def slope(z: float) -> float:
        d = math.exp(z)
        return (alpha + beta) * b * d**-beta + beta * b * inference_tokens / 3 * d ** (-beta - 1) - alpha * gap

    least = math.log(b / gap) / beta  # below this D alone exceeds the loss
    top = least + 1.0
    while slope(top) > 0:
        top += 2.0
    d = math.exp(brentq(slope, least, top, xtol=1e-14, rtol=1e-15))
    n = (a / (gap - b * d**-beta)) ** (1 / alpha)
    return Allocation(n, d, target_loss, 6 * n * d + 2 * n * inference_tokens)


def policy_exponent(fit: Fit) -> tuple[float, float]:
    """a_N = beta/(alpha+beta) and its standard error by the delta method."""
    i, j = fit.form.position("alpha"), fit.form.position("beta")
    alpha, beta = fit.p[i], fit.p[j]
    gradient = np.array([-beta, alpha]) / (alpha + beta) ** 2
    return float(beta / (alpha + beta)), float(np.sqrt(gradient @ fit.cov[np.ix_([i, j], [i, j])] @ gradient))
