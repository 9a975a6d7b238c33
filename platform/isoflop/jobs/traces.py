"""Traces: what methods report of their inner steps (generations of a search, steps of a training), as a row keeps it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isoflop.core.text import safe_line, safe_name
from isoflop.methods.base import Method

log = logging.getLogger(__name__)
POINTS = 200
"""Most points that a row keeps of one series."""

Trace = list[tuple[int, float]]
"""(step, value) in ascending order of steps."""


def thinned(values: Sequence[float], points: int = POINTS) -> Trace:
    """At most ``points`` of a series, evenly spaced, each with its number; the first and the last are always kept."""
    count = len(values)
    steps = np.unique(np.linspace(0, count - 1, min(count, points)).round().astype(int))
    return [(int(step), float(values[step])) for step in steps]


def traces_of(methods: Sequence[tuple[Method, Any]]) -> dict[str, Trace]:
    """The thinned traces of a trial's methods by name; in a composition, prefixed with the method's name as knobs are.

    Args:
        methods: each with the value of its ``prepare`` stage.
    """
    found: dict[str, Trace] = {}
    for method, prepared in methods:
        prefix = f"{method.name}." if len(methods) > 1 else ""
        try:
            series: Mapping[str, Sequence[float]] = method.trace(prepared)
            found |= {f"{prefix}{safe_name(name)}": thinned(values) for name, values in series.items() if len(values)}
        except Exception as error:  # what a job measured must not be lost for something to look at
            log.warning("method %s: its trace is left out: %s: %s", method.name, type(error).__name__, safe_line(error))
    return found
