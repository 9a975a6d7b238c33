"""Rows as candidates, and the questions of :mod:`isoflop.frontier.answers` put to them, task by task and model by model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError, unknown
from isoflop.frontier.answers import Answer, Answers, Asked, reference, row_of
from isoflop.frontier.evidence import Candidate
from isoflop.frontier.questions import best, largest_ratio
from isoflop.frontier.speed_up import speed_up as speed_ups
from isoflop.laws.table import Tabular, as_table, column, where
from isoflop.ledger.schema import FOOTPRINT_COLUMNS
from isoflop.sweep.configs import COSTS, Config, amounts_of, costs_of, read_configs, words
from isoflop.sweep.outside import NAMELESS, as_rows
from isoflop.sweep.results import usable

QUESTIONS = ("share", "within", "speed_up", "versus", "measured")
"""What makes a question one to the rows."""
WORDS = {
    "flops": ("FLOPs of an answer", "FLOPs"),
    "bytes": ("bytes of weights and cache", "B"),
    "kv_bytes": ("bytes of the KV cache", "B"),
    "weight_bytes": ("bytes of the weights", "B"),
    "seconds": ("seconds of an answer", "s"),
}
"""Measured costs by name: what they are called in a sentence, and their unit."""
FORMULAS = {"1/ratio": ("what is compressed", "")}
"""The same of costs that are worked out."""
OR = " or "
"""Between the costs of answers to several."""


@dataclass(frozen=True)
class Questions:
    """What is asked; without any, all three with shares of a half and a margin of a hundredth.

    Attributes:
        shares: of the uncompressed cost; budgets: costs of an answer, per task over all models.
        within: margin on the uncompressed error; speed_up: asked for; versus: a method to compare with.
    """

    shares: tuple[float, ...] = ()
    budgets: tuple[float, ...] = ()
    within: float | None = None
    speed_up: bool = False
    versus: str | None = None

    @classmethod
    def of(
        cls, share: float | Sequence[float] | None, budget: float | Sequence[float] | None, within: float | None,
        speed_up: bool, versus: str | None,
    ) -> Questions:  # fmt: skip
        """From what a person gave. Raises UserError for numbers that make no question."""
        shares, budgets = _numbers(share), _numbers(budget)
        for value in shares:
            if not 0 < value <= 1:
                raise UserError(f"share = {value:g}; allowed: above 0, up to 1 (of what the uncompressed model takes)")
        for value in budgets:
            if not 0 < value < math.inf:
                raise UserError(f"budget = {value:g}; allowed: a finite number above 0")
        if within is not None and not 0 <= within < math.inf:
            raise UserError(f"within = {within:g}; allowed: a finite number from 0, in the unit of the error")
        if not (shares or budgets or speed_up or versus) and within is None:
            return cls((0.5,), (), 0.01, True)
        return cls(shares, budgets, within, speed_up or versus is not None, versus)


def _numbers(given: float | Sequence[float] | None) -> tuple[float, ...]:
    if given is None:
        return ()
    return tuple(float(v) for v in np.atleast_1d(np.asarray(given, dtype=np.float64)))


@np.errstate(all="ignore")  # what overflows is no finite number, and is left out or said to be unknown
def answers(
    table: Tabular,
    share: float | Sequence[float] | None = None,
    budget: float | Sequence[float] | None = None,
    within: float | None = None,
    speed_up: bool = False,
    versus: str | None = None,
    cost: str | None = None,
    y: str = "error",
    map: Mapping[str, str] | None = None,
    where: str | None = None,
    baseline: str | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Answers:
    """What was measured, as answers: which configuration is best at a budget, how far one may compress, how much that saves.

    Args:
        table: rows of a sweep; or any table with columns ``method``, ``error`` and, where there are such, ``task``, ``model``,
            ``repeat``, ``example``, ``ratio``, knobs and costs; see :func:`isoflop.sweep.outside.as_rows`.
        share: one or several, of what the uncompressed model takes: the best configuration of each model that takes no more.
        budget: one or several costs of an answer: the best configuration of all models.
        within: the largest compression of each model whose error is within this of the uncompressed one; the same margin for speed-ups.
        speed_up: how much cheaper each method is than uncompressed at equal error; ``versus``: than this method.
        cost: ``bytes``, ``kv_bytes``, ``weight_bytes``, ``flops``, ``seconds``, ``1/ratio`` (what families cut, as they count it:
            the cache behind the prompt, not behind the answer), or an expression of columns; by default what the methods compress, and FLOPs for a budget.
        y, map, where: the error, names of columns and a condition on rows, as for :func:`isoflop.fit`.
        baseline: the method that leaves a model as it is, in a table from elsewhere; default: ``none``.
        level: of statements and intervals.

    Raises:
        UserError: a number, a name or a column is wrong, or no question can be answered.
    """
    if not 0 < level < 1:
        raise UserError(f"level = {level:g}; allowed: between 0 and 1")
    asked = Questions.of(share, budget, within, speed_up, versus)
    rows, notes = _rows(table, y, map, where, baseline)
    configs = read_configs(rows)
    if not configs:
        raise UserError("no finished row has a finite error: nothing to answer from")
    cost = cost or only_cost(configs)
    measured = _Measured(rows, configs, cost)
    found: list[Answer] = []
    for scene in dict.fromkeys(c.scene for c in configs):
        own = [c for c in configs if c.scene == scene]
        for money in asked.budgets:
            name = cost or "flops"
            models = {c.model for c in own}
            key = _key(scene, next(iter(models))) if len(models) == 1 else {"task": scene}
            candidates, more = measured.candidates(own, name, several=len(models) > 1)
            if candidates:
                what = _asked(key, name, level, seed)
                found.append(_noted(best(candidates, what, money), more, what, candidates if len(models) == 1 else ()))
        for model in dict.fromkeys(c.model for c in own):
            mine = [c for c in own if c.model == model]
            found += _of_model(measured, mine, _key(scene, model), asked, cost, level, seed)
    _refuse_nothing(found, asked)
    return Answers(
        found, _words(cost)[0] if cost else f"share of {measured.compared(configs)}, of the uncompressed", notes
    )


def best_at_shares(table: Tabular, shares: Sequence[float]) -> Answers | None:
    """What is best at shares of the uncompressed cost, apart for each thing that methods compress (a cache, weights, prompts).

    None where nothing is compressed, or there is nothing to compare it with.
    """
    configs = read_configs(_rows(table, "error", None, None, None)[0])
    kinds = dict.fromkeys(c.compression.of for c in configs if c.compression and not c.uncompressed)
    found: list[Answer] = []
    for kind in kinds:
        names = {c.method for c in configs if c.uncompressed or (c.compression and c.compression.of == kind)}
        listed = ", ".join("'" + name.replace("'", "''") + "'" for name in sorted(names))
        try:
            found += answers(table, share=shares, where=f"method IN ({listed})")
        except UserError:
            continue  # no cost that all of them have
    return Answers(found, OR.join(kinds)) if found else None


def only_cost(configs: Sequence[Config]) -> str | None:
    """The one cost that is measured, where nothing says how much is compressed; None where there is a choice."""
    if any(c.compression for c in configs if not c.uncompressed):
        return None
    names = [c.key for c in COSTS if any(one.costs.get(c.key) for one in configs)]
    return names[0] if len(names) == 1 else None


def _key(scene: str, model: str) -> dict[str, str]:
    return {"task": scene} | ({} if model == NAMELESS else {"model": model})


def _of_model(
    measured: _Measured, configs: Sequence[Config], key: dict[str, str], asked: Questions, cost: str | None, level: float,
    seed: int,
) -> list[Answer]:  # fmt: skip
    """The questions that compare with one model's uncompressed self."""
    if not (asked.shares or asked.speed_up) and asked.within is None:
        return []
    candidates, notes = measured.candidates(configs, cost)
    if not candidates:
        return []
    what = _asked(key, cost, level, seed, measured.compared(configs))
    found = []
    for share in asked.shares:
        parts = candidates
        if cost is not None:  # shares are of the uncompressed cost
            dense = reference(candidates)
            parts = [] if dense is None else [replace(c, cost=c.cost / dense.cost, costs={}) for c in candidates]
        if parts:
            part = replace(what, unit="")
            found.append(_noted(best(parts, part, share, share=True), notes, part, parts))
        else:
            missing = "no uncompressed run whose cost a share could be of; add the method none"
            values = {"budget": share, "configuration": None}
            found.append(Answer("best", key, f"{what.where}: unknown: {missing}", values, unknown=missing))
    if asked.within is not None:
        found.append(_noted(largest_ratio(candidates, what, asked.within), notes, what, candidates))
    if asked.speed_up:
        answered = speed_ups(candidates, what, asked.within or 0.0, asked.versus)
        found += [_noted(a, notes, what, candidates) for a in answered]
    return found


