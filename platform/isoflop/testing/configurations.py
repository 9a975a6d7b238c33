"""Which values of its knobs a suite tries a method at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from isoflop.core.errors import Infeasible
from isoflop.core.knobs import KnobSpec, KnobValue, knob_specs
from isoflop.methods.base import Method
from isoflop.methods.probe import Probe


def ratio_knob(cls: type[Method]) -> KnobSpec | None:
    """The knob that sets the ratio, where there is one."""
    return next((spec for spec in knob_specs(cls).values() if spec.knob.ratio), None)


def ladder(cls: type[Method], probe: Probe) -> list[Method]:
    """The method at every value of its ratio knob that works on the probe's model; empty without such a knob."""
    ratio = ratio_knob(cls)
    if ratio is None:
        return []
    return [m for m in (with_knobs(cls, {ratio.name: v}) for v in candidates(ratio)) if feasible(m, probe)]


def candidates(spec: KnobSpec) -> list[KnobValue]:
    """Values to try: every choice, small whole numbers, or points along a range; ascending."""
    knob = spec.knob
    if knob.choices is not None:
        return list(knob.choices)
    if spec.type is bool:
        return [False, True]
    if spec.many:
        return [spec.default]
    if spec.type is str:
        return [spec.default, f"{spec.default}-other"]
    low = float(knob.low) if knob.low is not None else float(spec.default) - 1
    high = float(knob.high) if knob.high is not None else float(spec.default) + 1
    if spec.knob.step is not None:
        count = int((high - low) / spec.knob.step + 1e-9)
        return [spec.grid_value(n) for n in range(min(count, 40) + 1)]
    if spec.type is int:
        near = range(int(low), int(min(high, low + 40)) + 1)
        return sorted({*near, int(spec.default), int(high)})
    return sorted({low, low + (high - low) / 4, (low + high) / 2, high, float(spec.default)})


def wrong_values(spec: KnobSpec) -> Iterable[Any]:
    """Values that a knob must refuse: of another type, none of its choices, below and above its range.

    Of a knob that holds a list also each of these as an item.
    """
    if spec.many:
        yield from ("nonsense", 1, {"a": 1})
        yield from ([wrong] for wrong in _wrong_items(spec))
    else:
        yield from _wrong_items(spec)


def _wrong_items(spec: KnobSpec) -> Iterable[Any]:
    if spec.type is not str:
        yield "nonsense"
        yield [1]
        yield float("nan")
    if spec.knob.choices is not None:
        yield "no-such-choice" if spec.type is str else -12345
    if spec.knob.low is not None:
        yield spec.type(spec.knob.low - 1) if spec.type is int else spec.knob.low - 1.0
    if spec.knob.high is not None:
        yield spec.type(spec.knob.high + 1) if spec.type is int else spec.knob.high + 1.0


def with_knobs(cls: type[Method], knobs: dict[str, KnobValue]) -> Method:
    """A configuration whose knobs nobody has checked yet."""
    return cls(**knobs)


def at_default(cls: type[Method], probe: Probe) -> Method:
    """The method at its defaults, or at the first feasible value of its ratio knob."""
    method = cls()
    ratio = ratio_knob(cls)
    if feasible(method, probe) or ratio is None:
        return method
    return next(m for m in (with_knobs(cls, {ratio.name: v}) for v in candidates(ratio)) if feasible(m, probe))


def feasible(method: Method, probe: Probe) -> bool:
    """Whether the probe's model can take the configuration."""
    try:
        method.check(probe.model.info)
    except Infeasible:
        return False
    return True
