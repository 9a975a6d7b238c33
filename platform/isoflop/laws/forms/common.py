"""Parameters that most forms share."""

from __future__ import annotations

import math

from isoflop.laws.base import Parameter


def floor(name: str = "E", low: float = 0.0) -> Parameter:
    """The irreducible part of y."""
    return Parameter(name, low, math.inf, linear=True, unit="unit of y", doc="floor: what no size removes")


def coefficient(name: str) -> Parameter:
    """A non-negative amplitude; its unit depends on the units of the sizes."""
    return Parameter(name, 0.0, math.inf, linear=True, unit="unit of y", doc="amplitude at size 1")


def exponent(name: str, high: float = 10.0) -> Parameter:
    """A power of a size, from no effect (0) up."""
    return Parameter(name, 0.0, high, search=(0.01, 2.0), doc="exponent")


def positive(name: str, first: float, last: float, unit: str = "", doc: str = "") -> Parameter:
    """A positive quantity that is searched for on a log scale between ``first`` and ``last``."""
    return Parameter(name, 1e-300, 1e300, search=(first, last), scale="log", unit=unit, doc=doc)
