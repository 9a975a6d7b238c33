"""What every fit reports about its own extrapolation: leave-largest-out, beside a semilog line and carry-forward."""

from __future__ import annotations

from typing import Any

import numpy as np

from isoflop.laws.base import LawForm, custom_form
from isoflop.laws.engine import Box, make_box
from isoflop.laws.extrapolation import baseline_rollout, rollout, splits
from isoflop.laws.objective import Objective
from isoflop.laws.table import GroupData

_CUTS, _LARGE_SEARCH = 3, 4096


def validate(form: LawForm, data: GroupData, box: Box, objective: Objective) -> dict[str, Any] | None:
    """Errors on the largest sizes of the first variable that has three levels or more; None when there is none.

    Forms whose search is long are refitted for the first cut only.
    """
    along = next((v for v in form.variable_names if len(np.unique(data.x[v])) >= 3), None)
    if along is None:
        return None
    count = _CUTS if form.search_points < _LARGE_SEARCH else 1
    cuts = splits(data, along)[:count]
    found = {"law": rollout(form, data, box, objective, along, cuts=count)}
    if all(np.all(data.x[v] > 0) for v in form.variable_names):
        line = semilog(form.variable_names)
        found["semilog"] = rollout(line, data, make_box(line, None, None), objective, along, cuts=count)
    found["carry-forward"] = baseline_rollout("carry-forward", data, along, cuts)
    return {"along": along, "leave_largest_out": {name: [c.to_dict() for c in part] for name, part in found.items()}}


def semilog(variables: tuple[str, ...] | list[str]) -> LawForm:
    """Straight lines in the logarithms of any number of variables."""
    slopes = "".join(f" - a_{v}*log({v})" for v in variables)
    return custom_form(f"E{slopes}", list(variables), name="semilog")


def in_words(validation: dict[str, Any] | None) -> str:
    """One line: the error at the largest size, held out, for the law and the baselines."""
    parts = [(n, cuts[0]) for n, cuts in (validation or {"leave_largest_out": {}})["leave_largest_out"].items() if cuts]
    if not parts or validation is None:
        return ""
    first = parts[0][1]
    sizes = ", ".join(f"{v:.4g}" for v in first["held_out"][:3]) + (", …" if len(first["held_out"]) > 3 else "")
    errors = ", ".join(f"{name} {cut['rmse']:.3g}" for name, cut in parts)
    return f"held out {validation['along']} = {sizes} ({first['decades']:.2g} decades): RMSE {errors}"
