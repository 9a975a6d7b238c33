"""Knobs: a hyper-parameter's type, range, scale and meaning, written once, in the annotation of a dataclass field.

From the same annotation come the Optuna distribution, the YAML schema, the validation messages and the documentation::

    @dataclass(frozen=True)
    class QueCC(VisualTokenMethod):
        k: Annotated[int, Knob(low=1, high=24, ratio=True, doc="window side; V = (P/k)^2")] = 4
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isoflop.core.errors import UserError, nearest, unknown

KnobValue = bool | int | float | str


@dataclass(frozen=True)
class Knob:
    """Range of one knob.

    Args:
        low, high: inclusive bounds of a number.
        log: search (and plot) on a log scale.
        step: grid of a number, counted from ``low``.
        choices: the allowed values, in order; excludes bounds. Numbers or strings.
        ratio: this knob sets the compression ratio.
        unit: "tokens", "bits", …; empty when it has none.
        doc: one line for people.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[KnobValue, ...] | None = None
    ratio: bool = False
    unit: str = ""
    doc: str = ""


@dataclass(frozen=True)
class KnobSpec:
    """One knob of one class: its annotation together with name, type and default."""

    name: str
    type: type
    default: Any
    knob: Knob

    @property
    def required(self) -> bool:
        """True when the class gives no default."""
        return self.default is dataclasses.MISSING

    def describe(self) -> str:
        """The allowed values in words: ``1 … 36 (log)`` or ``mean | max``."""
        knob = self.knob
        if knob.choices is not None:
            return " | ".join(str(c) for c in knob.choices)
        if self.type is bool:
            return "true | false"
        if knob.low is None and knob.high is None:
            return {int: "a whole number", float: "a number", str: "text"}.get(self.type, self.type.__name__)
        low = "-∞" if knob.low is None else _short(knob.low)
        high = "∞" if knob.high is None else _short(knob.high)
        extra = [w for w, on in (("log", knob.log), (f"step {_short(knob.step or 0)}", knob.step is not None)) if on]
        return f"{low} … {high}" + (f" ({', '.join(extra)})" if extra else "")

    def check(self, value: Any, where: str = "") -> KnobValue:
        """``value`` in the knob's type; a UserError that says what is allowed when it does not fit."""
        prefix = f"{where}: " if where else ""
        typed = self._typed(value, prefix)
        knob = self.knob
        if knob.choices is not None and typed not in knob.choices:
            hint = nearest(str(typed), [str(c) for c in knob.choices]) if isinstance(typed, str) else None
            guess = f" (did you mean {hint!r}?)" if hint else ""
            raise UserError(f"{prefix}{self.name} = {value!r} is not allowed{guess}; allowed: {self.describe()}")
        if isinstance(typed, (bool, str)):
            return typed
        if (knob.low is not None and typed < knob.low) or (knob.high is not None and typed > knob.high):
            raise UserError(f"{prefix}{self.name} = {value!r} is out of range; allowed: {self.describe()}")
        return typed

    def _typed(self, value: Any, prefix: str) -> KnobValue:
        wanted = self.type
        good: bool
        if wanted is bool:
            good = isinstance(value, bool)
        elif wanted is int:
            good = not isinstance(value, bool) and (
                isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            )
        elif wanted is float:
            good = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
        else:
            good = isinstance(value, wanted)
        if not good:
            real = "a finite number" if isinstance(value, float) else "a number"
            name = {int: "a whole number", float: real, bool: "true or false", str: "text"}.get(wanted, wanted.__name__)
            raise UserError(f"{prefix}{self.name} = {value!r} must be {name}; allowed: {self.describe()}")
        return typing.cast(KnobValue, wanted(value))


def knob_specs(cls: type) -> dict[str, KnobSpec]:
    """The knobs of a dataclass, in order of declaration. Fields without a ``Knob`` annotation are not knobs."""
    return dict(_knob_specs(cls))


@functools.cache
def _knob_specs(cls: type) -> dict[str, KnobSpec]:
    # reading type hints compiles their text each time, and every job asks
    hints = typing.get_type_hints(cls, include_extras=True)
    specs: dict[str, KnobSpec] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        found = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Knob)]
        if found:
            specs[field.name] = KnobSpec(field.name, _plain_type(typing.get_args(hint)[0]), field.default, found[0])
    return specs


def _plain_type(hint: Any) -> Any:
    """The type of a knob's values: ``float | None`` is a number that has no value until somebody gives one."""
    options = [o for o in typing.get_args(hint) if o is not type(None)]
    return options[0] if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(options) == 1 else hint


def check_knobs(cls: type, values: Mapping[str, Any], kind: str, where: str = "") -> dict[str, KnobValue]:
    """All knobs of ``cls`` with defaults filled in and every value checked.

    Args:
        cls: a dataclass with knobs.
        values: what the user gave.
        kind: what to call the owner in messages ("method quecc").
        where: file, line and key, when known.
    """
    specs = knob_specs(cls)
    for name in values:
        if name not in specs:
            raise unknown(f"knob of {kind}", name, specs, where)
    result: dict[str, KnobValue] = {}
    for name, spec in specs.items():
        if name in values:
            result[name] = spec.check(values[name], f"{where}: {kind}" if where else kind)
        elif spec.required:
            prefix = f"{where}: " if where else ""
            raise UserError(f"{prefix}{kind} needs a value for {name}; allowed: {spec.describe()}")
        else:
            result[name] = spec.default
    return result


def _short(value: float) -> str:
    return f"{value:g}"
