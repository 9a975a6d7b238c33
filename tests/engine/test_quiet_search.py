"""Optuna's warnings stay off the screen, whatever options a sweep gives and whatever space it has."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import pytest
from test_proposers import CONDITIONAL, ENDLESS, play

from isoflop.search import Branch, Param, SearchSpace, Tell, make_proposer
from isoflop.search.pruners import PRUNERS
from isoflop.search.strategies import OptunaStrategy
from isoflop.search.strategy import STRATEGIES

UNEVEN = SearchSpace(
    ("a",), (Branch("m", (Param("m.x", low=0.0, high=1.0, step=0.3), Param("m.flag", (True, False)))),)
)
SAMPLERS = [
    n
    for n in STRATEGIES.names()
    if isinstance(STRATEGIES.get(n), type) and issubclass(STRATEGIES.get(n), OptunaStrategy)
]
TOLD = {"n_startup_trials": 2, "multivariate": True, "group": True, "sigma0": 0.3, "popsize": 4, "qmc_type": "halton"}


def options_of(sampler: str) -> list[dict[str, Any]]:
    """Each option away from its default, alone; ``group`` goes with ``multivariate`` only."""
    found: list[dict[str, Any]] = [{}]
    for field in fields(STRATEGIES.get(sampler)):
        value = TOLD.get(field.name, not field.default if isinstance(field.default, bool) else None)
        if value is not None:
            found.append({field.name: value} | ({"multivariate": True} if field.name == "group" else {}))
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_option_of_a_sampler_warns(sampler: str) -> None:
    startup = (
        {"n_startup_trials": 2} if any(f.name == "n_startup_trials" for f in fields(STRATEGIES.get(sampler))) else {}
    )
    spaces = [UNEVEN] if sampler == "gp" else [ENDLESS, CONDITIONAL, UNEVEN]  # which takes long for the others
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in options_of(sampler):
            for space in spaces:
                clash = {"use_separable_cma", "with_margin"} & set(options) and space is not ENDLESS
                if not clash:
                    play(make_proposer(space, sampler, options=startup | options), 6)


@pytest.mark.parametrize("pruner", sorted(PRUNERS))
def test_no_pruner_warns(pruner: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proposer = make_proposer(ENDLESS, "random", pruner)
        for _ in range(4):
            for p in proposer.ask(2):
                for step in range(3):
                    proposer.should_prune(p.number, step, float(p.number))
                proposer.tell(Tell(p.number, p.config, "complete", (1.0,)))
