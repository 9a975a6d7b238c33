"""One line for what is wrong with a sweep's YAML: file, line, key, value, what is allowed, the nearest right name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from isoflop.core.errors import nearest
from isoflop.core.yaml_source import KeyPath, Source
from isoflop.sweep import blocks


def explain(error: ValidationError, source: Source, whole: type[blocks.Block]) -> str:
    """One line for the first problem; says how many more there are."""
    problems = _mistakes(error.errors(include_url=False, include_context=True), source, whole)
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")  # a misspelt key rather than what it entails
    first, others = problems[0], len(problems) - 1
    path = _real_path(first["loc"], source)
    where = source.where(path)
    more = f" (and {others} more)" if others else ""
    kind, value = first["type"], first.get("input")
    if kind == "extra_forbidden":
        key = str(first["loc"][-1])
        allowed = _allowed_keys(first["loc"][:-1], whole)
        hint = nearest(key, allowed)
        guess = f" (did you mean {hint!r}?)" if hint else ""
        return f"{where}: unknown key {key!r}{guess}; allowed: {', '.join(allowed)}{more}"
    if kind == "missing":
        return f"{source.where(path[:-1])}: the key {first['loc'][-1]!r} is missing{more}"
    shown = "" if isinstance(value, (Mapping, list, tuple, BaseModel)) else f" {value!r}"
    shown = " has no value;" if value is None else shown
    if kind == "literal_error":
        options = [o.strip(" '") for o in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        hint = nearest(str(value), options)
        guess = f" (did you mean {hint!r}?)" if hint else ""
        return f"{where}:{shown} is not allowed{guess}; allowed: {', '.join(options)}{more}"
    if kind == "too_short":
        return f"{where}: is empty; at least one entry is needed{more}"
    text = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    text = _plainly(text[0].lower() + text[1:])
    return f"{where}:{shown} {text}{more}" if shown else f"{where}: {text}{more}"


_WORDS = {
    r"a valid dictionary( or instance of \w+)?": "a block of keys",
    r"a valid (tuple|list)": "a list",
    r"a valid string": "text",
    r"a valid integer": "a whole number",
    r"a valid (number|boolean)": r"a \1",
}
"""What Pydantic calls the kinds of values, as people who write YAML do."""


def _plainly(text: str) -> str:
    for pattern, words in _WORDS.items():
        text = re.sub(pattern, words, text)
    return text


def _mistakes(problems: list[Any], source: Source, whole: type[blocks.Block]) -> list[Any]:
    """The problems that are mistakes of their own, one per place in the file.

    Pydantic reports a misspelt key also as the right one that is missing, a value that fits none of several types once per
    type, and a list whose entries are wrong as too short.
    """
    misspelt = {
        (tuple(p["loc"][:-1]), nearest(str(p["loc"][-1]), _allowed_keys(p["loc"][:-1], whole)))
        for p in problems
        if p["type"] == "extra_forbidden"
    }
    own = [p for p in problems if p["type"] != "missing" or (tuple(p["loc"][:-1]), str(p["loc"][-1])) not in misspelt]
    places = [_place(p, source) for p in own]
    found: dict[KeyPath, Any] = {}
    for place, problem in zip(places, own, strict=True):
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places):
            found.setdefault(place, problem)
    return list(found.values())


def _place(problem: Any, source: Source) -> KeyPath:
    path = _real_path(problem["loc"], source)
    return path if problem["type"] in ("missing", "extra_forbidden") else _present(path, source)


def _present(path: KeyPath, source: Source) -> KeyPath:
    """The part of a path that the file has: types that Pydantic tried are no keys."""
    data: Any = source.data
    for depth, part in enumerate(path):
        inside = part in data if isinstance(data, Mapping) else isinstance(data, list) and isinstance(part, int)
        if not inside:
            return path[:depth]
        data = data[part]
    return path


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
    "calibration": blocks.CalibrationBlock,
    "knobs": blocks.KnobEntry,
    "models": blocks.ModelEntry,
    "methods": blocks.MethodEntry,
    "tasks": blocks.TaskEntry,
}


_UNIONS: dict[str, type[blocks.Block]] = {"ContenderBlock": blocks.ContenderBlock}
"""Blocks that stand beside a short form: Pydantic names them by their class."""


def _allowed_keys(loc: tuple[int | str, ...], whole: type[blocks.Block]) -> list[str]:
    block = whole
    for part in loc:
        block = _BLOCKS.get(str(part)) or _UNIONS.get(str(part), block)
    return [field.alias or name for name, field in block.model_fields.items()]
