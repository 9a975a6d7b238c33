"""What the sampler would have run of a table that exists: its order, its roles, what it cost, what was known when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import pyarrow as pa
from optuna.trial import TrialState

from isoflop.core.errors import UserError
from isoflop.search.law.candidates import config_key
from isoflop.search.law.reading import NOT_RUN, ROLE
from isoflop.search.law.report import Report
from isoflop.search.law.sampler import LawSampler


@dataclass(frozen=True)
class Replay:
    """A search on known outcomes.

    Attributes:
        runs: one row per run in the order asked: its parameters, ``value``, ``role``, ``spent`` (summed) and, after the
            pilot, ``half_width`` of the target.
        report: what was known at the end; everything: cost of all outcomes of the table.
    """

    runs: pa.Table
    report: Report
    everything: float

    @property
    def share(self) -> float:
        """What was spent over what the table cost."""
        return self.report.spent / self.everything


def replay(sampler: LawSampler, outcomes: Sequence[tuple[Mapping[str, Any], float]], limit: int = 1000) -> Replay:
    """Let a sampler whose candidates are the table's configurations ask for outcomes until it stops.

    Args:
        sampler: with ``candidates`` among the outcomes' configurations; fresh.
        outcomes: (configuration, value); repeats of a configuration are handed out in their order, and once there are none
            left the configuration counts as failed.

    Raises:
        UserError: for a configuration that the table lacks.
    """
    left: dict[str, list[float]] = {}
    for config, value in outcomes:
        left.setdefault(config_key(config), []).append(float(value))
    study = optuna.create_study(sampler=sampler)
    rows: list[dict[str, Any]] = []
    while len(rows) < limit and sampler.stop_reason(study) is None:
        trial = study.ask(sampler.search_space)
        stored = study.get_trials(deepcopy=False)[trial.number]
        if ROLE not in stored.system_attrs:
            study.tell(trial, state=TrialState.FAIL)
            break
        key = config_key(trial.params)
        if key not in left:
            raise UserError(f"replay: the table has no outcome for {key}")
        if not left[key]:
            trial.set_user_attr(NOT_RUN, True)
            study.tell(trial, state=TrialState.FAIL)
            continue
        value = left[key].pop(0)
        study.tell(trial, value)
        report = sampler.report(study)
        row = {**trial.params, "value": value, "role": stored.system_attrs[ROLE], "spent": report.spent}
        rows.append({**row, "half_width": report.half_width if math.isfinite(report.half_width) else None})
    everything = sum(sampler.cost_of(config) for config, _ in outcomes)
    return Replay(pa.Table.from_pylist(rows), sampler.report(study), everything)
