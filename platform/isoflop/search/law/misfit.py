r"""What a form misses, where a test says that it misses something: a smooth surface g over ln x beside the law.

    g ~ N(0, tau^2 k),    k(x, x') = exp(-|ln x - ln x'|^2 / 2) in units of a length per axis; 0 between groups

Its expectation at a place, given the cells, is a weighted sum of kernels (kriging). What is not known of it is written as a
finite basis, g = E[g] + sum_e w_e phi_e with w ~ N(0, 1) before rows, so that gains, designs, draws and intervals treat w as
further parameters of the law: runs go where the misfit may yet matter to the target, and intervals hold it.

Shapes: C cells, M places, E nodes, K axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import qmc

from isoflop.core.expressions import Array

_NODES = 36  # of the misfit's waves, over all groups


def kernel(x_MK: Array, group_M: np.ndarray, x_CK: Array, group_C: np.ndarray, unit_K: Array) -> Array:
    """Correlation (M, C) of the misfit at two sets of places; groups do not share it."""
    a, b = np.log(np.maximum(x_MK, 1e-300)) / unit_K, np.log(np.maximum(x_CK, 1e-300)) / unit_K
    distance = np.sum((a[:, None, :] - b[None, :, :]) ** 2, axis=2)
    return np.exp(-0.5 * distance) * (group_M[:, None] == group_C[None, :])


@dataclass(frozen=True)
class Waves:
    """A finite basis of the misfit: tau k(x, Z) L^-T at nodes Z with k(Z, Z) = L L^T, whose coefficients are N(0, 1).

    What a basis of E nodes cannot express of the variance tau^2 at a place counts as scatter there (:meth:`rest`).
    """

    x: Array
    group: np.ndarray
    unit: Array
    tau2: float

    @classmethod
    def over(cls, low_K: Array, high_K: Array, groups: Sequence[int], unit_K: Array, tau2: float) -> Waves:
        """Nodes on a grid in ln x over a box, the same for every group; about ``_NODES`` in all."""
        low, high = np.log(np.maximum(low_K, 1e-300)), np.log(np.maximum(high_K, 1e-300))
        wide = high > low
        each = max(2, math.floor((_NODES / len(groups)) ** (1 / max(1, int(wide.sum()))) + 1e-9))
        if each ** int(wide.sum()) * len(groups) <= 2 * _NODES:
            ticks = [np.linspace(a, b, each if w else 1) for a, b, w in zip(low, high, wide, strict=True)]
            z = np.stack([m.ravel() for m in np.meshgrid(*ticks, indexing="ij")], axis=1)
        else:  # too many axes for a grid
            count = max(1, round(math.log2(_NODES / len(groups))))
            z = low + (high - low) * qmc.Sobol(len(low), seed=0).random_base2(count)
        x = np.tile(np.exp(z), (len(groups), 1))
        return cls(x, np.repeat(np.asarray(groups, dtype=np.int64), len(z)), unit_K, tau2)

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def _root(self) -> Array:
        k = kernel(self.x, self.group, self.x, self.group, self.unit)
        return np.linalg.inv(np.linalg.cholesky(k + 1e-8 * np.eye(len(k))))

    def at(self, x_MK: Array, group_M: np.ndarray) -> Array:
        """(M, E)."""
        return math.sqrt(self.tau2) * kernel(x_MK, group_M, self.x, self.group, self.unit) @ self._root.T

    def rest(self, x_MK: Array, group_M: np.ndarray) -> Array:
        """Variance of the misfit beyond the basis (M,)."""
        return np.maximum(self.tau2 - np.sum(self.at(x_MK, group_M) ** 2, axis=1), 0.0)


@dataclass(frozen=True)
class Surface:
    """The misfit of a form: expected, a weighted sum of kernels at the cells; and where it may yet go, as waves.

    Attributes:
        x, group: cells; unit: length per axis; weight: of the kernels at the cells (C,).
        waves: the basis; centre: its expected coefficients (E,), from which coordinates of a hypothesis are counted.
    """

    x: Array
    group: np.ndarray
    unit: Array
    weight: Array
    waves: Waves
    centre: Array

    def at(self, x_MK: Array, group_M: np.ndarray) -> Array:
        """Expected misfit (M,)."""
        return kernel(x_MK, group_M, self.x, self.group, self.unit) @ self.weight
