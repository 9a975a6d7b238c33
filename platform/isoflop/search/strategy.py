"""Strategies: the ways in which a sweep's trials are proposed, each under one name.

A strategy is a frozen dataclass. Its fields with a ``Knob`` are the ``options`` that a sweep may give it, with type and range;
its class attributes say how it has to be treated. Its life in a session::

    check(problem)                      before anything runs: what only the problem as a whole can show to be wrong
    proposer = make(problem)            the driver asks this one
    keep(proposer, shelf)               before it is told of the trials that the ledger holds
    … ask, tell …
    findings(proposer, problem)         at the end, kept beside the ledger, shown by ``lines``

Other people's packages add their own by the entry point ``isoflop.strategies``, or in a module that a sweep imports::

    @STRATEGIES.register("from-the-end")
    @dataclass(frozen=True)
    class FromTheEnd(Strategy):
        \"""The grid, last point first.\"""

        eager = True

        def make(self, problem: Problem) -> Proposer: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from isoflop.core.registry import Registry
from isoflop.search.options import Where, check_options, nowhere
from isoflop.search.space import SearchSpace

if TYPE_CHECKING:
    from isoflop.search.law.forecast import Forecast
    from isoflop.search.proposer import Proposer


@dataclass(frozen=True)
class Aim:
    """One objective: a metric's direction, and the task that it is of (None: the mean over all tasks)."""

    metric: str = "error"
    direction: str = "minimize"
    task: str | None = None


@dataclass(frozen=True)
class Problem:
    """What is to be searched.

    Attributes:
        space: what may be proposed.
        aims: at least one.
        seed: the sweep's.
        pruner, pruner_options: as in the YAML.
        apart: a dear search may think in a process of its own. What it has seen when it proposes then depends on how fast
            jobs are.
        tasks: names of the tasks that every trial runs.
        sizes: model -> N, non-embedding parameters.
        axes: axis -> how it is read from a configuration, as the methods plan it; see :mod:`isoflop.search.law.axes`.
        trials, flops: the budget; None where it sets no limit.
        more: further keys of the YAML's ``search`` block that the strategy takes (:attr:`Strategy.keys`).
        where: place of a key below ``search`` in the YAML, for messages.
    """

    space: SearchSpace
    aims: tuple[Aim, ...] = (Aim(),)
    seed: int = 0
    pruner: str = "none"
    pruner_options: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False
    tasks: tuple[str, ...] = ()
    sizes: Mapping[str, float] = field(default_factory=dict)
    axes: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None
    flops: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    where: Where = nowhere

    @property
    def directions(self) -> tuple[str, ...]:
        """Of the aims."""
        return tuple(aim.direction for aim in self.aims)


class Shelf(Protocol):
    """Small files beside a sweep's ledger, by name."""

    def read(self, name: str) -> bytes | None:
        """What lies there; None when nothing does."""

    def write(self, name: str, data: bytes) -> None:
        """Replaces what lies there."""


@dataclass(frozen=True)
class Strategy(ABC):
    """Base class of strategies.

    Class attributes:
        name: set by registration; ``search.sampler`` in the YAML.
        eager: it does not learn from outcomes, so it is asked ahead; others are asked as late as possible.
        dear: one ask costs milliseconds to seconds; the driver hands out more at a time.
        exhaustive: it proposes every point of a finite space, so an impossible one is an error before anything runs.
        prunable: it takes a pruner; ``unprunable`` says why not.
        most_aims: objectives that it takes at most; None for any number.
        measures: outcomes are told with what was measured beside the objectives (FLOPs, number of examples).
        forecasts: :meth:`forecast` may have something to say.
        keys: further keys of the YAML's ``search`` block that are for this strategy.
    """

    name: ClassVar[str] = ""
    eager: ClassVar[bool] = False
    dear: ClassVar[bool] = False
    exhaustive: ClassVar[bool] = False
    prunable: ClassVar[bool] = True
    unprunable: ClassVar[str] = "it does not look at jobs before they are finished"
    most_aims: ClassVar[int | None] = None
    measures: ClassVar[bool] = False
    forecasts: ClassVar[bool] = False
    keys: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any], where: Where = nowhere) -> Strategy:
        """The strategy with options as a YAML gives them.

        Raises:
            UserError: an option that it does not take, or a value of another type or out of range.
        """
        return cls(**check_options(cls, options, f"sampler {cls.name}", "options", where))

    @abstractmethod
    def make(self, problem: Problem) -> Proposer:
        """The proposer for a session; nothing has been told to it."""

    def check(self, problem: Problem) -> None:  # noqa: B027 - most have nothing to add
        """Raise UserError for a problem that this strategy cannot search; ``problem.where`` names the key."""

    def keep(self, proposer: Proposer, shelf: Shelf) -> None:  # noqa: B027 - most keep nothing
        """Give the proposer what an earlier session kept on the shelf, and keep there what a later one needs.

        For what the rows of the ledger do not say; called before the proposer is told of any.
        """

    def forecast(self, proposer: Proposer, problem: Problem) -> Forecast | None:
        """What the answer is expected to cost, from what the proposer was told; None where there is no telling."""
        return None

    def findings(self, proposer: Proposer, problem: Problem) -> dict[str, Any] | None:
        """What the search has found out, as plain JSON types; None when that is nothing beside the rows."""
        return None

    @classmethod
    def lines(cls, findings: Mapping[str, Any]) -> list[str]:
        """:meth:`findings` of some session in lines for people."""
        return [f"{key}: {value}" for key, value in findings.items()]


STRATEGIES: Registry[type[Strategy]] = Registry(
    "sampler", ("isoflop.search.strategies", "isoflop.search.law.strategy"), "isoflop.strategies"
)