def _noted(answer: Answer, notes: Sequence[str], asked: Asked, candidates: Sequence[Candidate]) -> Answer:
    """An answer with what holds for all of its candidates, and with what a figure of it needs."""
    dense = reference(candidates)
    mark = None if dense is None else row_of(dense, asked, float(np.mean(list(dense.errors.values()))), None)
    return replace(answer, notes=[*answer.notes, *notes], axis=asked.axis, reference=mark)


def _asked(key: Mapping[str, str], cost: str | None, level: float, seed: int, compared: str = "") -> Asked:
    called, unit = _words(cost) if cost else (compared, "")
    return Asked(key, called, unit, level, seed)


def _words(cost: str) -> tuple[str, str]:
    return (WORDS | FORMULAS).get(cost, (cost, "units"))


def _refuse_nothing(found: Sequence[Answer], asked: Questions) -> None:
    """A budget that nothing fits, in any task, is a wrong budget."""
    if not found:
        raise UserError("no configuration has a known cost above 0; name one with cost, e.g. flops")
    tight = [a for a in found if a.unknown == "nothing fits the budget"]
    if len(tight) == len(found) and asked.budgets:
        cheapest = min(a.values["cheapest"] for a in tight)
        raise UserError(
            f"budget = {max(asked.budgets):g} is below the cheapest configuration, which costs {cheapest:.6g}"
        )


