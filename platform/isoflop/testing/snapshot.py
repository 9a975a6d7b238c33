"""What a method could leave behind in a model, and hashes of what it prepared."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.methods.base import Method


def fingerprint(value: Any) -> str:
    """A hash of the contents of tensors, modules, dataclasses and containers.

    A method that is part of a prepared value does not count: it holds every knob, used or not.
    """
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Method):
        return
    yield type(value).__name__.encode()
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, nn.Module):
        yield from _parts(value.state_dict())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield repr(value).encode()
    elif hasattr(value, "__dict__"):
        yield from _parts(vars(value))


class Snapshot:
    """Everything a method could leave behind in a model: tensors, hooks, replaced methods, settings, attributes."""

    def __init__(self, model: Any) -> None:
        self._tensors = {name: tensor.clone() for name, tensor in _tensors(model.module).items()}
        self._structure = _structure(model)

    def compare(self, model: Any) -> None:
        """Raise AssertionError when the model differs from the snapshot."""
        tensors = _tensors(model.module)
        assert tensors.keys() == self._tensors.keys(), (
            f"parameters or buffers came or went: {sorted(tensors.keys() ^ self._tensors.keys())}"
        )
        for name, tensor in tensors.items():
            assert torch.equal(tensor, self._tensors[name]), f"tensor {name} changed"
        now = _structure(model)
        changed = [
            key for key in sorted(now.keys() | self._structure.keys()) if now.get(key) != self._structure.get(key)
        ]
        assert not changed, f"left behind: {', '.join(changed[:5])}"


_TABLES = frozenset(vars(nn.Module()))
"""Attributes that every module has: parameters, buffers, hooks and parts, which are compared by themselves."""


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _structure(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {f"model.{k}": id(v) for k, v in vars(model).items()}
    found["occupied hooks"] = model.occupied
    for name, part in model.module.named_modules():
        found[f"type of {name}"] = type(part)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found[f"{kind} of {name}"] = tuple(getattr(part, kind))
        found[f"training flag of {name}"] = part.training
        own = {k: v for k, v in vars(part).items() if k not in _TABLES}
        found[f"own attributes of {name}"] = tuple(sorted(own))
        found[f"values of {name}"] = {k: v for k, v in own.items() if isinstance(v, (bool, int, float, str))}
        found[f"own forward of {name}"] = id(vars(part).get("forward"))
    found["requires_grad"] = tuple(p.requires_grad for p in model.module.parameters())
    config = getattr(model.module, "config", None)
    if config is not None:
        found["config"] = copy.deepcopy(config.to_dict())
        found["attention implementation"] = getattr(config, "_attn_implementation", None)
    return found
