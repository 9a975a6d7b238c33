"""One model over several devices: whole decoder layers on each, in their order, everything else on the first.

So embeddings and head stand where inputs come in and logits go out, as on one device, and a pass moves between devices only
where a layer's inputs do: at the borders, and behind the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.core.errors import Infeasible
from isoflop.core.stage import StageContext
from isoflop.models.decoder_model import layers_of
from isoflop.models.memory import memory_of
from isoflop.models.moving import moved

_STEPS = 60  # halvings of the fullest device's share: exact for any number of bytes


class NoRoom(Infeasible):
    """The free memory of a worker's devices is too little for the weights of a model."""


def device_map(ref: str, module: nn.Module, decoder: Any, free: Mapping[str, float], itemsize: int) -> dict[str, str]:
    """Where each part of a model lies, by its name: the fullest device is as empty as whole layers allow.

    Args:
        ref: of the model, for messages.
        module: may be on the device ``meta``.
        decoder: inside it.
        free: bytes that each device has room for, the first one first.
        itemsize: bytes of an element as it is loaded.

    Raises:
        NoRoom: the devices have too little for the weights.
    """
    names = {id(part): name for name, part in module.named_modules()}
    layers = [(names[id(layer)], _bytes(layer, itemsize)) for layer in layers_of(decoder)]
    inner = {name for name, _ in layers}
    around = list(_around(module, "", inner))
    first = _bytes(module, itemsize) - sum(size for _, size in layers)
    sizes, rooms = [size for _, size in layers], list(free.values())
    counts = _counts(first, sizes, rooms, 1.0)
    if counts is None:
        have = ", ".join(_said(room) for room in rooms)
        raise NoRoom(
            f"model {ref}: {_said(first + sum(sizes))} of weights, of them {_said(first)} beside the decoder's {len(sizes)} layers of up to "
            f"{_said(max(sizes))}, and {len(rooms)} devices with room for {have}; allowed: more GPUs for a job (resources: {{gpus: …}}), or a "
            "smaller dtype"
        )
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        share = (low + high) / 2
        found = _counts(first, sizes, rooms, share)
        low, high, counts = (share, high, counts) if found is None else (low, share, found)
    of_layer = [device for device, count in zip(free, counts, strict=True) for _ in range(count)]
    return {
        **dict.fromkeys(around, next(iter(free))),
        **{name: device for (name, _), device in zip(layers, of_layer, strict=True)},
    }


def devices_for(
    ref: str, ctx: StageContext, skeleton: Callable[[], tuple[nn.Module, Any]], dtype: torch.dtype
) -> dict[str, str]:
    """``device_map`` over the worker's devices, by what is free on them; empty where it has one.

    Args:
        skeleton: gives the model and its decoder, without memory for their weights.
        dtype: that it is loaded in.

    Raises:
        NoRoom: see ``device_map``.
    """
    if len(ctx.devices) < 2:
        return {}
    free = {device: memory_of(device)[0] for device in ctx.devices}
    return device_map(ref, *skeleton(), free, dtype.itemsize)


def placed(module: Any, decoder: Any, device: str, devices: Mapping[str, str]) -> Any:
    """A model for inference, on one device, or over those of ``devices`` where there are any."""
    if devices:
        spread(module, decoder, devices)
    else:
        module.to(device)
    return module.eval().requires_grad_(False)


def spread(module: nn.Module, decoder: Any, devices: Mapping[str, str]) -> None:
    """Move a model's parts to their devices, and have inputs of layers follow them.

    Before anything else looks at it, what is handed to a layer is on the layer's device, and what the last one gives is back on the
    first device. (Hooks of ``accelerate`` would move inputs behind those that occupants and taps put in front of a layer.)

    Args:
        devices: of ``device_map``.
    """
    parts = dict(module.named_modules())
    for name, device in devices.items():
        if name in parts:
            parts[name].to(device)
        else:  # a parameter or buffer beside the parts
            holder, _, own = name.rpartition(".")
            tensor = getattr(parts[holder], own)
            tensor.data = tensor.data.to(device)
    layers, names = layers_of(decoder), {id(part): name for name, part in parts.items()}
    for layer in layers:
        layer.register_forward_pre_hook(_arriving(devices[names[id(layer)]]), with_kwargs=True)
    layers[-1].register_forward_hook(_leaving(next(iter(devices.values()))))


def _arriving(device: str) -> Callable[..., Any]:
    return lambda _, args, kwargs: (moved(args, device), moved(kwargs, device))


def _leaving(device: str) -> Callable[..., Any]:
    return lambda _, args, output: moved(output, device)


def _counts(first: float, sizes: Sequence[float], rooms: Sequence[float], share: float) -> list[int] | None:
    """Layers on each device where none is fuller than a share of its room; None where they do not fit so."""
    counts, at = [], 0
    for number, room in enumerate(rooms):
        held, start = (0.0 if number else first), at
        if held > share * room:
            return None
        while at < len(sizes) and held + sizes[at] <= share * room:
            held += sizes[at]
            at += 1
        counts.append(at - start)
    return counts if at == len(sizes) else None


def _around(module: nn.Module, name: str, layers: set[str]) -> Iterator[str]:
    """The largest parts without a layer inside, and parameters beside them."""
    prefix = f"{name}." if name else ""
    yield from (prefix + own for own, _ in module.named_parameters(recurse=False))
    yield from (prefix + own for own, _ in module.named_buffers(recurse=False))
    for own, part in module.named_children():
        inner = prefix + own
        if inner in layers:
            continue
        if any(layer.startswith(f"{inner}.") for layer in layers):
            yield from _around(part, inner, layers)
        else:
            yield inner


def _bytes(module: nn.Module, itemsize: int) -> float:
    """Of parameters and buffers, each once, floating ones in the type that they are loaded in."""
    tensors: dict[int, Tensor] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return float(sum(t.numel() * (itemsize if t.is_floating_point() else t.element_size()) for t in tensors.values()))


def _said(size: float) -> str:
    unit, factor = next(((u, f) for u, f in (("GiB", 2**30), ("MiB", 2**20)) if size >= f), ("KiB", 2**10))
    return f"{size / factor:.1f} {unit}"
