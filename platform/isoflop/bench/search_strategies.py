"""Ways of choosing runs under a budget: ours and its peers, on equal terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from isoflop.bench.search_worlds import Lab
from isoflop.core.errors import unknown
from isoflop.search.law import LawSampler, Policy
from isoflop.search.law.reading import NOT_RUN

_ETA = 2
_MISSES = 10
CAP = 240  # runs of any strategy, who are told so where they can be: beyond it budgets are left unspent


@dataclass
class Outcome:
    """What one strategy made of one seed and budget."""

    rows: list[tuple[int, float]]
    fits: bool | None = None
    pick: int | None = None


def run_grid(lab: Lab, budget: float, seed: int) -> Outcome:
    """Every candidate once; nothing when the money does not reach."""
    return Outcome([(i, lab.run(i)) for i in range(len(lab))] if budget >= lab.total * (1 - 1e-9) else [])


def run_random(lab: Lab, budget: float, seed: int) -> Outcome:
    """A random order, what is affordable; from the beginning again when all have run."""
    rng, rows, left = np.random.default_rng([seed, 1]), list[tuple[int, float]](), budget
    before = -1
    while before < len(rows) < CAP:
        before = len(rows)
        for i in rng.permutation(len(lab)):
            if lab.cost[i] <= left and lab.left(int(i)):
                rows.append((int(i), lab.run(int(i))))
                left -= lab.cost[i]
    return Outcome(rows)


def distributions(lab: Lab) -> dict[str, BaseDistribution]:
    """The candidates' parameters as Optuna sees them: ordered indices, categorical methods."""
    out: dict[str, BaseDistribution] = {}
    for name, value in lab.params[0].items():
        if isinstance(value, str):
            out[name] = CategoricalDistribution(lab.world.groups)
        else:
            out[name] = IntDistribution(0, max(int(p[name]) for p in lab.params))
    return out


def run_optuna(lab: Lab, budget: float, seed: int, sampler: optuna.samplers.BaseSampler) -> Outcome:
    """Ask and tell until the money is spent.

    A proposal that is too dear is skipped at no cost; a sampler that proposes nothing else is relieved by an affordable
    candidate at random, of whose value it is told.
    """
    study = optuna.create_study(sampler=sampler)
    rng = np.random.default_rng([seed, 3])
    space, rows, left, misses = distributions(lab), list[tuple[int, float]](), budget, 0
    while len(rows) < CAP and (lab.cost <= left).any():
        if misses >= _MISSES:
            possible = [i for i in np.flatnonzero(lab.cost <= left) if lab.left(int(i))]
            if not possible:
                break
            study.enqueue_trial(lab.params[int(rng.choice(possible))])
        trial = study.ask(space)
        i = lab.index(trial.params)
        if i is None or lab.cost[i] > left or not lab.left(i):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            misses += 1
            continue
        misses = 0
        value = lab.run(i)
        study.tell(trial, value)
        rows.append((i, value))
        left -= lab.cost[i]
    return Outcome(rows)


def law_sampler(lab: Lab, budget: float, seed: int, policy: Policy | None = None) -> LawSampler:
    """The sampler as a user would set it up for this world."""
    world = lab.world
    return LawSampler(
        {a: {f"i{a}": dict(enumerate(v))} for a, v in zip(world.axes, world.levels, strict=True)},
        world.target,
        world.laws,
        by=("method",) if len(world.groups) > 1 else (),
        share=world.share,
        space=distributions(lab),
        candidates=lab.params,
        cost=world.cost if world.measured is None else partial(_measured_cost, lab),
        budget=budget,
        max_runs=CAP,
        policy=policy,
        seed=seed,
    )


def _measured_cost(lab: Lab, params: Mapping[str, Any]) -> float:
    i = lab.index(dict(params))
    assert i is not None
    return float(lab.cost[i])


def run_law(lab: Lab, budget: float, seed: int, policy: Policy | None = None) -> Outcome:
    """Our sampler in a plain study."""
    sampler = law_sampler(lab, budget, seed, policy)
    study = optuna.create_study(sampler=sampler)
    space = distributions(lab)
    rows: list[tuple[int, float]] = []
    while len(rows) < CAP:
        trial = study.ask(space)
        role = study.get_trials(deepcopy=False)[-1].system_attrs.get("law:role")
        if role is None:
            break  # nothing affordable
        i = lab.index(trial.params)
        assert i is not None
        if not lab.left(i):
            trial.set_user_attr(NOT_RUN, True)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)  # the sampler proposes it no more
            continue
        value = lab.run(i)
        study.tell(trial, value)
        if role != "check":
            rows.append((i, value))
    return Outcome(rows, fits=sampler.report(study).fits if rows else None)


def run_halving(lab: Lab, budget: float, seed: int) -> Outcome:
    """Successive halving of (method, tokens) over sizes: the better half goes on to the next size, while money lasts."""
    rng = np.random.default_rng([seed, 2])
    sizes = np.unique(lab.x[:, 0])
    arms = list(dict.fromkeys((int(g), float(v)) for g, v in zip(lab.group, lab.x[:, 1], strict=True)))
    place = {(int(g), float(x[0]), float(x[1])): i for i, (g, x) in enumerate(zip(lab.group, lab.x, strict=True))}
    rows: list[tuple[int, float]] = []
    left, pick = budget, None
    while True:  # whole brackets until the money ends
        alive = [arms[k] for k in rng.permutation(len(arms))]
        before = len(rows)
        for size in sizes:
            results = []
            for g, v in alive:
                i = place.get((g, float(size), v))
                if i is not None and lab.cost[i] <= left and lab.left(i):
                    value = lab.run(i)
                    left -= lab.cost[i]
                    rows.append((i, value))
                    results.append((value, (g, v)))
            if not results:
                continue
            results.sort()
            pick = results[0][1][0]
            alive = [arm for _, arm in results[: max(1, math.ceil(len(results) / _ETA))]]
        if len(rows) == before or len(rows) > CAP:
            return Outcome(rows, pick=pick)


def strategy_of(name: str) -> Callable[[Lab, float, int], Outcome]:
    """A strategy by name: (lab, budget, seed) -> outcome."""
    samplers: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
        "qmc": lambda s: optuna.samplers.QMCSampler(seed=s, warn_independent_sampling=False),
        "tpe": lambda s: optuna.samplers.TPESampler(seed=s),
        "gp": lambda s: optuna.samplers.GPSampler(seed=s),
    }
    if name in samplers:
        return lambda lab, budget, seed: run_optuna(lab, budget, seed, samplers[name](seed))
    plain = {"grid": run_grid, "random": run_random, "halving": run_halving, "law": run_law}
    if name in plain:
        return plain[name]
    if name != "d-optimal":
        raise unknown("strategy", name, (*samplers, *plain, "d-optimal"), "--strategy")
    volume = Policy(criterion="D", check_share=0.0, explore=0.0)
    return lambda lab, budget, seed: run_law(lab, budget, seed, volume)
