"""PyramidKV: more of the cache for lower layers, less for higher ones (arXiv 2406.02069)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from isoflop.core.hook import Hook
from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS
from isoflop.methods.kv_cache.base import full_layers
from isoflop.methods.kv_cache.select import count_of
from isoflop.methods.kv_cache.snapkv import SnapKV
from isoflop.models.base import Model
from isoflop.models.hooks.occupant import Occupant


@dataclass(frozen=True)
class Layers:
    """The layers that a pyramid is built of, lowest first."""

    numbers: Sequence[int]


@METHODS.register("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall in equal steps from layer to layer; their mean is ``keep``.

    The highest layer keeps 1/beta of the mean budget beside the observation window, the lowest what that leaves. Where twice the
    mean budget is more than the prompt, all layers keep the same, as in the released code.
    """

    paper: ClassVar[str] = "arXiv 2406.02069"

    beta: Annotated[int, Knob(low=1, high=1000, log=True, doc="mean budget over that of the highest layer, windows left out; ada-kv: with base: pyramidkv")] = 20  # fmt: skip

    def occupants(self, model: Model, prepared: Any) -> dict[Hook[Any], Occupant]:
        """The cache, which knows how many layers there are."""
        return super().occupants(model, Layers(full_layers(model.info)))

    def counts(self, layer: int, seen: list[int], prepared: Any) -> list[int]:
        """Of this layer, row by row."""
        layers = prepared.numbers if isinstance(prepared, Layers) else ()
        if layer not in layers:
            raise ValueError("method pyramidkv: compress() needs the layers of the model")
        place = list(layers).index(layer)
        return [layer_budget(count_of(self.keep, n), self.window, self.beta, n, place, len(layers)) for n in seen]


def layer_budget(mean: int, window: int, beta: int, tokens: int, layer: int, layers: int) -> int:
    """Tokens that one of ``layers`` keeps, its window included (section 3.2; equal to the released code's)."""
    free = mean - window
    if layers == 1 or free <= 0 or tokens <= mean or tokens < 2 * free:
        return mean
    least = free // beta
    most = 2 * free - least
    if most >= tokens - window:
        most = tokens - window
        least = 2 * free - most
    return most - layer * ((most - least) // (layers - 1)) + window
