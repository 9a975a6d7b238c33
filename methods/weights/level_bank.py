"""A bank of levels: each matrix of a model at several levels of compression, computed when asked for, switched in place.

For methods that search over levels per matrix: the order of a stack's blocks, sensitivities, evolutionary allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch.nn import functional as F

from isoflop.methods.weights.payloads import Payload
from isoflop.methods.weights.views import LinearView, replaceable
from isoflop.models.base import Model

Level = TypeVar("Level", bound=Hashable)


class LevelBank(Generic[Level]):
    """Payloads by view and level.

    Args:
        views: of the model.
        encode: the payload of a view at a level; called once for each.
    """

    def __init__(self, views: list[LinearView], encode: Callable[[LinearView, Level], Payload]) -> None:
        self.views = views
        self.levels: dict[str, Level] = {}
        self._encode = encode
        self._payloads: dict[tuple[str, Level], Payload] = {}

    def payload(self, view: LinearView, level: Level) -> Payload:
        """The stored form of a view at a level."""
        key = (view.name, level)
        if key not in self._payloads:
            self._payloads[key] = self._encode(view, level)
        return self._payloads[key]

    @contextmanager
    def in_place(self, model: Model) -> Iterator[None]:
        """Inside the ``with`` block :meth:`switch` changes the model; afterwards it is what it was."""
        with replaceable(model, sorted({view.parameter for view in self.views})):
            try:
                yield
            finally:
                self.levels.clear()

    def switch(self, view: LinearView, level: Level) -> None:
        """Serve a view at a level; costs nothing when it is there already."""
        if view.name not in self.levels or self.levels[view.name] != level:
            view.write(self.payload(view, level).decode())
            self.levels[view.name] = level


@torch.no_grad()
def calibration_loss(model: Model, batches: list[object]) -> float:
    """Mean cross-entropy in nats over the scored positions of batches for ``Model.supervised``."""
    total, count = 0.0, 0
    for batch in batches:
        logits_SW, targets_S = model.supervised(batch)
        total += float(F.cross_entropy(logits_SW.float(), targets_S, reduction="sum"))
        count += targets_S.numel()
    return total / count
