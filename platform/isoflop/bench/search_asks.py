"""What one proposal of the law sampler costs, in a study with many rows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution

from isoflop.bench.search_worlds import World, worlds
from isoflop.search.law import LawSampler
from isoflop.search.law.contenders import LawChoice


def bench_ask(rows: int = 1000, asks: int = 20) -> dict[str, float]:
    """CPU milliseconds per proposal in a study with many rows: continuous space, three competing forms, a frontier.

    Once where a form fits, and once where none does (fits then carry a misfit surface).
    """
    out: dict[str, float] = {"rows": rows}
    for label, name in (("fitting", "product-frontier"), ("misfit", "wrong-saturating")):
        times = _ask_times(worlds()[name], rows, asks)
        out |= {
            f"{label}_first_ms": times[0],
            f"{label}_median_ms": float(np.median(times[1:])),
            f"{label}_largest_ms": float(np.max(times[1:])),
        }
    return out


def _ask_times(world: World, rows: int, asks: int) -> list[float]:
    rng = np.random.default_rng(0)
    space: dict[str, BaseDistribution] = {
        "N": optuna.distributions.FloatDistribution(1e7, 1.28e9, log=True),
        "V": IntDistribution(1, 512, log=True),
    }
    laws: tuple[LawChoice, ...] = ("product", ("chinchilla", {"D": "V"}), "semilog")
    sampler = LawSampler(
        {"N": "N", "V": "V"},
        world.target,
        laws,
        space=space,
        cost=world.cost,
        budget=3e12 * rows,  # with limits the design of what is left is solved, too
        max_runs=3 * rows,
        seed=0,
    )
    study = optuna.create_study(sampler=sampler)

    def value(params: Mapping[str, Any]) -> float:
        place, group = np.array([[float(params["N"]), float(params["V"])]]), np.zeros(1, dtype=np.int64)
        return float(world.truth(place, group)[0] + world.sd(place, group)[0] * rng.standard_normal())

    for _ in range(rows):
        params = {"N": float(np.exp(rng.uniform(16.2, 20.9))), "V": int(np.exp(rng.uniform(0, 6.2)))}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value(params)))
    times = []
    for _ in range(asks + 1):
        start = time.process_time()
        trial = study.ask(space)
        times.append(1e3 * (time.process_time() - start))
        study.tell(trial, value(trial.params))
    return times