def _rows(
    table: Tabular, y: str, map: Mapping[str, str] | None, condition: str | None, baseline: str | None
) -> tuple[pa.Table, list[str]]:
    """Usable rows as the ledger has them, and what was left out."""
    table = where(as_table(table), condition)
    if "spec" not in table.column_names or "job_id" not in table.column_names:
        table, notes = as_rows(table, y, map or {}, baseline)
    else:
        notes = []
        if map or baseline:
            raise UserError("map and baseline are for tables from elsewhere: a sweep's rows have their names")
        if y != "error":  # scores are the error's
            table = table.set_column(table.schema.get_field_index("error"), "error", pa.array(column(table, y, "y")))
            table = table.set_column(table.schema.get_field_index("scores"), "scores", pa.nulls(table.num_rows, pa.list_(pa.float32())))  # fmt: skip
    good = usable(table)
    finite = np.isfinite(good["error"].to_numpy(zero_copy_only=False).astype(float)) if good.num_rows else np.zeros(0)
    left = table.num_rows - int(finite.sum())
    if left:
        notes.append(f"{left} of {table.num_rows} rows are left out: not finished, or without a finite error")
    return good, notes


def _measured_names(rows: pa.Table, configs: Sequence[Config]) -> list[str]:
    """What a cost can be called here: costs that some row knows, axes, and what is in their footprints."""
    costs = [name for name in WORDS if any(c.costs.get(name) for c in configs)]
    axes = [name for name in ("N", "V", "Q", "bits", *FOOTPRINT_COLUMNS) if rows[name].null_count < rows.num_rows]
    more = {name for footprint in rows["footprint"].to_pylist() for name, _ in footprint or ()}
    return list(dict.fromkeys([*costs, *axes, *(f"footprint.{name}" for name in sorted(more - {*costs, *axes}))]))


