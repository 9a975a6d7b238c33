"""Knobs: a hyper-parameter's type, range, scale and meaning, written once, in the annotation of a dataclass field.

From the same annotation come the Optuna distribution, the YAML schema, the validation messages and the documentation::

    @dataclass(frozen=True)
    class QueCC(VisualTokenMethod):
        k: Annotated[int, Knob(low=1, high=24, ratio=True, doc="window side; V = (P/k)^2")] = 4

A knob of a ``tuple[float, ...]`` (a number per layer, a schedule) is a list in YAML, in job ids and in rows; its bounds and its
step are those of each item, its choices are whole lists.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from isoflop.core.errors import UserError, nearest, unknown

Scalar = bool | int | float | str
KnobValue = Scalar | tuple[Scalar, ...]
_TYPE_NAMES: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS: dict[type, str] = {int: "whole numbers", float: "numbers", bool: "true and false", str: "texts"}
_LONGEST = 200  # characters of a value in a message
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")
_ON_GRID = 1e-6  # of a step; decimals are not exact
ROUNDING = 1e-12  # of a number; a few thousand additions in double precision stay within it
LARGEST_INT = 2**63 - 1  # of results' columns, SQL and samplers
LARGEST_COUNTED = 2**53  # up to here a double tells whole numbers apart, as samplers need


@dataclass(frozen=True)
class Knob:
    """Range of one knob.

    Args:
        low, high: inclusive bounds of a number; of each item of a list.
        log: search (and plot) on a log scale.
        step: grid of a number, counted from ``low`` (0 without one); values between are refused, and never proposed.
        choices: the allowed values, in order; excludes bounds. Numbers, strings, or whole lists.
        ratio: this knob sets the compression ratio.
        path: names a file, a folder or a data set. Relative ones are taken from where the sweep's YAML lies; what stands there
            names a job, not the place.
        newer: came when there were results already, so that ids of jobs and stages have it only where it is not at its default.
        unit: "tokens", "bits", …; empty when it has none.
        doc: one line for people.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[KnobValue, ...] | None = None
    ratio: bool = False
    path: bool = False
    newer: bool = False
    unit: str = ""
    doc: str = ""


