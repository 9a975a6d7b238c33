"""Moving what holds tensors between devices."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def moved(value: T, device: torch.device | str) -> T:
    """Tensors in tuples, lists, dictionaries and dataclasses on a device, those that are there themselves; all else, caches too, as it is."""
    return cast("T", _moved(value, device))


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) is dict:
        return {name: _moved(item, device) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value) if f.init})
    return value
