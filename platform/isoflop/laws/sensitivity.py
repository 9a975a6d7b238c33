"""How much an answer depends on choices that are not data: Huber's delta, the floor, the rows that were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from isoflop.core.errors import UserError
from isoflop.laws.engine import Box, NotEstimable
from isoflop.laws.fitting import Settings, fit_data
from isoflop.laws.objective import Objective
from isoflop.laws.result import Fit
from isoflop.laws.table import GroupData

DELTAS = (1e-4, 1e-3, 1e-2)


def sensitivity(
    fit: Fit,
    deltas: Sequence[float] = DELTAS,
    floors: Sequence[float] = (),
    quantities: Mapping[str, str] | None = None,
) -> pa.Table:
    """Refit under other choices: one row per choice with all parameters and quantities.

    Args:
        deltas: Huber deltas on the fit's own residuals, beside least squares.
        floors: values at which the asymptote is held (forms whose asymptote is one parameter).
        quantities: name -> expression in the parameters; the form's derived ones are always there.

    The rows also refit without the largest and without the smallest size of every variable.
    """
    if fit.data is None:
        raise UserError("sensitivity needs the fit's rows, in memory")
    log = "-log" if fit.objective.endswith("-log") else ""
    own = Objective(fit.objective, fit.delta)
    choices: list[tuple[str, Objective, Box, GroupData]] = [("as fitted", own, fit.box, fit.data)]
    choices.append(("least squares", Objective(f"squared{log}"), fit.box, fit.data))
    choices += [(f"huber, delta {d:g}", Objective(f"huber{log}", d), fit.box, fit.data) for d in deltas]
    choices += [(f"floor held at {v:g}", own, _held(fit, v), fit.data) for v in floors]
    for name, x in fit.data.x.items():
        if x.min() == x.max():
            continue
        choices += [
            (f"without {name} = {edge:g}", own, fit.box, fit.data.take(x != edge)) for edge in (x.min(), x.max())
        ]
    rows: list[dict[str, Any]] = []
    for label, objective, box, data in choices:
        try:
            found = fit_data(fit.form, [data], fit.columns, Settings(objective, box))
        except NotEstimable as error:
            rows.append({"choice": label, "status": str(error)})
            continue
        assert isinstance(found, Fit)
        wanted = {**fit.form.derived, **(quantities or {})}
        values = {n: e.value for n, e in found.params.items()} | {n: found.quantity(t).value for n, t in wanted.items()}
        rows.append({"choice": label, "n": found.n, "status": found.status, "sse": found.sse, **values})
    columns = list(dict.fromkeys(c for row in rows for c in row))
    return pa.table({c: [row.get(c) for row in rows] for c in columns})


def _held(fit: Fit, value: float) -> Box:
    if fit.form.asymptote not in fit.form.names:
        raise UserError(f"law {fit.law!r} has no floor to hold (asymptote: {fit.form.asymptote or 'none'})")
    low, high, i = fit.box.low.copy(), fit.box.high.copy(), fit.form.position(fit.form.asymptote)
    low[i] = high[i] = value
    return Box(low, high)
