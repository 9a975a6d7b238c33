"""Numbers for people: three digits, decimal prefixes, intervals."""

from __future__ import annotations

import math
from typing import Any

_PREFIXES = (
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
)
_PREFIXED = ("FLOPs", "B", "s")


def short(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent between a thousandth and a million; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 or rounded == int(rounded) else f"{rounded:.{digits}g}"


def quantity(value: float | None, unit: str = "") -> str:
    """A number with its unit: ``32.4 MFLOPs``, ``418 kB``, ``2.79 ms``; other units take no prefix."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit not in _PREFIXED or not value:
        return f"{short(value)} {unit}".strip()
    factor, prefix = next(((f, p) for f, p in _PREFIXES if abs(value) >= f * (1 - 5e-4)), (1e-9, "n"))
    return f"{short(value / factor)} {prefix}{unit}"


def between(low: float | None, high: float | None) -> str:
    """``0.18 … 0.24``; empty without an interval."""
    if low is None or high is None or not (math.isfinite(low) or math.isfinite(high)):
        return ""
    return f"{short(low)} … {short(high)}".replace("–", "∞")


def with_interval(value: float | None, low: float | None, high: float | None, what: str = "") -> str:
    """``0.21 (95 %: 0.18 … 0.24)``."""
    span = between(low, high)
    inside = ", ".join(part for part in (f"95 %: {span}" if span else "", what) if part)
    return f"{short(value)} ({inside})" if inside else short(value)


def plain(value: Any) -> Any:
    """A setting as JSON: numbers that are not finite become None, other things text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
