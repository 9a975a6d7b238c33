"""JSON files of a checkpoint: read, and looked at value by value, so that what is wrong is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from isoflop.core.errors import UserError

T = TypeVar("T")


def read_json(path: Path, kind: type[T], where: str = "") -> T:
    """What a JSON file holds.

    Args:
        kind: ``dict`` or ``list``.
        where: put before a message, as ``model hf:…: ``.

    Raises:
        UserError: there is no such file, it is no JSON, or it holds something else.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{where}{path} is no valid JSON ({error})") from error
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "a list"
        raise UserError(f"{where}{path} holds a JSON value of the type {type(found).__name__}; allowed: {wanted}")
    return found


def value_of(stored: dict[str, Any], key: str, kind: type[T], default: T, path: Path) -> T:
    """A value of a file; the default where it is not there, or null.

    Raises:
        UserError: it has another type.
    """
    found = stored.get(key)
    if found is None:
        return default
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise UserError(f"{path}: {key} = {found!r}; allowed: {_NAMES[kind]}")
    return found


_NAMES: dict[type, str] = {
    int: "a whole number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
