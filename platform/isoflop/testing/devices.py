"""Devices that are pretended: a processor that refuses what GPUs refuse, so that a model over several of them can be tried without any.

Inside ``PretendedDevices`` a tensor remembers on which device it would lie. What moves it says so, results lie where their
arguments do, and an operation over tensors of two devices raises, as CUDA does. Everything is computed on the processor.
``ELSEWHERE`` is of a type for which neither this project nor transformers has code of its own, which a processor could not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from isoflop.models.decoder_model import DecoderModel, layers_of
from isoflop.models.spread import device_map, spread

HOST, ELSEWHERE = torch.device("cpu"), torch.device("xpu:1")
_PLACE = "_pretended_device"
_GETSET: Any = vars(torch._C.TensorBase)
_DEVICE, _DATA, _GRAD = _GETSET["device"].__get__, _GETSET["data"].__set__, _GETSET["grad"].__set__
_ACROSS = {Tensor.copy_, _DATA, _GRAD, Tensor.__deepcopy__, torch._has_compatible_shallow_copy_type}
"""What may be handed tensors of two devices; its results lie where the first one does."""
_HOST_ONLY: set[Any] = {Tensor.numpy, Tensor.__array__}


class WrongDevice(RuntimeError):
    """An operation that GPUs would refuse."""


class PretendedDevices(TorchFunctionMode):
    """Inside the block devices are told apart. Stricter than CUDA in one thing: indices lie where what they index does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation if its arguments lie on one device, and note where its results lie."""
        kwargs = dict(kwargs or {})
        if func == _DEVICE:
            return place_of(args[0])
        if func in (Tensor.to, Tensor.cpu):
            return _moved(func, *args, **kwargs)
        place = _place_of_results(func, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = HOST
        if func is torch.histc:  # of whole numbers on accelerators only, where routers of experts ask for it
            args = (args[0].float(), *args[1:])
        found = func(*args, **kwargs)
        for tensor in [args[0]] if func == _DATA else _tensors(found):
            setattr(tensor, _PLACE, place)
        return found


@contextmanager
def over_two_devices(model: DecoderModel) -> Iterator[None]:
    """Inside the block a model lies on two devices, with a border between any two layers of its decoder.

    It is the same one afterwards, but for hooks that move what its layers are given.
    """
    room = dict.fromkeys(map(str, (HOST, ELSEWHERE)), float("inf"))
    devices = device_map(model.info.ref, model.module, model.decoder, room, 4)
    names = {id(part): name for name, part in model.module.named_modules()}
    devices |= {names[id(layer)]: str((ELSEWHERE, HOST)[n % 2]) for n, layer in enumerate(layers_of(model.decoder))}
    with PretendedDevices():
        spread(model.module, model.decoder, devices)
        yield


def place_of(tensor: Tensor) -> torch.device:
    """Where a tensor would lie."""
    return getattr(tensor, _PLACE, HOST)


def _place_of_results(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    name = getattr(func, "__name__", str(func))
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if func in _ACROSS:
        return place_of(args[1] if func == _DATA else args[0])
    tensors = list(_tensors((args, kwargs)))
    places = {place_of(t) for t in tensors if t.dim() or place_of(t) != HOST}  # numbers of the host go anywhere
    if len(places) > 1:
        where = ", ".join(f"{tuple(t.shape)} on {place_of(t)}" for t in tensors)
        raise WrongDevice(f"{name}: tensors on two devices: {where}")
    if func in _HOST_ONLY and places - {HOST}:
        raise WrongDevice(f"{name} of a tensor on {place_of(args[0])}")
    return places.pop() if places else HOST


def _moved(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to`` and ``Tensor.cpu``: what comes of it has memory of its own where it moved."""
    device: torch.device | None = HOST if func is Tensor.cpu else None
    rest = list(args)
    if rest and isinstance(rest[0], (str, torch.device, Tensor)):
        given = rest[0]
        device, rest[0] = (place_of(given), given) if isinstance(given, Tensor) else (torch.device(given), HOST)
    elif kwargs.get("device") is not None:
        device, kwargs["device"] = torch.device(kwargs["device"]), HOST
    found: Tensor = func(tensor, *rest, **kwargs)
    where = place_of(tensor) if device is None else device
    if found is tensor and where != place_of(tensor):
        found = tensor.clone()
    setattr(found, _PLACE, where)
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in _tensors(item))
    elif isinstance(value, (tuple, list)):
        yield from (t for item in value for t in _tensors(item))
