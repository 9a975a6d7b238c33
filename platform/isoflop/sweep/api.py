"""The Python API: ``isoflop.run``, ``isoflop.open`` and what an opened sweep can be asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from isoflop.core.errors import UserError, unknown
from isoflop.core.public import look_beside
from isoflop.execute import Executor, LocalExecutor, Resources
from isoflop.jobs.devices import devices_here
from isoflop.ledger import Ledger, Store
from isoflop.ledger import schema as ledger_schema
from isoflop.sweep import results as results_module
from isoflop.sweep.driver import Driver
from isoflop.sweep.ending import Conclude, Draw, await_tracker, conclusion_of, drawn, end_tracking
from isoflop.sweep.metrics import MetricsProgress
from isoflop.sweep.note import Conclusion, closing, opening
from isoflop.sweep.progress import LogFile, Progress, Quiet
from isoflop.sweep.resolve import resolve
from isoflop.sweep.resolved import Sweep
from isoflop.sweep.searching import SweepShelf, findings_lines, make_proposer_for, read_findings, save_findings
from isoflop.sweep.spec import SweepSpec, load_spec
from isoflop.sweep.state import StateFile
from isoflop.sweep.stored import read_stale, save_spec, spec_text, stored_source
from isoflop.sweep.summary import Summary
from isoflop.track import MlflowTracker, NullTracker, Tracker

EXECUTORS = ("ray", "local")
_MENU = ("sizes", "tokens", "limits", "held", "constants")  # options of a frontier rather than of a fit


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what; none of it changes a result.

    Attributes:
        store: overrides the spec's.
        executor: "ray", or "local" for this process.
        ray_address: of a running cluster; None starts a private one on this host.
        node_ip: the driver's own address, on hosts that have several.
        tracking_uri: MLflow; None for the store's own database, "none" for no tracking.
        workers: upper bound on parallel jobs.
        cache_dir: of stages; None for the default.
        ray_start_timeout: seconds in which a private Ray must be up.
        track_wait: seconds to wait at the end for an MLflow that does not answer; one that makes progress is waited for.
    """

    store: str | None = None
    executor: str = "ray"
    ray_address: str | None = None
    node_ip: str | None = None
    tracking_uri: str | None = None
    workers: int | None = None
    cache_dir: str | Path | None = None
    retry_failed: bool = False
    ray_start_timeout: float = 300.0
    track_wait: float = 60.0

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise unknown("executor", self.executor, EXECUTORS)
        if self.workers is not None and (
            isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1
        ):
            raise UserError(f"workers = {self.workers!r}; allowed: whole numbers from 1")
        for name in ("track_wait", "ray_start_timeout"):
            seconds = getattr(self, name)
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
                raise UserError(f"{name} = {seconds!r}; allowed: seconds from 0")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RunOptions:
        """Options by name. Raises UserError for one that does not exist."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise unknown("option of run", name, [*known, "report"])
        return cls(**options)


def run(
    given: str | Path | Mapping[str, Any],
    progress: Progress | None = None,
    draw: Draw | None = None,
    conclude: Conclude | None = None,
    **options: Any,
) -> SweepResults:
    """Run a sweep, or what is missing of it, and return its results.

    Args:
        given: path of a YAML file, or the same content as a dict.
        progress: told what happens; quiet by default.
        draw, conclude: as for :func:`run_resolved`; ``isoflop.run`` gives them.
        options: fields of :class:`RunOptions`.

    Raises:
        UserError: the spec, an option or the environment is wrong; says what to mend.
        Unavailable: Ray did not come up, or died and could not be started again; what was finished is kept.
    """
    chosen = RunOptions.of(options)
    return run_resolved(resolve(given), chosen, progress or Quiet(), conclude, draw)


def run_resolved(
    sweep: Sweep,
    options: RunOptions,
    progress: Progress,
    conclude: Conclude | None = None,
    draw: Draw | None = None,
) -> SweepResults:
    """Run a resolved sweep; see :func:`run`.

    Args:
        conclude: asked at the end, unless the session was interrupted, for what people should read of it. When it fails
            that is said in one line, and the results are what they are without it.
        draw: makes files of figures out of the laws and frontiers, for the parent run in MLflow.
    """
    spec = sweep.spec
    look_beside(sweep.source.folder)  # another sweep may have been looked up since
    store = Store.open(options.store or spec.store)
    tracker = make_tracker(store, spec.name, options.tracking_uri)
    executor = make_executor(sweep, options, store)
    shown = MetricsProgress(progress, spec.name, options.executor == "ray")
    with ExitStack() as stack:
        ledger = Ledger(store, spec.name).lock()
        stack.callback(ledger.unlock)
        ledger.fold()
        save_spec(store, sweep, ledger)
        state = StateFile(store, spec.name, shown)
        log = LogFile(_log_file(store, spec.name), state)
        stack.callback(log.close)
        stack.callback(state.close)
        log.line(f"sweep {spec.name}: store {store.shown}")
        tracker.start(spec_text(sweep), {"spec": spec.digest, "store": store.shown}, opening(spec))
        stack.push(partial(end_tracking, tracker))
        stack.callback(executor.close, now=True)
        proposer = make_proposer_for(sweep, apart=options.executor != "local")
        stack.callback(proposer.close)
        sweep.strategy.keep(proposer, SweepShelf(store, spec.name))
        summary = Driver(sweep, ledger, executor, proposer, tracker, log, options.retry_failed).run()
        proposer.close()
        executor.close(now=summary.interrupted)
        save_findings(store, sweep, proposer)
        opened = SweepResults(store, spec.name, spec, summary)
        if summary.done or not summary.interrupted:  # stopped before the first job there is nothing to find
            if spec.laws:
                log.line("fitting laws")
            opened.findings_of_run = opened.findings()
            opened.findings_of_run.save(store, spec.name)
        findings = opened.findings_of_run
        if conclude is not None and not summary.interrupted:
            opened.conclusion = conclusion_of(conclude, opened, log)
        status = "KILLED" if summary.interrupted else "FINISHED"
        files = [*findings.artifacts(), *drawn(draw, findings, log), *opened.conclusion.artifacts]
        note = closing(spec, findings, opened.conclusion, executor.dashboard)
        tracker.finish(files, findings.metrics(), note, status)
        summary.untracked = await_tracker(tracker, options.track_wait, log)
        if summary.aimless:
            raise UserError(
                f"{summary.aimless}; {summary.done} jobs have results, which are kept: mend it and run it again"
            )
        return opened


def make_tracker(store: Store, name: str, uri: str | None) -> Tracker:
    """The tracker for a store: its own SQLite database unless another URI is given; "none" for nothing."""
    if uri == "none":
        return NullTracker()
    own = own_tracking_uri(store)
    chosen = uri or own
    if chosen is None:
        raise UserError(
            f"store {store.shown} is not on this host, so it cannot hold MLflow's database; give --tracking-uri, or --tracking-uri none"
        )
    root = f"file://{store.no_links('mlartifacts', name)}" if store.local and not chosen.startswith("http") else None
    return MlflowTracker(chosen, name, root)


def own_tracking_uri(store: Store) -> str | None:
    """The database beside the sweeps, for a store on this host. Raises StoreError where a link leads out of the store."""
    if store.local is None:
        return None
    for companion in ("-journal", "-wal", "-shm"):
        store.no_links(f"mlflow.db{companion}")
    return f"sqlite:///{store.no_links('mlflow.db')}"


def make_executor(sweep: Sweep, options: RunOptions, store: Store | None = None) -> Executor:
    """The executor that the options ask for; not started."""
    block = sweep.spec.resources
    if options.executor == "local":
        devices = devices_here(block.gpus) if block.gpus else ("cpu",)
        if block.gpus and devices == ("cpu",):
            raise UserError(f"resources.gpus = {block.gpus:g}: this process sees no GPU; allowed: 0")
        return LocalExecutor(options.cache_dir, devices, max(1, int(block.cpus)))
    from isoflop.execute.ray_executor import RayExecutor

    return RayExecutor(
        Resources(block.cpus, block.gpus, block.memory),
        options.ray_address,
        options.cache_dir,
        options.workers,
        sweep.spec.imports,
        options.node_ip,
        str(sweep.source.folder) if sweep.source.folder else None,
        store.no_links("stages") if store is not None and store.local else None,
        start_timeout=options.ray_start_timeout,
    )


def _log_file(store: Store, name: str) -> int | None:
    """For appending, in a store on this host."""
    if store.local is None:
        return None
    return store.open_plain(store.path("sweeps", name, "log.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)


class SweepResults:
    """A sweep's results. Reading executes nothing that the store holds.

    Attributes:
        name: of the sweep.
        summary, findings_of_run, conclusion: how the session went, what it found and what was written of it, when this
            came from :func:`run`.
    """

    def __init__(self, store: Store, name: str, spec: SweepSpec | None = None, summary: Summary | None = None) -> None:
        self.store = store
        self.name = name
        self.summary = summary
        self.findings_of_run = results_module.Findings("")
        self.conclusion = Conclusion()
        self._spec = spec

    def __repr__(self) -> str:
        return f"<isoflop sweep {self.name!r} in {self.store.shown}: {self.results(columns=['job_id']).num_rows} jobs>"

    @property
    def spec(self) -> SweepSpec:
        """The spec as it was last run."""
        if self._spec is None:
            self._spec, _ = load_spec(stored_source(self.store, self.name))
        return self._spec

    def results(self, columns: Sequence[str] | None = None, everything: bool = False) -> pa.Table:
        """One row per job as an Arrow table; see :mod:`isoflop.ledger.schema` for the columns.

        Args:
            columns: only these.
            everything: also rows of jobs that the sweep's YAML no longer contains.
        """
        wanted = None if columns is None else list(dict.fromkeys([*columns, "job_id"]))
        table = Ledger(self.store, self.name).read(wanted)
        stale = set() if everything else read_stale(self.store, self.name)
        if stale:
            table = table.filter(pc.invert(pc.is_in(table["job_id"], pa.array(sorted(stale), pa.string()))))
        return table if columns is None else table.select(list(columns))

    def fit(self, law: str | None = None, **options: Any) -> Any:
        """Fit a scaling law on the finished jobs.

        Args:
            law: a name or an expression; by default the first that the sweep's YAML asks for, else ``product``.
            options: as for :func:`isoflop.fit` (``y``, ``by``, ``objective``, ``fixed`` …). What is not given is as in
                the YAML's block for this law; without such a block, one fit per task.
        """
        table = results_module.usable(self.results())
        return results_module.fit_block(results_module.law_block(self.spec, law), table, self.spec.seed, **options)

    def frontier(
        self,
        law: str | None = None,
        cost: str | None = None,
        q: float | None = None,
        budget: float | Sequence[float] | None = None,
        **options: Any,
    ) -> Any:
        """The best configuration per budget that a law supports; see :func:`isoflop.frontier.frontier`.

        With ``share``, ``within``, ``speed_up``, ``versus`` or ``measured=True`` the rows answer themselves: :meth:`answers`.

        Args:
            law, options: as for :meth:`fit`; ``sizes``, ``tokens``, ``limits``, ``held`` and ``constants`` as for
                :func:`isoflop.frontier.frontier`.
            cost: formula; by default as in the YAML, else all FLOPs that were measured; ``2*N*(Q+V)`` is the language model alone.
            q: text tokens; by default as the rows measured them.
            budget: one or several; by default spread over the swept range.

        Returns:
            One frontier, or one per group of the fit.
        """
        from isoflop.frontier.result import Frontiers
        from isoflop.laws.result import GroupedFit
        from isoflop.sweep.asking import QUESTIONS

        if any(options.get(name) not in (None, False) for name in QUESTIONS):
            options.pop("measured", None)
            unasked = {"law": law, "q": q}
            if strange := next((name for name, value in unasked.items() if value is not None), None):
                raise UserError(f"{strange} is of laws: it says nothing where the rows answer themselves")
            return self.answers(cost=cost, budget=budget, **options)
        table = results_module.usable(self.results())
        block = results_module.frontier_block(self.spec, law)
        menu = {k: options.pop(k) for k in _MENU if k in options}
        fitted = self.fit(law or block.law, **options)
        fits = list(fitted) if isinstance(fitted, GroupedFit) else [fitted]
        measured = q if q is not None else block.q
        budgets = budget if budget is not None else block.budgets or None
        found = results_module.frontiers_of(fits, table, cost or block.cost, measured, budgets, **menu)
        return found[0] if len(found) == 1 else Frontiers(found)

    def answers(self, **questions: Any) -> Any:
        """What the finished jobs themselves answer, without a law; see :func:`isoflop.sweep.asking.answers`."""
        from isoflop.sweep.asking import answers

        return answers(self.results(), **questions)

    def pareto(self, objectives: Mapping[str, Literal["min", "max"]] | None = None, **options: Any) -> Any:
        """The rows that no other row beats in every objective; see :func:`isoflop.frontier.pareto`."""
        from isoflop.frontier import pareto

        return pareto(
            results_module.usable(self.results()), objectives=objectives or {"error": "min", "flops": "min"}, **options
        )

    def rate_curves(self, **options: Any) -> Any:
        """Error over real bytes of every codec, and how they compare; see :func:`isoflop.frontier.rate_curves`."""
        from isoflop.frontier import rate_curves

        return rate_curves(results_module.usable(self.results()), **options)

    def sql(self, query: str) -> pa.Table:
        """DuckDB SQL on the table ``results``."""
        from isoflop.frontier import sql

        return sql(query, self.results())

    def search_findings(self) -> dict[str, Any] | None:
        """What the search had found out when its last session ended; None for one that finds out nothing but rows."""
        return read_findings(self.store, self.spec)

    def law_search(self) -> dict[str, Any] | None:
        """:meth:`search_findings` of a search with the law sampler; None for other samplers."""
        return self.search_findings() if self.spec.search.sampler == "law" else None

    def search_lines(self) -> list[str]:
        """:meth:`search_findings` in lines for people; none where there are none."""
        found = self.search_findings()
        return [] if found is None else findings_lines(self.spec, found)

    def findings(self) -> results_module.Findings:
        """The laws and frontiers that the sweep's YAML asks for."""
        return results_module.find(self.spec, results_module.usable(self.results()))


def open_sweep(name: str, store: str | None = None) -> SweepResults:
    """Open a sweep by name. Raises UserError with the nearest name when the store has none of that name."""
    opened = Store.open(store)
    names = opened.sweeps()
    if name not in names:
        raise unknown("sweep", name, names, within=f" in store {opened.shown}")
    return SweepResults(opened, name)


def sql(query: str, source: Any = None, store: str | None = None) -> pa.Table:
    """DuckDB SQL on a table called ``results``.

    Args:
        source: a sweep's name, an opened sweep or any table; by default the current rows of every sweep of the store,
            told apart by the column ``sweep``.
        store: where sweeps are kept.
    """
    from isoflop.frontier import sql as query_table

    if source is None:
        opened = Store.open(store)
        tables = [SweepResults(opened, name).results() for name in opened.sweeps()]
        source = pa.concat_tables(tables) if tables else ledger_schema.empty()
    elif isinstance(source, str):
        source = open_sweep(source, store).results()
    elif isinstance(source, SweepResults):
        source = source.results()
    return query_table(query, source)
