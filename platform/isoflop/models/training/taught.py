"""What a training asks of the methods that take part in it. Models know no methods: these are the shapes that they have.

Shape suffixes: S scored positions, W classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from isoflop.core.hook import Hook
from isoflop.core.stage import Stage
from isoflop.models.hooks.occupant import Occupant

if TYPE_CHECKING:
    from isoflop.models.base import Model, ModelInfo


class Taught(Protocol):
    """A method as a family sees it.

    Attributes:
        name, version: as registered.
        hooks: the places that it takes.
        trains_model: it wants to take part in the model's training.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    hooks: ClassVar[tuple[Hook[Any], ...]]
    trains_model: ClassVar[bool]

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the method's own weights."""

    def as_field(self) -> tuple[Any, ...]:
        """What names it in a stage's key."""

    def as_trained(self) -> Self:
        """The configuration that takes part, equal for all values of knobs that act at inference only."""

    def check(self, info: ModelInfo) -> None:
        """Raise Infeasible when it cannot work on the model."""

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Any, ...] = ()
    ) -> Stage | None:
        """The stage that trains or calibrates it, or None."""

    def untrained(self, info: Any, seed: int) -> nn.Module | None:
        """Its own weights as they are before training, or None where it has none."""

    def budgets(self, step: int, steps: int, seed: int) -> Sequence[tuple[float, Self]]:
        """What it is in one step of the training: configurations with their weights in the loss."""

    def occupants(self, model: Any, prepared: Any) -> Mapping[Hook[Any], Occupant]:
        """What sits in its hooks."""

    def extra_loss(self, model: Model, occupants: Mapping[Hook[Any], Occupant]) -> Tensor | None:
        """Added to the loss behind a pass with its occupants in place, or None."""
