"""Coverage under repeated sampling: the unbiased estimate, and why its failures fall as a power of k.

Sources: Brown et al. 2024 (arXiv 2407.21787); Schaeffer et al. 2025 (arXiv 2502.17578).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import betaln, gammaln

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array


def pass_at_k(samples: Array | int, successes: Array | int, k: Array | int) -> Array:
    """1 - C(n - s, k)/C(n, k), the unbiased chance that one of k samples succeeds; broadcasts over problems."""
    n, s, k = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (samples, successes, k)))
    if np.any((s < 0) | (s > n) | (k < 1) | (k > n)):
        raise UserError("pass_at_k: needs 0 <= successes <= samples and 1 <= k <= samples")
    with np.errstate(all="ignore"):
        log_miss = gammaln(n - s + 1) - gammaln(n - s - k + 1) - gammaln(n + 1) + gammaln(n - k + 1)
    return np.where(n - s < k, 1.0, 1.0 - np.exp(log_miss))


def beta_coverage(k: Array | float, b: float, q: float) -> Array:
    """Coverage 1 - B(b, q + k)/B(b, q) when success rates are Beta(b, q)."""
    return np.asarray(-np.expm1(betaln(b, q + np.asarray(k, dtype=np.float64)) - betaln(b, q)))


def beta_failure_asymptote(k: Array | float, b: float, q: float) -> Array:
    """Gamma(b + q)/Gamma(q) k^-b: the power law that failures approach; its exponent is b."""
    return np.asarray(np.exp(gammaln(b + q) - gammaln(q)) * np.asarray(k, dtype=np.float64) ** -b)


def fit_beta(samples: Array, successes: Array) -> tuple[float, float]:
    """Maximum-likelihood Beta(b, q) of success rates from counts per problem (beta-binomial).

    Predicts the exponent b from far fewer samples than fitting the coverage curve.
    """
    n, s = (np.asarray(a, dtype=np.float64) for a in (samples, successes))
    if len(n) < 2 or np.all(s == s[0]):
        raise UserError("fit_beta: problems must differ in their successes")

    def minus_log_likelihood(z: Array) -> float:
        b, q = np.exp(z)
        return -float(np.sum(betaln(s + b, n - s + q) - betaln(b, q)))

    starts = [np.log([u, v]) for u in (0.1, 0.5, 2.0) for v in (0.5, 2.0, 10.0)]
    found = min(
        (
            minimize(minus_log_likelihood, z, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-10})
            for z in starts
        ),
        key=lambda r: r.fun,
    )
    b, q = np.exp(found.x)
    return float(b), float(q)