class _Measured:
    """The rows behind configurations, and what they cost."""

    def __init__(self, rows: pa.Table, configs: Sequence[Config], cost: str | None) -> None:
        self._rows = {r["job_id"]: r for r in rows.to_pylist()}
        self._expression: dict[str, float] = {}
        if cost is not None and cost not in WORDS:
            try:
                values = column(rows, cost, "cost")
            except UserError as error:
                if cost.isidentifier():
                    raise unknown("cost", cost, _measured_names(rows, configs)) from None
                raise error from None
            self._expression = dict(zip(rows["job_id"].to_pylist(), values.tolist(), strict=True))

    def compared(self, configs: Sequence[Config]) -> str:
        """What the ratios of these configurations compare."""
        found = dict.fromkeys(c.compression.of for c in configs if c.compression and not c.uncompressed)
        return next(iter(found), "what is compressed")

    def candidates(
        self, configs: Sequence[Config], cost: str | None, several: bool = False
    ) -> tuple[list[Candidate], list[str]]:
        """Those whose cost is known, and how many are not.

        Args:
            cost: a name or an expression; None for the share that is left of what the methods compress.
            several: models, so that titles name them.
        """
        if cost is None:
            meanings = dict.fromkeys(c.compression.of for c in configs if c.compression and not c.uncompressed)
            if len(meanings) > 1:
                raise UserError(
                    f"methods compress different things ({'; '.join(meanings)}); name a cost that all have: {self._known(configs)}"
                )
            if not meanings and any(not c.uncompressed for c in configs):
                raise UserError(f"how much is compressed is not known; name a cost: {self._known(configs)}")
        found, missing = [], 0
        for c in configs:
            one = self._candidate(c, cost, several)
            if one is None:
                missing += 1
            else:
                found.append(one)
        found.sort(key=lambda c: (c.title, c.cost))  # so that chance is drawn alike, whatever the rows' order
        notes = [f"{missing} of {len(configs)} configurations have no known cost above 0"] * bool(missing)
        if cost == "seconds" and any(len(c.costs) == 1 for c in found):
            notes.append("seconds were measured once: their own noise is in no probability or interval")
        return found, notes

    def _known(self, configs: Sequence[Config]) -> str:
        names = [c.key for c in COSTS if any(one.costs.get(c.key) for one in configs)]
        return ", ".join(names) or "none is measured here; give an expression of columns"

    def _candidate(self, c: Config, cost: str | None, several: bool) -> Candidate | None:
        rows = [self._rows[job] for job in c.jobs]
        costs = {r["repeat"]: self._cost(r, cost) for r in rows}
        if cost is None:
            mean = 1.0 if c.uncompressed else 1 / c.times if c.times else math.nan
            costs = {}
        else:
            mean = float(np.mean(list(costs.values())))
        if not (math.isfinite(mean) and mean > 0):
            return None
        knobs = words({**amounts_of(rows[0]), **c.settings})
        title = f"{c.method} {knobs}".strip() + (f" on {c.model}" if several else "")
        return Candidate(
            title=title,
            method=c.method,
            chain=c.variant,
            model="" if c.model == NAMELESS else c.model,
            cost=mean,
            errors={r["repeat"]: float(r["error"]) for r in rows},
            scores={r["repeat"]: np.asarray(r["scores"], dtype=float) for r in rows if r["scores"]},
            costs=costs,
            uncompressed=c.uncompressed,
            ratio=c.times,
        )

    def _cost(self, row: Mapping[str, Any], cost: str | None) -> float:
        if cost is None:
            return math.nan
        if self._expression:
            return self._expression[row["job_id"]]
        return costs_of([row]).get(cost, math.nan)
