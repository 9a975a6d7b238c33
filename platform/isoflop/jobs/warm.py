"""Loaded models that a worker keeps between jobs: as many as its memory has room for beside the next one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from isoflop.models.base import Model, ModelInfo
from isoflop.models.memory import memory_of, release

MOST_WARM = 4
"""However small they are: who hands out jobs remembers so many."""
_ROOM_FOR_WORK = {"cuda": 0.3, "cpu": 0.1}  # of the device's memory, left to caches and activations of the job itself
_MORE = 1.5  # of a model's counted parameters: embeddings, a tower, and what loading takes


class WarmModels:
    """The models last used, by key.

    Args:
        devices: over which each of them lies.
        memory: free and total bytes of each; measured when None.
    """

    def __init__(
        self, devices: Sequence[str], memory: Callable[[], Sequence[tuple[float, float]]] | None = None
    ) -> None:
        self._kind = devices[0].split(":")[0]
        self._memory = memory or (lambda: [memory_of(device) for device in devices])
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
        """On every device its part, as even as layers allow, beside the room for work."""
        rooms = self._memory()
        work = _ROOM_FOR_WORK.get(self._kind, 0.3)
        return all(free - needed / len(rooms) >= work * total for free, total in rooms)
