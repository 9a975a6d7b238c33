"""Options of strategies and pruners: fields with a ``Knob``, checked like the knobs of methods."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from isoflop.core.errors import UserError, unknown
from isoflop.core.knobs import knob_specs


class Where(Protocol):
    """Names the place of a key below ``search``: ``where("options", "gamma")``."""

    def __call__(self, *path: str | int) -> str:
        """File, line and dotted key, as far as they are known."""


def nowhere(*path: str | int) -> str:
    """The dotted key, where there is no file."""
    return ".".join(("search", *map(str, path)))


def check_options(
    cls: type, options: Mapping[str, Any], kind: str, key: str, where: Where = nowhere, engine: Any = None
) -> dict[str, Any]:
    """The options in their types.

    Args:
        cls: a dataclass whose knobs are the options.
        options: as the YAML gives them; one that is what ``engine`` takes by default is left out.
        kind: what to call the owner in messages ("sampler tpe").
        key: below ``search``, where they stand.
        engine: the class that they are for, which may take more than YAML can hold.

    Raises:
        UserError: naming key, value and what is allowed.
    """
    specs = knob_specs(cls)
    takes = {} if engine is None else dict(inspect.signature(engine).parameters)
    if options and not specs:
        raise UserError(f"{where(key)}: {kind.split()[-1]} takes no options; remove {', '.join(map(str, options))}")
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name in takes and type(value) is type(takes[name].default) and value == takes[name].default:
            continue
        if name in specs:
            checked[name] = specs[name].check(value, where(key, name))
        elif name in takes:
            raise UserError(
                f"{where(key, name)}: {name} = {value!r} is not for a sweep to set: Optuna takes code here, or the sweep "
                f"gives it already; options of {kind}: {', '.join(specs)}"
            )
        else:
            raise unknown(f"option of {kind}", name, specs, where(key))
    return checked
