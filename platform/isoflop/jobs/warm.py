"""Loaded models that a worker keeps between jobs: as many as its memory has room for beside the next one."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from isoflop.models.base import Model, ModelInfo

MOST_WARM = 4
"""However small they are: who hands out jobs remembers so many."""
_ROOM_FOR_WORK = {"cuda": 0.3, "cpu": 0.1}  # of the device's memory, left to caches and activations of the job itself
_MORE = 1.5  # of a model's counted parameters: embeddings, a tower, and what loading takes


class WarmModels:
    """The models last used, by key.

    Args:
        device: where they are.
        memory: free and total bytes of it; measured when None.
    """

    def __init__(self, device: str, memory: Callable[[], tuple[float, float]] | None = None) -> None:
        self._kind = device.split(":")[0]
        self._memory = memory or (lambda: memory_of(self._kind))
        self._models: OrderedDict[str, Model] = OrderedDict()

    def __len__(self) -> int:
        return len(self._models)

    def held(self) -> list[str]:
        """Least recently used first."""
        return list(self._models)

    def get(self, key: str) -> Model | None:
        """A warm model, which becomes the last one used."""
        if key in self._models:
            self._models.move_to_end(key)
        return self._models.get(key)

    def make_room(self, info: ModelInfo) -> None:
        """Drop models, the longest unused first, until one more fits, by memory and by number."""
        needed = _MORE * info.n_params * info.dense_bits / 8
        while self._models and (len(self._models) >= MOST_WARM or not self._fits(needed)):
            self._models.popitem(last=False)
            release(self._kind)

    def put(self, key: str, model: Model) -> None:
        """The model that was loaded last."""
        self._models[key] = model

    def clear(self) -> None:
        """Forget all."""
        self._models.clear()
        release(self._kind)

    def _fits(self, needed: float) -> bool:
        free, total = self._memory()
        return free - needed >= _ROOM_FOR_WORK.get(self._kind, 0.3) * total


def release(kind: str) -> None:
    """Give memory of objects that nothing refers to any more back to the device."""
    gc.collect()
    if kind == "cuda":
        import torch

        torch.cuda.empty_cache()


def memory_of(kind: str) -> tuple[float, float]:
    """Free and total bytes of an accelerator, or of this host as far as its control group lets it be used."""
    if kind == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        return float(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()), float(total)
    found = {line.split(":")[0]: 1024.0 * int(line.split()[1]) for line in _lines("/proc/meminfo") if "kB" in line}
    nothing_known = float("inf")
    host_free, host_total = found.get("MemAvailable", nothing_known), found.get("MemTotal", nothing_known)
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        # files that were read count as used, though they make room where somebody needs it: weights, above all
        stat = dict(line.split() for line in _lines("/sys/fs/cgroup/memory.stat"))
        files = float(stat.get("active_file", 0)) + float(stat.get("inactive_file", 0))
        own_free = float(limit[0]) - float(used[0]) + files
        return min(host_free, own_free), min(host_total, float(limit[0]))
    return host_free, host_total


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # another system has no such file: nothing is known, and nothing is short
        return []
