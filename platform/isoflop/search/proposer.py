"""Proposers: what to try next.

A proposer is asked for trials and told their outcomes. It keeps nothing on disk: after a restart the driver rebuilds it
by telling it every finished trial of the ledger again, so there is no second storage that could disagree, lock or tear.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from isoflop.search.space import Config, SearchSpace, values_key

Outcome = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class Proposal:
    """A point to try. ``number`` counts trials of the sweep from 0 and survives restarts."""

    number: int
    config: Config


@dataclass(frozen=True)
class Tell:
    """The outcome of a trial.

    Attributes:
        values: one per objective; empty unless ``outcome`` is "complete".
        steps: intermediate value per step, for pruners.
        attributes: what was measured beside the values (sizes, costs), for samplers that fit laws.
    """

    number: int
    config: Config
    outcome: Outcome
    values: tuple[float, ...] = ()
    steps: Mapping[int, float] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Proposer(ABC):
    """Life cycle: ``tell`` past trials, then any order of ``ask``, ``report``/``should_prune`` and ``tell``."""

    @abstractmethod
    def ask(self, count: int) -> list[Proposal]:
        """Up to ``count`` new points; fewer (finally none) when the space is used up or while more are ``pending``."""

    @abstractmethod
    def tell(self, result: Tell) -> None:
        """Record an outcome, of a proposal or of a trial from an earlier session."""

    @abstractmethod
    def reserve(self, number: int, config: Config) -> None:
        """A trial of an earlier session is unfinished and runs again: do not propose it; its ``tell`` will come."""

    def should_prune(self, number: int, step: int, value: float) -> bool:
        """Report an intermediate value; True when the trial is hopeless."""
        return False

    def size(self) -> int | None:
        """How many points there are in all, or None when unknown."""
        return None

    @property
    def reason(self) -> str | None:
        """Why nothing more is proposed, where there is more to say than that the space is used up."""
        return None

    @property
    def pending(self) -> bool:
        """Whether points that were asked for are still being thought about."""
        return False

    def start(self) -> None:  # noqa: B027 - most have nothing to start
        """Bring processes up; otherwise the first ask does."""

    def wait(self, seconds: float) -> None:  # noqa: B027 - most answer at once
        """Nothing else is to be done: wait until something of what is pending can be asked for."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Let go of processes."""


class Numbers:
    """Trial numbers: the smallest free one next, so that a resumed sweep counts on where an earlier session left gaps."""

    def __init__(self) -> None:
        self._used: set[int] = set()
        self._next = 0

    def __len__(self) -> int:
        return len(self._used)

    def add(self, number: int) -> None:
        """A trial of an earlier session has this number."""
        self._used.add(number)

    def peek(self) -> int:
        """The number that :meth:`take` would give."""
        while self._next in self._used:
            self._next += 1
        return self._next

    def take(self) -> int:
        """A number for a new trial."""
        number = self.peek()
        self._used.add(number)
        return number


class GridProposer(Proposer):
    """Every point once, in order. Enumerated here: Optuna's grid sampler slows down with each tell."""

    def __init__(self, space: SearchSpace) -> None:
        self._size = sum(1 for _ in space.grid())
        self._points = space.grid()
        self._known: set[str] = set()
        self._numbers = Numbers()

    def ask(self, count: int) -> list[Proposal]:
        fresh = (config for config in self._points if values_key(config) not in self._known)
        return [Proposal(self._numbers.take(), config) for config in itertools.islice(fresh, count)]

    def tell(self, result: Tell) -> None:
        self.reserve(result.number, result.config)

    def reserve(self, number: int, config: Config) -> None:
        self._known.add(values_key(config))
        self._numbers.add(number)

    def size(self) -> int | None:
        return self._size
