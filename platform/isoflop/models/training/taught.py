"""What a training asks of the methods that take part in it. Models know no methods: these are the shapes that they have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from isoflop.core.errors import Infeasible, UserError
from isoflop.core.hook import Hook, names_of
from isoflop.core.stage import Stage
from isoflop.models.hooks.occupant import Occupant

if TYPE_CHECKING:
    from isoflop.models.base import Model, ModelInfo

DENSE, TRAINED = "dense", "trained"


@dataclass(frozen=True)
class Teacher:
    """Whose logits a training follows besides the targets.

    Attributes:
        source: ``dense``: the model as it is at that step, without the methods; ``trained``: the model as its family trains it
            without them, a stage of its own.
        weight: of the divergence in the loss; the targets keep 1 - weight.
        temperature: both logits are divided by it, and the divergence multiplied by its square.
    """

    source: str = DENSE
    weight: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class InTraining:
    """What ``occupants`` is given while a method is trained: its own weights as they are now, with gradients."""

    module: nn.Module | None


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

    @property
    def special_training(self) -> bool:
        """Whether a training must know more of it than occupants and weights: teacher, extra loss, what learns."""

    @property
    def teacher(self) -> Teacher | None:
        """Whom its training follows, or None."""

    def as_field(self) -> tuple[Any, ...]:
        """What names it in a stage's key."""

    def as_trained(self) -> Any:
        """The configuration that takes part, equal for all values of knobs that act at inference only."""

    def trains(self, parameter: str) -> bool:
        """Whether a parameter of the model, by its name in the module, learns while the method takes part."""

    def untrained(self, info: Any, seed: int) -> nn.Module | None:
        """Its own weights as they are before training, or None where it has none."""

    def budgets(self, step: int, steps: int, seed: int) -> Sequence[tuple[float, Any]]:
        """What it is in one step of the training: configurations with their weights in the loss."""

    def occupants(self, model: Any, prepared: Any) -> Mapping[Hook[Any], Occupant]:
        """What sits in its hooks; ``prepared`` is ``InTraining``."""

    def extra_loss(self, model: Model, occupants: Mapping[Hook[Any], Occupant]) -> Tensor | None:
        """Added to the loss behind a pass with its occupants in place, or None."""

    def check(self, info: ModelInfo) -> None:
        """Raise Infeasible when it cannot work on the model."""

    def idle(self, info: ModelInfo) -> bool:
        """Whether it acts nowhere in the model; then it takes part in no training."""

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Any, ...] = ()
    ) -> Stage | None:
        """The stage that trains or calibrates it, or None."""


TaughtT = TypeVar("TaughtT", bound=Taught)


@contextmanager
def in_its_hooks(method: Taught, model: Model, prepared: Any) -> Iterator[Mapping[Hook[Any], Occupant]]:
    """Inside the ``with`` block a method's occupants sit in its hooks, put there in the hooks' order.

    Raises:
        UserError: it has an occupant for a hook that it does not name, of which plans would know nothing.
    """
    found = method.occupants(model, prepared)
    strangers = names_of(found.keys() - set(method.hooks))
    if strangers:
        raise UserError(
            f"method {method.name} has an occupant for {', '.join(strangers)}, and names "
            f"{', '.join(names_of(method.hooks)) or 'no hook'} in `hooks`"
        )
    with ExitStack() as stack:
        for hook in sorted(found, key=lambda hook: hook.order):
            stack.enter_context(model.occupy(hook, found[hook]))
        yield found


def one_per_hook(methods: Iterable[Taught]) -> None:
    """Raise Infeasible when two methods of a trial take the same hook."""
    taken: dict[str, str] = {}
    for method in methods:
        for name in names_of(method.hooks):
            if name in taken:
                sharing = getattr(method, "sharing", "")
                raise Infeasible(
                    f"methods {taken[name]} and {method.name} both take {name}; a trial has one method there"
                    + (f", or {sharing}" if sharing else "")
                )
            taken[name] = method.name
