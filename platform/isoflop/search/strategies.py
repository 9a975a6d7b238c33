"""The grid, and Optuna's samplers as strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import optuna

from isoflop.core.errors import UserError
from isoflop.core.knobs import Knob
from isoflop.search.options import Where, check_options, nowhere
from isoflop.search.process import ProposerProcess
from isoflop.search.proposer import GridProposer, Proposer
from isoflop.search.pruners import changed
from isoflop.search.quiet import hushed
from isoflop.search.space import SearchSpace
from isoflop.search.strategy import STRATEGIES, Aim, Problem, Strategy
from isoflop.search.study import Habits, OptunaProposer, PrunedGrid
from isoflop.search.tpe import RememberingTPESampler


def make_proposer(
    space: SearchSpace,
    sampler: str,
    pruner: str = "none",
    directions: Sequence[str] = ("minimize",),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    pruner_options: Mapping[str, Any] | None = None,
    apart: bool = False,
) -> Proposer:
    """The proposer of a strategy by name, for a space alone.

    Args:
        apart: a dear one may think in a process of its own.

    Raises:
        UserError: an unknown name, or an option that the strategy does not take.
    """
    aims = tuple(Aim(direction=direction) for direction in directions)
    problem = Problem(space, aims, seed, pruner, dict(pruner_options or {}), apart)
    return STRATEGIES.get(sampler, nowhere("sampler")).of(options or {}).make(problem)


@STRATEGIES.register("grid")
@dataclass(frozen=True)
class Grid(Strategy):
    """Every combination once, in the order of the YAML."""

    eager = True
    exhaustive = True

    def make(self, problem: Problem) -> Proposer:
        if problem.pruner == "none":
            return GridProposer(problem.space)
        return PrunedGrid(problem.space, problem.pruner, problem.directions, problem.seed, dict(problem.pruner_options))


@dataclass(frozen=True)
class OptunaStrategy(Strategy):
    """Base class: one of Optuna's samplers, whose knobs are the options of Optuna's class.

    Class attributes:
        sampler: Optuna's class; takes ``seed``.
        quiet: arguments that keep it from warning of what is meant.
        habits: how it has to be treated.
    """

    sampler: ClassVar[type[optuna.samplers.BaseSampler]]
    quiet: ClassVar[Mapping[str, Any]] = {}
    habits: ClassVar[Habits] = Habits()

    @classmethod
    def of(cls, options: Mapping[str, Any], where: Where = nowhere) -> Strategy:
        given = cls(**check_options(cls, options, f"sampler {cls.name}", "options", where, cls.sampler))
        try:
            given.build(0)  # what only Optuna knows of options that do not go together
        except (TypeError, ValueError) as error:
            raise UserError(f"{where('options')}: {cls.name}: {error}") from None
        return given

    @hushed()
    def build(self, seed: int) -> optuna.samplers.BaseSampler:
        """Optuna's sampler."""
        return self.sampler(**{**self.quiet, **changed(self), "seed": seed})

    def make(self, problem: Problem) -> Proposer:
        # a pruner is asked about running trials, and answers at once
        if self.dear and problem.apart and problem.pruner == "none":
            return ProposerProcess(self, problem)
        return self.here(problem)

    def here(self, problem: Problem) -> OptunaProposer:
        """The proposer in this process."""
        return OptunaProposer(
            problem.space,
            self.build(problem.seed),
            problem.pruner,
            problem.directions,
            problem.seed,
            problem.pruner_options,
            self.habits,
        )


@STRATEGIES.register("random")
@dataclass(frozen=True)
class RandomSearch(OptunaStrategy):
    """Independent random points."""

    sampler = optuna.samplers.RandomSampler
    eager = True
    habits = Habits(per_trial=True)


