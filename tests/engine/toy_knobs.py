"""Toy methods with knobs that are lists, and with steps; a sweep imports them beside ``toy_parts``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from toy_parts import ToyMethod, ToyModel

from isoflop.core.knobs import Knob
from isoflop.methods.base import METHODS


@METHODS.register("toy-lists")
@dataclass(frozen=True)
class ToyLists(ToyMethod):
    """A number per layer, a schedule that is one of three, and a list of words."""

    widths: Annotated[tuple[int, ...], Knob(low=1, high=64, ratio=True, doc="tokens per layer")] = (4, 8)
    schedule: Annotated[
        tuple[float, ...], Knob(choices=((1.0,), (1.0, 0.5), (1.0, 0.5, 0.25)), doc="share kept from stage to stage")
    ] = (1.0,)
    words: Annotated[tuple[str, ...], Knob(doc="marks")] = ()

    def change(self, model: ToyModel, prepared: Any) -> None:
        assert isinstance(self.widths, tuple)
        assert isinstance(self.schedule, tuple)
        model.tokens = sum(self.widths) / len(self.widths)
        model.factor *= sum(self.schedule) / len(self.schedule)


@METHODS.register("toy-steps")
@dataclass(frozen=True)
class ToySteps(ToyMethod):
    """Numbers on grids."""

    heads: Annotated[int, Knob(low=2, high=14, step=4, ratio=True, doc="heads that are kept")] = 2
    rate: Annotated[float, Knob(low=0.1, high=0.9, step=0.1, doc="share")] = 0.1
    gains: Annotated[tuple[float, ...], Knob(low=0.0, high=1.0, step=0.25, doc="per layer")] = (0.5,)

    def change(self, model: ToyModel, prepared: Any) -> None:
        model.tokens = float(self.heads)
        model.factor *= self.rate