@dataclass(frozen=True)
class KnobSpec:
    """One knob of one class: its annotation together with name, type and default.

    Attributes:
        type: of a value; of each item where the knob is a list (``many``).
    """

    name: str
    type: type
    default: Any
    knob: Knob
    many: bool = False

    @property
    def required(self) -> bool:
        """True when the class gives no default."""
        return self.default is dataclasses.MISSING

    @property
    def type_name(self) -> str:
        """``int``, or ``list of int``."""
        return f"list of {self.type.__name__}" if self.many else self.type.__name__

    def describe(self) -> str:
        """The allowed values in words: ``1 … 36 (log)``, ``mean | max`` or ``list of 0 … 1``."""
        knob = self.knob
        if knob.path:
            return "a path"
        if knob.choices is not None:
            return " | ".join(shown(c) for c in knob.choices)
        bounded = knob.low is not None or knob.high is not None or knob.step is not None
        if self.many:
            return f"list of {self._range() if bounded else _PLURALS.get(self.type, self.type.__name__)}"
        if self.type is bool:
            return "true | false"
        return self._range() if bounded else _TYPE_NAMES.get(self.type, self.type.__name__)

    def _range(self) -> str:
        knob = self.knob
        low = "-∞" if knob.low is None else _short(knob.low)
        high = "∞" if knob.high is None else _short(knob.high)
        extra = [w for w, on in (("log", knob.log), (f"step {_short(knob.step or 0)}", knob.step is not None)) if on]
        return f"{low} … {high}" + (f" ({', '.join(extra)})" if extra else "")

    def values_of(self, given: Any) -> tuple[Any, ...]:
        """What a YAML says of a knob as the values that it means: one, or a list of them.

        A list is several values of a plain knob. Of a knob that is a list itself it is one value, and a list of lists several.
        """
        if not isinstance(given, (list, tuple)):
            return (given,)
        if self.many and not any(isinstance(v, (list, tuple)) for v in given):
            return (tuple(given),)
        return tuple(given)

    def check(self, value: Any, where: str = "") -> KnobValue:
        """``value`` in the knob's type; a UserError that says what is allowed when it does not fit."""
        prefix = f"{where}: " if where else ""
        typed = self._list(value, prefix) if self.many else self._typed(value, prefix, value)
        choices = self.knob.choices
        if choices is None:
            return typed
        if typed not in choices:
            hint = None if isinstance(typed, (int, float)) else nearest(shown(typed), [shown(c) for c in choices])
            guess = f" (did you mean {hint if self.many else repr(hint)}?)" if hint else ""
            raise UserError(
                f"{prefix}{self.name} = {shown(value, True)} is not allowed{guess}; allowed: {self.describe()}"
            )
        return typed

    def on_grid(self, value: float) -> bool:
        """Whether a number lies on the knob's grid; always, without a step."""
        step = self.knob.step
        if step is None:
            return True
        steps = (value - (self.knob.low or 0)) / step
        return abs(steps - round(steps)) < _ON_GRID

    def grid_value(self, steps: int) -> float | int:
        """The number that lies so many steps above ``low``, in the digits that people write: .3, not .30000000000000004."""
        return grid_value(self.knob.low or 0, self.knob.step or 1, steps, self.type is int)

    def _list(self, value: Any, prefix: str) -> tuple[Scalar, ...]:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{prefix}{self.name} = {value!r} must be a list; allowed: {self.describe()}")
        return tuple(self._typed(item, prefix, value) for item in value)

    def _typed(self, value: Any, prefix: str, whole: Any) -> Scalar:
        """One number, text or truth value, of the right type, in range and on the grid; ``whole`` is what was given."""
        wanted = self.type
        told = f"{prefix}{self.name} = {_excerpt(shown(whole, True))}" + (
            f": {_excerpt(repr(value))}" if self.many else ""
        )
        good: bool
        if wanted is bool:
            good = isinstance(value, bool)
        elif wanted is int:
            good = not isinstance(value, bool) and (
                isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            )
        elif wanted is float:
            good = not isinstance(value, bool) and isinstance(value, (int, float)) and is_finite(value)
        else:
            good = isinstance(value, wanted)
        if not good:
            name = _TYPE_NAMES.get(wanted, wanted.__name__)
            name = "a finite number" if wanted is float and type(value) in (int, float) else name
            listed = ", not a list" if isinstance(value, (list, tuple)) else ""
            raise UserError(f"{told} must be {name}{listed}; allowed: {self.describe()}")
        typed = typing.cast(Scalar, wanted(value))
        return typed if isinstance(typed, (bool, str)) else self._in_range(typed, told)

    def _in_range(self, number: int | float, told: str) -> int | float:
        knob = self.knob
        if isinstance(number, int) and not -LARGEST_INT - 1 <= number <= LARGEST_INT:
            raise UserError(f"{told} does not fit into 64 bits; allowed: {self.describe()}")
        if knob.choices is not None:
            return number
        if (knob.low is not None and number < knob.low) or (knob.high is not None and number > knob.high):
            raise UserError(f"{told} is out of range; allowed: {self.describe()}")
        if knob.step is None:
            return number
        steps = (number - (knob.low or 0)) / knob.step
        if not self.on_grid(number):
            below, above = (self.grid_value(n) for n in (math.floor(steps), math.ceil(steps)))
            fits = [shown(v) for v in (below, above) if knob.high is None or v <= knob.high]
            raise UserError(f"{told} lies between the steps; allowed: {self.describe()}; nearest: {' and '.join(fits)}")
        return self.grid_value(round(steps))


