"""From a sweep to its search: the strategy that the YAML names, the problem as it is given to it, the proposer, and the
small files that a strategy keeps beside the ledger."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from isoflop.core.errors import UserError
from isoflop.core.yaml_source import Source
from isoflop.ledger import Store
from isoflop.models.family import family_of
from isoflop.search import STRATEGIES, Aim, Problem, Proposer, Strategy, make_pruner
from isoflop.search.options import Where
from isoflop.sweep.blocks import COMMON_SEARCH_KEYS
from isoflop.sweep.law_axes import planned_axes
from isoflop.sweep.resolved import Sweep
from isoflop.sweep.spec import SweepSpec

_FINDINGS = TypeAdapter(dict[str, Any])


def find_strategy(spec: SweepSpec, source: Source) -> Strategy:
    """The strategy of a sweep's ``search`` block, with its options.

    Raises:
        UserError: for a name, an option or a key of the block that is not allowed, before the space is known.
    """
    search, where = spec.search, _where(source)
    kind = STRATEGIES.get(search.sampler, where("sampler"))
    for key in sorted(search.model_fields_set - set(kind.keys) - set(COMMON_SEARCH_KEYS)):
        takers = " or ".join(f"'sampler: {n}'" for n in STRATEGIES if key in STRATEGIES.get(n).keys)
        raise UserError(f"{where(key)}: only {takers} takes it; the sampler is {search.sampler!r}")
    if search.pruner != "none" and not kind.prunable:
        raise UserError(f"{where('pruner')}: {kind.unprunable}; sampler {search.sampler!r} takes none")
    if kind.most_aims is not None and len(spec.objectives) > kind.most_aims:
        others = [n for n in STRATEGIES if STRATEGIES.get(n).most_aims is None]
        most = "a single objective" if kind.most_aims == 1 else f"{kind.most_aims} objectives at most"
        raise UserError(f"{where('sampler')}: {search.sampler} takes {most}; use {', '.join(others)}")
    if search.pruner != "none" or search.pruner_options:
        make_pruner(search.pruner, search.pruner_options, where)
    return kind.of(search.options, where)


def check_problem(sweep: Sweep) -> None:
    """Raise UserError for a sweep that its strategy cannot search."""
    sweep.strategy.check(problem_of(sweep))


def problem_of(sweep: Sweep, apart: bool = False, pruned: bool = True) -> Problem:
    """A sweep as its strategy sees it.

    Args:
        apart: a dear search may think in a process of its own.
        pruned: with the sweep's pruner.
    """
    spec, search = sweep.spec, sweep.spec.search
    sizes = {m.ref: float(family_of(m.ref).info(m.ref, m.options).n_params) for m in spec.models}
    more = search.model_dump(include=set(sweep.strategy.keys))
    return Problem(
        space=sweep.space,
        aims=tuple(Aim(o.metric, o.direction, o.task) for o in spec.objectives),
        seed=spec.seed,
        pruner=search.pruner if pruned else "none",
        pruner_options=search.pruner_options if pruned else {},
        apart=apart,
        tasks=tuple(t.name for t in spec.tasks),
        sizes=sizes,
        axes=planned_axes(sweep, sizes),
        trials=spec.budget.trials,
        flops=spec.budget.flops,
        more={k: v for k, v in more.items() if v is not None},
        where=_where(sweep.source),
    )


def make_proposer_for(sweep: Sweep, apart: bool = False, pruned: bool = True) -> Proposer:
    """What a sweep's ``search`` block asks for; see :func:`problem_of`."""
    return sweep.strategy.make(problem_of(sweep, apart, pruned))


class SweepShelf:
    """Files of a strategy, beside the sweep's ledger."""

    def __init__(self, store: Store, sweep: str) -> None:
        self._store = store
        self._sweep = sweep

    def read(self, name: str) -> bytes | None:
        """What lies there; None when nothing does."""
        return self._store.read(self._store.path("sweeps", self._sweep, name))

    def write(self, name: str, data: bytes) -> None:
        """Replaces what lies there."""
        self._store.write(self._store.path("sweeps", self._sweep, name), data)


def save_findings(store: Store, sweep: Sweep, proposer: Proposer) -> None:
    """Keep what the search has found out beside the sweep's rows, so that it can be shown without resolving the sweep."""
    found = sweep.strategy.findings(proposer, problem_of(sweep))
    if found is not None:
        SweepShelf(store, sweep.spec.name).write(_file(sweep.spec), json.dumps(found).encode())


def read_findings(store: Store, spec: SweepSpec) -> dict[str, Any] | None:
    """What :func:`save_findings` kept, or None."""
    data = SweepShelf(store, spec.name).read(_file(spec))
    if data is None:
        return None
    try:
        return _FINDINGS.validate_json(data)
    except ValueError:
        raise _damaged(store.path("sweeps", spec.name, _file(spec))) from None


def findings_lines(spec: SweepSpec, findings: dict[str, Any]) -> list[str]:
    """What a search has found out, for people; plainly, where its strategy is not registered here."""
    name = spec.search.sampler
    try:
        return (STRATEGIES.get(name) if name in STRATEGIES else Strategy).lines(findings)
    except (LookupError, TypeError, ValueError, AttributeError):  # of a file that somebody else wrote
        raise _damaged(_file(spec)) from None


def _damaged(path: str) -> UserError:
    return UserError(f"{path}: is damaged; delete it, and run the sweep again, which writes it anew")


def _file(spec: SweepSpec) -> str:
    return f"{spec.search.sampler}_search.json"


def _where(source: Source) -> Where:
    return lambda *path: source.where(("search", *path))
