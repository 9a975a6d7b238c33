"""What methods share that search for a level of compression per part of a model: knobs, stages, and the found allocation.

A method says what its units and levels are; the search, its baselines and the trace are the same for all of them.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self

import numpy as np

from isoflop.core.hashing import derive_seed
from isoflop.core.knobs import Knob, KnobValue
from isoflop.core.stage import Stage, StageContext
from isoflop.methods.base import Method
from isoflop.methods.calibration import OnModel
from isoflop.methods.weights.base import WeightMethod
from isoflop.methods.weights.evolution import Search, SelectionStep, evolve, selections
from isoflop.methods.weights.fitness import FITNESSES, KL, Fitness
from isoflop.methods.weights.space import Levels, LevelSpace
from isoflop.models.base import Model, ModelInfo

if TYPE_CHECKING:
    from isoflop.methods.probe import Probe

EVOLUTION, RANDOM, ADDITIVE, UNIFORM = "evolution", "random", "dp", "uniform"
ALLOCATIONS = (EVOLUTION, RANDOM, ADDITIVE, UNIFORM)
_FOUND = "found.json"


class Problem(Protocol):
    """What is searched, on a loaded model.

    Attributes:
        space: the configurations of the budget.
    """

    space: LevelSpace

    def starts(self, count: int, rng: np.random.Generator) -> list[Levels]:
        """Where the search begins: one configuration, or ``count`` random ones."""

    def uniform(self) -> Levels:
        """The same for all units."""

    def additive(self, judge: Fitness) -> Levels:
        """The best configuration if the errors of units were independent and added up."""

    def serving(self) -> AbstractContextManager[Callable[[Levels], None]]:
        """Inside the ``with`` block: a function that makes the model serve a configuration."""


@dataclass(frozen=True)
class Found:
    """An allocation.

    Attributes:
        levels: of each unit, by its name.
        trace: of the search (see ``Search``).
        parts: what the levels stand for, where a stage has computed it.
    """

    levels: dict[str, int]
    trace: dict[str, list[float]]
    parts: Any = None

    def save(self, folder: Path) -> None:
        """Write levels and trace; ``parts`` are kept by the stage that computed them."""
        (folder / _FOUND).write_text(json.dumps({"levels": self.levels, "trace": self.trace}) + "\n")

    @classmethod
    def load(cls, folder: Path, parts: Any = None) -> Found:
        """The inverse of :meth:`save`."""
        return cls(**json.loads((folder / _FOUND).read_text()), parts=parts)


@dataclass(frozen=True)
class SearchMethod(WeightMethod):
    """Base class of EvoPress's methods.

    ``allocation`` chooses between the evolutionary search and what it is compared with under the same budget: ``random``
    draws every offspring anew instead of mutating the parent (as many evaluations), ``dp`` solves exactly for the least sum of
    the units' separate errors among the configurations that are searched, ``uniform`` gives all units the same level.
    """

    version: ClassVar[str] = "3"
    paper: ClassVar[str] = "arXiv 2410.14649"
    calibrates: ClassVar[bool] = True

    allocation: Annotated[str, Knob(choices=ALLOCATIONS, doc="how levels are given to units")] = EVOLUTION
    generations: Annotated[int, Knob(low=0, high=100_000, doc="of the search")] = 60
    offspring: Annotated[int, Knob(low=1, high=10_000, log=True, doc="per generation")] = 32
    selections: Annotated[int, Knob(low=1, high=6, doc="steps of selection per generation, the parent joining the last")] = 3  # fmt: skip
    survivors: Annotated[int, Knob(low=1, high=1_000, doc="of the first selection; a quarter of them in each further one")] = 8  # fmt: skip
    examples: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="on which the first selection judges")] = 2  # fmt: skip
    growth: Annotated[int, Knob(low=1, high=64, doc="how many times more examples the next selection judges on")] = 4
    fitness: Annotated[str, Knob(choices=FITNESSES, doc="divergence from the uncompressed logits, of all or of the largest, or cross-entropy")] = KL  # fmt: skip
    n_search: Annotated[int, Knob(low=1, high=100_000, log=True, unit="examples", doc="training examples that selections draw from")] = 32  # fmt: skip

    def check(self, info: ModelInfo) -> None:
        """Refuse models whose loss cannot be measured."""
        super().check(info)
        info.check_loss(f"method {self.name}")

    def prepare(
        self, info: ModelInfo, weights: Stage | None, seed: int, trained_with: tuple[Method, ...] = ()
    ) -> Stage | None:
        """The stage with the allocation; the search runs in it."""
        self.check(info)
        source = OnModel.source(info, weights, seed, trained_with)
        return SearchStage(**source, method=self.relevant(), parts=self.parts_stage(source))

    def calibrate(self, model: Model, ctx: StageContext, seed: int) -> Found:
        """What the stages compute, on a loaded model."""
        return self.search(model, ctx, self.compute_parts(model, ctx, seed), seed)

    def parts_knobs(self) -> dict[str, KnobValue]:
        """The knobs that what the levels stand for depends on."""
        return {}

    def parts_stage(self, source: Mapping[str, Any]) -> Stage | None:
        """The stage that computes what levels stand for, shared by all budgets and searches that it does not depend on."""
        return None

    def compute_parts(self, model: Model, ctx: StageContext, seed: int) -> Any:
        """What that stage computes."""
        return None

    @abstractmethod
    def problem(self, model: Model, parts: Any) -> Problem:
        """What is searched."""

    @abstractmethod
    def names(self, model: Model) -> list[str]:
        """The units, in the order of the levels."""

    def relevant(self) -> Self:
        """The same method with knobs at their defaults that have no effect on what is found."""
        if self.allocation in (EVOLUTION, RANDOM):
            return self
        return self.at_defaults("generations", "offspring", "survivors")

    def search(self, model: Model, ctx: StageContext, parts: Any, seed: int) -> Found:
        """Allocate levels on the uncompressed model."""
        batches = list(model.calibration(ctx, self.n_search, derive_seed("evopress examples", seed)))
        problem = self.problem(model, parts)
        with problem.serving() as serve:
            search = self.solve(problem, Fitness(model, batches, self.fitness, serve), seed)
        trace = {"fitness": search.fitness, "tokens": search.tokens, "moved": search.moved}
        return Found(dict(zip(self.names(model), search.levels, strict=True)), trace, parts)

    def solve(self, problem: Problem, judge: Fitness, seed: int) -> Search:
        """What ``allocation`` says. Only the two searches take generations; the others' fitness is measured all the same."""
        rng = np.random.default_rng(derive_seed("evopress", seed))
        if self.allocation == ADDITIVE:
            return evolve([problem.additive(judge)], _nothing, judge, self.plan(), 0, 0, rng)
        if self.allocation == UNIFORM:
            return evolve([problem.uniform()], _nothing, judge, self.plan(), 0, 0, rng)
        starts = problem.starts(self.offspring, rng)
        propose = problem.space.mutate if self.allocation == EVOLUTION else problem.space.shuffle
        return evolve(starts, propose, judge, self.plan(), self.generations, self.offspring, rng)

    def plan(self) -> tuple[SelectionStep, ...]:
        """The steps of selection."""
        return selections(self.selections, self.survivors, self.examples, self.growth)

    def trace(self, prepared: Any) -> Mapping[str, Sequence[float]]:
        """By generation: ``fitness`` of the best configuration, ``tokens`` scored so far, and levels ``moved``."""
        return prepared.trace if isinstance(prepared, Found) else {}

    @classmethod
    def probe(cls) -> Probe:
        """That of weight methods, with short searches."""
        from isoflop.methods.weights.search_probe import SearchProbe

        return SearchProbe()

    def found(self, prepared: Any) -> Found:
        """The value of the stage."""
        if not isinstance(prepared, Found):
            raise ValueError(f"method {self.name} is calibrated: apply() needs the value of its prepare() stage")
        return prepared


@dataclass(frozen=True)
class SearchStage(OnModel):
    """The allocation that a search has found."""

    kind: ClassVar[str] = "level-search"

    method: SearchMethod
    parts: Stage | None

    def deps(self) -> tuple[Stage, ...]:
        """Those of the model, and what the levels stand for."""
        return (*super().deps(), *(() if self.parts is None else (self.parts,)))

    def compute(self, ctx: StageContext, folder: Path) -> None:
        """Search."""
        parts = None if self.parts is None else ctx.get(self.parts)
        with self.model(ctx) as model:
            self.method.search(model, ctx, parts, self.seed).save(folder)

    def load(self, ctx: StageContext, folder: Path) -> Found:
        """Levels, trace and parts."""
        return Found.load(folder, None if self.parts is None else ctx.get(self.parts))


def _nothing(levels: Levels, rng: np.random.Generator) -> Levels:
    return levels
