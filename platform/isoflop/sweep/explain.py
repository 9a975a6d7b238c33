"""One line for what is wrong with a sweep's YAML: file, line, key, value, what is allowed, the nearest right name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from isoflop.core.errors import nearest
from isoflop.core.yaml_source import KeyPath, Source
from isoflop.sweep import blocks


def explain(error: ValidationError, source: Source, whole: type[blocks.Block]) -> str:
    """One line for the first problem; says how many more there are."""
    problems = error.errors(include_url=False, include_context=True)
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")  # a misspelt key also makes the right one missing
    first = problems[0]
    path = _real_path(first["loc"], source)
    where = source.where(path)
    kind, value = first["type"], first.get("input")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if kind == "extra_forbidden":
        key = str(first["loc"][-1])
        allowed = _allowed_keys(first["loc"][:-1], whole)
        hint = nearest(key, allowed)
        guess = f" (did you mean {hint!r}?)" if hint else ""
        return f"{where}: unknown key {key!r}{guess}; allowed: {', '.join(allowed)}{more}"
    if kind == "missing":
        return f"{source.where(path[:-1])}: the key {first['loc'][-1]!r} is missing{more}"
    shown = "" if isinstance(value, (Mapping, list, tuple, BaseModel)) else f" {value!r}"
    if kind == "literal_error":
        options = [o.strip(" '") for o in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        hint = nearest(str(value), options)
        guess = f" (did you mean {hint!r}?)" if hint else ""
        return f"{where}:{shown} is not allowed{guess}; allowed: {', '.join(options)}{more}"
    if kind == "too_short":
        return f"{where}: is empty; at least one entry is needed{more}"
    text = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    text = text[0].lower() + text[1:]
    return f"{where}:{shown} {text}{more}" if shown else f"{where}: {text}{more}"


def _real_path(loc: tuple[int | str, ...], source: Source) -> KeyPath:
    """Pydantic's location without the parts that the file does not have (a knob's ``knobs`` level, say)."""
    path: list[str | int] = []
    data: Any = source.data
    for part in loc:
        found = (
            part in data
            if isinstance(data, Mapping)
            else isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if found:
            path.append(part)
            data = data[part]
        elif isinstance(data, Mapping) and len(data) == 1 and part in ("knobs", "options"):
            (name,) = data
            path.append(name)
            data = data[name]
    if (
        loc
        and loc[-1] not in path[-1:]
        and isinstance(data, Mapping)
        and isinstance(loc[-1], str)
        and loc[-1] not in ("knobs", "options", "name", "ref", "values", "value")
    ):
        path.append(loc[-1])
    return tuple(path)


_BLOCKS: dict[str, type[blocks.Block]] = {
    "search": blocks.SearchBlock,
    "target": blocks.TargetBlock,
    "objectives": blocks.Objective,
    "budget": blocks.Budget,
    "resources": blocks.ResourcesBlock,
    "limits": blocks.Limits,
    "laws": blocks.LawBlock,
    "frontiers": blocks.FrontierBlock,
    "knobs": blocks.KnobEntry,
    "models": blocks.ModelEntry,
    "methods": blocks.MethodEntry,
    "tasks": blocks.TaskEntry,
}


def _allowed_keys(loc: tuple[int | str, ...], whole: type[blocks.Block]) -> list[str]:
    block = whole
    for part in loc:
        block = _BLOCKS.get(str(part), block)
    return [field.alias or name for name, field in block.model_fields.items()]
