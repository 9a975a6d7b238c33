"""What a method family offers to the conformance suite: a small untrained model, examples, and one measured cost.

A family's base class overrides ``Method.probe`` and returns an instance; every method of the family is then checked by
``isoflop.testing.check_method`` without a line of its own. Everything must run in seconds on one CPU core.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from isoflop.core.knobs import KnobValue
from isoflop.core.stage import StageContext
from isoflop.methods.base import Method
from isoflop.models.base import Model


@dataclass(frozen=True)
class AbsoluteCost:
    """A cost worked out by hand, from shapes and nothing that is measured.

    Attributes:
        method: the configuration, applied on the probe's model.
        what: ``cost``, a key of its footprint, or another word that ``Probe.read`` knows.
        value: what must be read, within rounding of the last digits.
    """

    method: Method
    what: str
    value: float


class Probe(ABC):
    """A model and examples to try a method on.

    Attributes:
        model: loaded, in evaluation mode, with fixed untrained weights.
        ctx: the stage context that is handed to ``footprint``.
        examples: how many examples ``outputs`` knows.
        exact: at ratio 1 the outputs must be bit-equal; False where the hook itself adds up in another order.
        tolerance: by how much outputs may differ that are equal but for the order of additions, relative to the largest.
    """

    model: Model
    ctx: StageContext
    examples: int
    exact: bool = True
    tolerance: float = 1e-5

    @abstractmethod
    def prepared(self, method: Method, seed: int) -> Any:
        """What ``apply`` gets: the method's weights as initialised under ``seed``, untrained, or None."""

    def forget(self) -> None:  # noqa: B027
        """Drop what ``prepared`` keeps, so that it is computed anew."""

    def trained(self, method: Method, prepared: Any) -> Any:
        """What training the method would see of its knobs besides the outputs: tensors or plain values, or None."""
        return None

    def settings(self, knob: str) -> Sequence[Mapping[str, KnobValue]]:
        """Settings between which a knob must show an effect; by default none, and the suite goes through its range.

        For knobs whose values the suite cannot guess (free text), and for those that act only together with another.
        """
        return ()

    def untouched(self, method: Method) -> Sequence[int]:
        """Examples on which ``method``, at its defaults, must give the bare model's outputs; by default none.

        The identity of methods without a ratio, which have nothing to do there.
        """
        return ()

    def absolute(self) -> Sequence[AbsoluteCost]:
        """Costs of some configurations of the family as numbers worked out by hand; the formula stands in the docstring.

        A ratio says nothing of an error that both of its sides share. By default none, which a check finds missing.
        """
        return ()

    def read(self, method: Method, what: str) -> float:
        """What ``absolute`` names, measured with ``method`` in place."""
        cost = self.cost()
        return cost if what == "cost" else method.footprint(self.model, self.ctx)[what]

    def verify(self, method: Method, prepared: Any) -> None:  # noqa: B027
        """Raise AssertionError when ``method``, which is applied now, breaks a promise of its own family."""

    @abstractmethod
    def outputs(self, rows: Sequence[int]) -> Tensor:
        """The model's outputs, as it is now, for some examples run as one batch: one row per example."""

    @abstractmethod
    def cost(self) -> float:
        """The measured cost, with the methods that are applied now, that the family's ratio knob is there to change."""
