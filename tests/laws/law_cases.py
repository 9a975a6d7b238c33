"""Known laws to draw data from: for every form, ranges of its variables and of plausible true parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from isoflop.laws.base import LAWS, LawForm

Range = tuple[float, float]


@dataclass(frozen=True)
class Case:
    """Where to sample a form: variables (log-uniform unless they span zero) and true parameters (uniform or log-uniform)."""

    x: dict[str, Range]
    true: dict[str, Range]
    points: int = 80
    log: tuple[str, ...] = ()

    def design(self, rng: np.random.Generator, widen: float = 1.0) -> dict[str, np.ndarray]:
        """Points in the box, widened by a factor on both sides of every positive variable."""
        out = {}
        for name, (low, high) in self.x.items():
            if low > 0 and name not in ("r", *_BITS):
                out[name] = np.exp(rng.uniform(np.log(low / widen), np.log(high * widen), self.points))
            else:
                out[name] = rng.uniform(low, high, self.points)
        return out

    def parameters(self, form: LawForm, rng: np.random.Generator) -> np.ndarray:
        """One true parameter vector."""
        values = {}
        for name, (low, high) in self.true.items():
            values[name] = (
                float(np.exp(rng.uniform(np.log(low), np.log(high))))
                if name in self.log
                else float(rng.uniform(low, high))
            )
        return np.array([values[n] for n in form.names])


_BITS = ("P", "P_w", "P_a", "P_kv")
_N, _D = (1e7, 1e10), (1e9, 1e12)
_ADDITIVE = {"E": (1.4, 2.0), "A": (200.0, 900.0), "B": (300.0, 3000.0), "alpha": (0.25, 0.45), "beta": (0.25, 0.45)}

CASES = {
    "power": Case({"N": _N}, {"E": (0.5, 2.0), "A": (50.0, 500.0), "alpha": (0.2, 0.6)}, 40),
    "semilog": Case({"N": _N, "V": (1.0, 576.0)}, {"E": (1.0, 2.0), "a": (0.01, 0.05), "b": (0.005, 0.05)}, 40),
    "chinchilla": Case({"N": _N, "D": _D}, _ADDITIVE),
    "product": Case({"N": (0.1, 20.0), "V": (1.0, 576.0)}, {"E": (0.05, 0.3), "A": (0.3, 0.8), "alpha": (0.1, 0.5), "beta": (0.05, 0.4)}),
    "kaplan": Case(
        {"N": _N, "D": _D},
        {"N_c": (1e13, 1e14), "D_c": (1e13, 1e14), "a_N": (0.06, 0.09), "a_D": (0.08, 0.11)},
        log=("N_c", "D_c"),
    ),
    "datacon": Case(
        {"N": (1e8, 1e11), "D": (1e9, 1e12), "U": (1e8, 1e11)},
        {**_ADDITIVE, "alpha": (0.3, 0.4), "beta": (0.3, 0.4), "R_D": (8.0, 20.0), "R_N": (3.0, 8.0)},
        200,
    ),
    "precision": Case(
        {"N": _N, "D": _D, "P_w": (3.0, 12.0), "P_a": (3.0, 12.0), "P_kv": (3.0, 12.0)},
        {**_ADDITIVE, "g_w": (1.5, 3.5), "g_a": (1.5, 3.5), "g_kv": (0.8, 2.0)},
        200,
    ),
    "ptq_penalty": Case(
        {"N": _N, "D": _D, "P": (2.0, 8.0)},
        {"C_T": (0.01, 0.1), "g_D": (0.3, 0.6), "g_N": (0.3, 0.6), "g_P": (0.4, 1.5)},
    ),
    "sparsing_silu": Case({"D": (1.0, 100.0)}, {"A0": (0.35, 0.42), "c": (0.1, 0.5), "alpha": (0.4, 1.0)}, 40),
    "sparsing_relu": Case(
        {"D": (1.0, 100.0)}, {"A0": (0.05, 0.08), "exp_b": (0.03, 0.9), "c": (0.05, 0.5), "alpha": (0.3, 0.9)}, 60
    ),
    "linear_flat": Case({"r": (4.0, 400.0)}, {"a": (0.05, 0.2), "b": (5e-4, 2e-3), "r0": (40.0, 120.0)}, 60),
    "eff_params": Case({"N": _N, "D": _D, "r": (0.1, 1.0)}, {**_ADDITIVE, "kappa": (0.2, 1.5)}, 120),
    "bnsl": Case(
        {"x": (10.0, 1e4)},
        {"a": (0.1, 0.4), "b": (1.5, 3.0), "c0": (0.05, 0.2), "c1": (0.5, 2.0), "d1": (100.0, 1000.0), "f1": (0.1, 0.5)},
        100,
    ),
    "bnsl2": Case(
        {"x": (1.0, 1e6)},
        {
            "a": (0.1, 0.3), "b": (2.0, 3.0), "c0": (0.02, 0.08), "c1": (0.25, 0.5), "d1": (80.0, 150.0), "f1": (0.2, 0.4),
            "c2": (0.4, 0.8), "d2": (8e3, 2e4), "f2": (0.2, 0.4),
        },
        240,
    ),
    "observational": Case({"S1": (-3.0, 3.0)}, {"h": (0.6, 0.95), "w1": (0.5, 2.0), "b": (-1.5, 1.5)}, 60),
    "observational3": Case(
        {"S1": (-3.0, 3.0), "S2": (-2.0, 2.0), "S3": (-1.0, 1.0)},
        {"h": (0.6, 0.95), "w1": (0.5, 2.0), "w2": (-1.0, 1.0), "w3": (-1.0, 1.0), "b": (-1.0, 1.0)},
    ),
    "coverage": Case({"k": (1.0, 1000.0)}, {"a": (-3.0, -0.5), "b": (-0.6, -0.1)}, 40),
    "farseer": Case(
        {"N": (1e8, 1e10), "D": (1e9, 1e12)},
        {
            "exp_S": (0.3, 0.6), "s": (2.0, 6.0), "q": (-0.15, -0.08), "exp_Q": (20.0, 60.0), "B": (60.0, 90.0),
            "b": (-0.25, -0.18), "A": (-0.3, -0.1), "a": (0.05, 0.09), "E": (-0.8, -0.4),
        },
        240,
    ),
}  # fmt: skip
assert set(CASES) == set(LAWS.names()), set(CASES) ^ set(LAWS.names())


def additive_table(
    seed: int = 0, n: int = 240, noise: float = 0.01, true: tuple[float, ...] = (1.8, 480.0, 2000.0, 0.35, 0.365)
) -> dict[str, np.ndarray]:
    """Synthetic runs of the additive law: N log-uniform in [5e7, 1.6e10], D/N in [2, 200], log-normal noise."""
    e, a, b, alpha, beta = true
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(np.log(5e7), np.log(1.6e10), n))
    tokens = size * np.exp(rng.uniform(np.log(2), np.log(200), n))
    loss = (e + a * size**-alpha + b * tokens**-beta) * np.exp(noise * rng.standard_normal(n))
    return {"N": size, "D": tokens, "loss": loss}


def published() -> pa.Table:
    """The first seed's 28 points."""
    return pyarrow.csv.read_csv(Path(__file__).parents[2] / "sweeps" / "published" / "inference_optimal_vlms.csv")


def product_table(seed: int, noise: float = 0.003, repeats: int = 1) -> dict[str, np.ndarray]:
    """A grid of sizes and token counts under a product law, with noise."""
    rng = np.random.default_rng(seed)
    n, v, _ = (a.ravel() for a in np.meshgrid([1e8, 3e8, 1e9, 3e9], [1.0, 4, 16, 64, 144], range(repeats)))
    error = 0.1 + 0.6 * (n / 1e8) ** -0.25 * v**-0.15 + noise * rng.standard_normal(len(n))
    return {"N": n, "V": v, "error": error}
