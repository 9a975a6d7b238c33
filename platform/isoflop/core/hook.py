"""Hooks: a place where methods act is one object with one name and one place in the order of application.

A model says which hooks it offers (``ModelInfo.hooks``), a family with which occupants it can train (``ModelFamily.trainable``),
a method which it takes (``Method.hooks``), a task of which it makes something besides running the model (``Task.asks``). What
a method puts there is the hook's *occupant*; ``Model.occupy`` is the one piece of code that puts it there and takes it away.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

OccupantT = TypeVar("OccupantT")


@dataclass(frozen=True)
class Hook(Generic[OccupantT]):
    """A place where methods act. Equal by name, so that it can be pickled.

    Subclasses override ``installed`` where the model must be changed for an occupant to be asked.

    Attributes:
        name: in messages, ``isoflop models`` and ``isoflop methods``.
        order: of application in a trial with several methods, ascending: what comes first along a model's way, the
            weights before everything that runs through them.
        doc: one sentence on what an occupant does there.
        asked: occupants act, or are measured, only where a task asks for the hook (``Task.asks``).
    """

    name: str
    order: int = field(compare=False)
    doc: str = field(compare=False)
    asked: bool = field(default=False, compare=False)

    def installed(self, model: Any, occupant: OccupantT) -> AbstractContextManager[Any]:
        """A context inside which ``model`` asks ``occupant``; afterwards the model is exactly what it was."""
        return nullcontext()

    def __str__(self) -> str:
        return self.name


def names_of(hooks: Any) -> list[str]:
    """The names of hooks, in the order of application."""
    return [hook.name for hook in sorted(hooks, key=lambda hook: (hook.order, hook.name))]
