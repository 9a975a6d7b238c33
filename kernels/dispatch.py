"""Which implementation of an operation runs: its plain torch twin or its Triton kernel.

The body of a decorated function is the twin: the reference, and what runs on every device but CUDA. The Triton half lives
in a module of its own that is imported at its first use, so that nothing here needs triton or a GPU.

A kernel is off by default until ``isoflop bench kernels`` has shown on a GPU that it beats stock torch at the same shape;
``measured=True`` in its decorator records that. Switch kernels on and off by ``use(name, on)``, or by the environment
variable ``ISOFLOP_KERNELS``: ``all``, ``none``, or names separated by commas, each with ``-`` in front to switch it off
(``all,-merge_tokens``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

VARIABLE = "ISOFLOP_KERNELS"
_MODULES = ("quant", "column_scores", "decode_segments", "merge")
_OPERATIONS: dict[str, Operation[Any, Any]] = {}
_CHOSEN: dict[str, bool] = {}


class Operation(Generic[P, R]):
    """A function with two implementations; calling it picks one.

    Attributes:
        name: in the registry, in ``use`` and in the environment variable.
        twin: the plain torch implementation.
        measured: whether a GPU measurement has shown the kernel to be faster than stock torch.
    """

    def __init__(
        self, twin: Callable[P, R], fused: str, supports: Callable[P, bool] | None = None, measured: bool = False
    ) -> None:
        self.name = twin.__name__
        self.twin = twin
        self.measured = measured
        self._path = fused
        self._supports = supports
        functools.update_wrapper(self, twin)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the Triton kernel if it is switched on, fits these arguments and no gradient is needed; else the twin."""
        return (self.fused if self.fuses(*args, **kwargs) else self.twin)(*args, **kwargs)

    def fuses(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether a call with these arguments runs the Triton kernel."""
        return self.switched_on() and _on_cuda(args, kwargs) and _has_triton() and self.supports(*args, **kwargs)

    def supports(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether the Triton kernel covers these arguments; the twin covers all."""
        return self._supports is None or self._supports(*args, **kwargs)

    @property
    def fused(self) -> Callable[P, R]:
        """The Triton implementation, whatever is switched on."""
        module, _, attribute = self._path.partition(":")
        found: Callable[P, R] = getattr(importlib.import_module(module), attribute)
        return found

    def switched_on(self) -> bool:
        """Whether the kernel may run on CUDA tensors."""
        if self.name in _CHOSEN:
            return _CHOSEN[self.name]
        wish = _wishes(os.environ.get(VARIABLE, ""))
        return wish.get(self.name, wish.get("all", self.measured))


def operation(
    fused: str, supports: Callable[P, bool] | None = None, measured: bool = False
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Decorate a twin.

    Args:
        fused: ``module:function`` of the Triton half, with the same signature.
        supports: says whether the Triton half covers given arguments.
        measured: True once a GPU measurement has shown the kernel to be faster than stock torch.
    """

    def wrap(twin: Callable[P, R]) -> Operation[P, R]:
        made = Operation(twin, fused, supports, measured)
        _OPERATIONS[made.name] = made
        return made

    return wrap


def use(name: str, on: bool | None = True) -> None:
    """Switch one kernel on or off in this process; None goes back to the default.

    Raises:
        ValueError: no kernel has this name.
    """
    _check_name(name, "")
    if on is None:
        _CHOSEN.pop(name, None)
    else:
        _CHOSEN[name] = on


def leaves(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif is_dataclass(value):
        for part in fields(value):
            yield from leaves(getattr(value, part.name))


def operations() -> dict[str, Operation[Any, Any]]:
    """Every operation with a kernel, by name."""
    for module in _MODULES:
        importlib.import_module(f"isoflop.kernels.{module}")
    return dict(_OPERATIONS)


def _check_name(name: str, where: str) -> None:
    if name not in _OPERATIONS and name not in operations():
        raise ValueError(f"{where}unknown kernel {name!r}; allowed: {', '.join(sorted(_OPERATIONS))}")


@functools.lru_cache(maxsize=8)
def _wishes(text: str) -> dict[str, bool]:
    """``all,-merge_tokens`` as ``{"all": True, "merge_tokens": False}``; ``none`` is ``-all``."""
    found = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name = "all" if word == "none" else word.removeprefix("-")
        if name != "all":
            _check_name(name, f"{VARIABLE}={text}: ")
        found[name] = not word.startswith("-") and word != "none"
    return found


def _on_cuda(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    found = list(leaves((args, kwargs)))
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in found)
    return bool(found) and not gradients and all(t.is_cuda for t in found)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
