"""The cost of a frontier that names none: all FLOPs that an answer was measured to take, as a formula of the law's variables.

``2*N*(Q+V)`` counts the language model's matrices alone. Vision tower, projector, the method itself and attention cost FLOPs as
well, and rows have measured them: so the default is ``fixed + scale*2*N*(Q+V)``, with the two constants fitted to the rows (least
squares of relative deviations, neither below 0). What does not fit N and V falls back to the plain formula, by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

PLAIN = "2*N*(Q+V)"
MEASURED = {
    ("N", "Q", "V"): f"fixed + scale*{PLAIN}",
    ("N", "V"): "fixed + scale*2*N*V",
    ("N",): "fixed + scale*2*N",
}
"""By the law's variables, and Q where rows know it."""
_COLUMNS = ["N", "V", "Q", "flops"]


@dataclass(frozen=True)
class DefaultCost:
    """A formula, the values of its constants other than Q, and how well it tells what was measured."""

    formula: str = PLAIN
    constants: dict[str, float] = field(default_factory=dict)
    note: str = ""


def default_cost(table: pa.Table, variables: Mapping[str, str]) -> DefaultCost:
    """The measured cost of a group's rows.

    Args:
        table: its rows, with the columns N, V, Q and flops.
        variables: of the law -> what they are in the table.
    """
    names = tuple(sorted(variables))
    if names not in MEASURED or any(variables[name] != name for name in names):
        return DefaultCost()
    values = np.array([[r[c] or 0.0 for c in _COLUMNS] for r in table.select(_COLUMNS).to_pylist()], dtype=np.float64)
    if not len(values) or np.any(values[:, [0, 3]] <= 0):
        return DefaultCost(note="the rows know no FLOPs: cost is the language model's matrices alone")
    from scipy.optimize import nnls

    size, tokens, text, flops = values.T
    texts = any(q is not None for q in table["Q"].to_pylist())
    formula = MEASURED["N", "Q", "V"] if len(names) == 2 and texts else MEASURED[names]
    plain = 2 * size * (text + tokens if len(names) == 2 else 1.0)
    unit = float(np.max(flops))
    fixed, scale = nnls(np.stack([unit / flops, plain / flops], axis=1), np.ones(len(flops)))[0]
    if scale <= 0:  # the law's variables do not tell what an answer costs
        return DefaultCost(
            note="measured FLOPs do not grow with the law's variables: cost is the language model's matrices alone"
        )
    off = float(np.max(np.abs((fixed * unit + scale * plain) / flops - 1)))
    told = f"cost: all measured FLOPs of an answer, fitted within {100 * max(off, 0.001):.2g} %"
    return DefaultCost(
        formula, {"fixed": float(fixed * unit), "scale": float(scale)}, told if math.isfinite(off) else ""
    )