def is_finite(value: int | float) -> bool:
    """Whether a number is one for a double, too: 10**400 is not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def grid_value(low: float, step: float, steps: int, whole: bool) -> float | int:
    """``low + steps·step`` without the rounding of binary fractions; an int where ``whole``."""
    exact = Decimal(repr(low)) + steps * Decimal(repr(step))
    return int(exact) if whole else float(exact)


def same(a: KnobValue, b: KnobValue, scale: float = 0.0) -> bool:
    """Whether two values differ by no more than the rounding of binary fractions, as .3 and .1 + .2 do.

    Args:
        scale: the largest of the numbers that were added up; their sum may miss 0 by some of its rounding.
    """
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y, scale) for x, y in zip(a, b, strict=True))
    if isinstance(a, (bool, str, tuple)) or isinstance(b, (bool, str, tuple)) or float not in (type(a), type(b)):
        return type(a) is type(b) and a == b
    return math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING * scale)


def shown(value: Any, quoted: bool = False) -> str:
    """A knob's value in a message: lists as JSON writes them; text in quotes where ``quoted``."""
    if isinstance(value, (list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return repr(value) if quoted else str(value)


def frozen(value: Any) -> Any:
    """A value as JSON or YAML has it, with tuples for lists, so that it can be hashed."""
    return tuple(frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


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
            kind, many = _plain_type(typing.get_args(hint)[0], f"{cls.__name__}.{field.name}")
            specs[field.name] = KnobSpec(field.name, kind, field.default, found[0], many)
    return specs


def _plain_type(hint: Any, where: str) -> tuple[Any, bool]:
    """The type of a knob's values, and whether they are lists of it.

    ``float | None`` is a number that has no value until somebody gives one.
    """
    options = [o for o in typing.get_args(hint) if o is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(options) == 1:
        return _plain_type(options[0], where)
    if typing.get_origin(hint) is not tuple:
        return hint, False
    if len(options) != 2 or options[1] is not Ellipsis or options[0] not in _TYPE_NAMES:
        raise TypeError(f"{where}: a knob that is a list is a tuple[T, ...] of int, float, bool or str, not {hint}")
    return options[0], True


def placed(cls: type, values: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """``values`` with the paths among them taken from ``folder``, or from where the process runs; what has a scheme (``hub:…``) stays as it is."""
    paths = path_knobs(cls)
    return {
        name: placed_path(value, folder) if name in paths and isinstance(value, str) else value
        for name, value in values.items()
    }


def placed_path(value: str, folder: Path | None) -> str:
    """One path of ``placed``."""
    if not value or _SCHEME.match(value):
        return value
    return str((Path.cwd() if folder is None else folder) / Path(value).expanduser())


def without_newer(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What names a configuration: newer knobs only where they are not at their defaults."""
    specs = _knob_specs(cls)
    return {
        name: value
        for name, value in values.items()
        if name not in specs or not (specs[name].knob.newer and value == specs[name].default)
    }


def with_newer(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a configuration that was written down before some of them were there."""
    newer = {name: spec.default for name, spec in _knob_specs(cls).items() if spec.knob.newer}
    return {**newer, **values}


def path_knobs(cls: type) -> frozenset[str]:
    """Names of the knobs that are paths."""
    return frozenset(name for name, spec in _knob_specs(cls).items() if spec.knob.path)


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
    given = {name: specs[name].check(value, f"{where}: {kind}" if where else kind) for name, value in values.items()}
    result: dict[str, KnobValue] = {}
    for name, spec in specs.items():
        if name in given:
            result[name] = given[name]
        elif spec.required:
            prefix = f"{where}: " if where else ""
            raise UserError(f"{prefix}{kind} needs a value for {name}; allowed: {spec.describe()}")
        else:
            result[name] = spec.default
    return result


def _excerpt(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 4]}… ({len(text)} characters)"


def _short(value: float) -> str:
    return f"{value:g}"
