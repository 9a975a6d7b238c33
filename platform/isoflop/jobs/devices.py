"""The devices of a worker: which they are, and what rows call them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from isoflop.core.errors import UserError


def devices_here(gpus: float = 1) -> tuple[str, ...]:
    """The torch devices of a worker that has so many GPUs, or the processor where this process sees none.

    Raises:
        UserError: it sees fewer.
    """
    import torch

    if not torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "all") == "":
        return ("cpu",)
    if gpus <= 1:
        return ("cuda",)
    seen = torch.cuda.device_count()
    if seen < gpus:
        raise UserError(f"resources.gpus = {gpus:g}: this process sees {seen} GPUs; allowed: up to {seen}")
    return tuple(f"cuda:{number}" for number in range(int(gpus)))


def name_of(devices: Sequence[str]) -> str:
    """What rows call the devices of a worker."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices[0].startswith("cuda"):
        import torch

        name = torch.cuda.get_device_name(devices[0])
        several = f"{len(devices)} x {name}" if len(devices) > 1 else name
        return f"{several} [{visible}]" if visible else several
    return "cpu" if not visible else f"cpu [CUDA_VISIBLE_DEVICES={visible}]"