@STRATEGIES.register("qmc")
@dataclass(frozen=True)
class QuasiMonteCarlo(OptunaStrategy):
    """Points of a low-discrepancy sequence, which fill the space more evenly than random ones."""

    sampler = optuna.samplers.QMCSampler
    quiet: ClassVar[Mapping[str, Any]] = {"warn_independent_sampling": False, "warn_asynchronous_seeding": False}
    eager = True
    habits = Habits(sequence=True)

    qmc_type: Annotated[str, Knob(choices=("sobol", "halton"), doc="the sequence")] = "sobol"
    scramble: Annotated[bool, Knob(doc="shuffle the sequence")] = False


@STRATEGIES.register("tpe")
@dataclass(frozen=True)
class TreeParzen(OptunaStrategy):
    """Tree-structured Parzen estimator: draws where good trials were denser than bad ones."""

    sampler = RememberingTPESampler
    dear = True

    n_startup_trials: Annotated[int, Knob(low=0, doc="random trials first")] = 10
    n_ei_candidates: Annotated[int, Knob(low=1, doc="points compared for one proposal")] = 24
    multivariate: Annotated[bool | None, Knob(doc="densities over all parameters together")] = None
    group: Annotated[bool, Knob(doc="with multivariate: a density per set of parameters that occur together")] = False
    constant_liar: Annotated[bool, Knob(doc="running trials count as bad ones, so that parallel asks spread")] = True
    prior_weight: Annotated[float, Knob(low=0.0, doc="of the prior among the trials")] = 1.0
    consider_magic_clip: Annotated[bool, Knob(doc="narrowest kernels are widened")] = True
    consider_endpoints: Annotated[bool, Knob(doc="ends of a range count for the kernels' widths")] = False


@STRATEGIES.register("gp")
@dataclass(frozen=True)
class GaussianProcess(OptunaStrategy):
    """Bayesian optimisation with a Gaussian process; for a few hundred trials."""

    sampler = optuna.samplers.GPSampler
    quiet: ClassVar[Mapping[str, Any]] = {"warn_independent_sampling": False}
    dear = True
    # an ask costs seconds at a few hundred trials, and parallel ones are near-duplicates
    habits = Habits(most=500)

    n_startup_trials: Annotated[int, Knob(low=0, doc="random trials first")] = 10
    deterministic_objective: Annotated[bool, Knob(doc="the same point always gives the same value")] = False


@STRATEGIES.register("cmaes")
@dataclass(frozen=True)
class CovarianceMatrix(OptunaStrategy):
    """CMA-ES: a population whose shape follows what is good; for numbers on a continuous space."""

    sampler = optuna.samplers.CmaEsSampler
    quiet: ClassVar[Mapping[str, Any]] = {"warn_independent_sampling": False}
    dear = True
    most_aims = 1

    n_startup_trials: Annotated[int, Knob(low=0, doc="random trials first")] = 1
    sigma0: Annotated[float | None, Knob(low=1e-12, doc="first standard deviation")] = None
    popsize: Annotated[int | None, Knob(low=2, doc="of a generation; by default from the number of parameters")] = None
    consider_pruned_trials: Annotated[bool, Knob(doc="learn from pruned trials, too")] = False
    use_separable_cma: Annotated[bool, Knob(doc="a diagonal covariance")] = False
    with_margin: Annotated[bool, Knob(doc="keeps whole numbers from freezing")] = False
    lr_adapt: Annotated[bool, Knob(doc="adapts the learning rate to noise")] = False


@STRATEGIES.register("nsga2")
@dataclass(frozen=True)
class NonDominatedSorting(OptunaStrategy):
    """NSGA-II: a genetic search for several objectives."""

    sampler = optuna.samplers.NSGAIISampler
    dear = True

    population_size: Annotated[int, Knob(low=2, doc="of a generation")] = 50
    mutation_prob: Annotated[
        float | None, Knob(low=0.0, high=1.0, doc="per parameter; by default one over their number")
    ] = None
    crossover_prob: Annotated[float, Knob(low=0.0, high=1.0, doc="of a child to have two parents")] = 0.9
    swapping_prob: Annotated[float, Knob(low=0.0, high=1.0, doc="per parameter, to come from the other parent")] = 0.5
