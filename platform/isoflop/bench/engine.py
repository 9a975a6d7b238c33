"""``isoflop bench engine``: the engine against its peers, same objective, same number of slots, one run.

Peers are measured in their best configuration: Ray Tune with ``reuse_actors`` and in-memory results, Optuna in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from isoflop.bench import parts
from isoflop.cli.common import console, emit, grid, json_option
from isoflop.core.errors import UserError

_SLOTS = 2
_SHORT: dict[str, Any] = {"x": {}, "y": {}, "z": {}}


@dataclass
class Measurement:
    """One system on one workload.

    Attributes:
        cpu_ms_per_job: of the driver's process, with all of its threads.
        search_ms_per_job: of our search process, where there is one; the peers' samplers run in their drivers.
        sampler: peers are compared with the same one.
    """

    workload: str
    system: str
    jobs: int
    seconds: float
    cpu_ms_per_job: float | None = None
    search_ms_per_job: float | None = None
    sampler: str = ""

    @property
    def rate(self) -> float:
        """Jobs per second."""
        return self.jobs / self.seconds


def _spec(
    name: str, trials: int, sampler: str = "tpe", model: str = "bench/noop", task: str = "bench-noop", knobs: Any = None
) -> dict[str, Any]:
    return {
        "name": name,
        "import": ["isoflop.bench.parts"],
        "models": [model],
        "methods": [{"bench-knobs": knobs or _SHORT}],
        "tasks": [task],
        "search": {"sampler": sampler},
        "budget": {"trials": trials},
    }


def ours(workload: str, label: str, spec: dict[str, Any], folder: Path, track: bool) -> Measurement:
    """Our engine, its driver loop with everything that a job costs, MLflow caught up."""
    from isoflop.sweep import api
    from isoflop.sweep.driver import Driver
    from isoflop.sweep.progress import Quiet
    from isoflop.sweep.resolve import resolve

    sweep = resolve(spec)
    store = api.Store.open(str(folder / "store"))
    ledger = api.Ledger(store, sweep.spec.name).lock()
    tracker = api.make_tracker(store, sweep.spec.name, None if track else "none")
    executor = api.make_executor(sweep, api.RunOptions(workers=_SLOTS, cache_dir=folder / "cache"))
    proposer = api.make_proposer_for(sweep, apart=True)
    tracker.start("", {})
    proposer.start()
    executor.start()
    while len(executor.workers()) < _SLOTS:
        executor.poll(0.1)
    try:
        _settle(tracker)
        begin, cpu, searched = time.monotonic(), time.process_time(), _cpu_of(proposer)
        summary = Driver(sweep, ledger, executor, proposer, tracker, Quiet()).run()
        tracker.finish([], {}, "", "FINISHED")
        while tracker.backlog():
            time.sleep(0.005)
        seconds, cpu, searched = time.monotonic() - begin, time.process_time() - cpu, _cpu_of(proposer) - searched
    finally:
        proposer.close()
        executor.close(now=True)
        tracker.close(30.0)
        ledger.unlock()
    if summary.ok != summary.ran:
        raise RuntimeError(f"{summary.failed} jobs failed")
    each = 1000 / summary.ran
    sampler = sweep.spec.search.sampler
    return Measurement(workload, label, summary.ran, seconds, cpu * each, searched * each or None, sampler)


def _cpu_of(proposer: Any) -> float:
    """CPU seconds that a search process has used so far; 0 where the search is part of the driver."""
    pid = getattr(proposer, "pid", None)
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _settle(tracker: Any) -> None:
    """Creating the database is paid once per store, by everybody, and is not what is measured."""
    if hasattr(tracker, "_projection"):
        while tracker._projection is None or not tracker._projection._parent_id:
            time.sleep(0.05)


def ray_tune(
    workload: str,
    label: str,
    samples: int,
    trainable: Any,
    space: dict[str, Any],
    folder: Path,
    reuse: bool,
    mlflow: bool,
    search: str = "tpe",
) -> Measurement:
    """Ray Tune with OptunaSearch on a private cluster of two CPUs; ``search`` "grid" leaves the points to Tune."""
    import optuna
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0", TUNE_MAX_PENDING_TRIALS_PG="2")
    callbacks = []
    if mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = f"sqlite:///{folder / 'tune.db'}"
        _make_database(uri)
        callbacks.append(MLflowLoggerCallback(tracking_uri=uri, experiment_name="tune"))
    sampler = optuna.samplers.RandomSampler(seed=0) if search == "random" else None  # its default is TPE
    algorithm = None if search == "grid" else ConcurrencyLimiter(OptunaSearch(sampler=sampler), _SLOTS)
    with _ray():
        begin, cpu = time.monotonic(), time.process_time()
        found = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="error", mode="min", num_samples=samples, reuse_actors=reuse,
                search_alg=algorithm, max_concurrent_trials=None if algorithm else _SLOTS,
            ),
            run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0, callbacks=callbacks),
        ).fit()  # fmt: skip
        seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
        trials = len(found)
        if trials < samples or found.errors:
            raise RuntimeError(f"Ray Tune finished {trials} trials, {len(found.errors)} with errors")
    return Measurement(workload, label, trials, seconds, 1000 * cpu / trials, sampler=search)


def optuna_mlflow(trials: int, folder: Path) -> Measurement:
    """Optuna in memory with two threads and its MLflow callback."""
    import optuna

    try:
        from optuna_integration import MLflowCallback
    except ImportError:
        raise UserError("this peer needs optuna-integration: pip install 'isoflop[bench]'") from None

    uri = f"sqlite:///{folder / 'optuna.db'}"
    _make_database(uri)
    study = optuna.create_study(study_name="bench", sampler=optuna.samplers.TPESampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        return parts.noop_score(
            trial.suggest_float("x", 0, 1), trial.suggest_float("y", 1e-3, 1, log=True), trial.suggest_float("z", 0, 10)
        )

    begin, cpu = time.monotonic(), time.process_time()
    study.optimize(
        objective, n_trials=trials, n_jobs=_SLOTS, callbacks=[MLflowCallback(tracking_uri=uri, metric_name="error")]
    )
    seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    return Measurement(
        "no-op + MLflow", "Optuna n_jobs=2 + MLflowCallback", trials, seconds, 1000 * cpu / trials, sampler="tpe"
    )


def bench_noop(folder: Path, trials: int, peer_trials: int) -> list[Measurement]:
    """Jobs that do nothing, over three knobs: with TPE, and with random search, where the sampler costs next to nothing."""
    from ray import tune

    noop, _, _ = _trainables()
    space = {"x": tune.uniform(0, 1), "y": tune.loguniform(1e-3, 1), "z": tune.uniform(0, 10)}
    found = []
    for track, workload, callback in ((False, "no-op", ""), (True, "no-op + MLflow", " + MLflowLoggerCallback")):
        for sampler in ("tpe", "random"):
            name = f"noop-{sampler}-{track}"
            peer = f"Ray Tune + OptunaSearch{callback}, reuse_actors, {sampler}"
            found += [
                ours(workload, f"isoflop, {sampler}", _spec(name, trials, sampler), folder / name, track),
                ray_tune(workload, peer, peer_trials, noop, space, folder / f"tune-{name}", True, track, sampler),
            ]
    return [*found, optuna_mlflow(peer_trials, folder)]


def bench_reload(folder: Path, trials: int) -> list[Measurement]:
    """Configurations over one model of 50 million parameters that lies on disk."""
    from ray import tune
    from safetensors.torch import save_file

    _, reload, _ = _trainables()
    weights = folder / "model.safetensors"
    save_file(parts.big_network().state_dict(), weights)
    space = {"x": tune.grid_search([i / trials for i in range(trials)]), "path": str(weights)}
    knobs = {"x": [i / trials for i in range(trials)]}
    spec = _spec("reload", trials, "grid", "bench/big", "bench-forward", knobs)
    ours(
        "reload",
        "warm-up of the stage",
        {**spec, "name": "warm-up", "budget": {"trials": 1}},
        folder / "g",
        track=False,
    )
    return [
        ours("reload-bound", "isoflop", spec, folder / "g", track=False),
        ray_tune(
            "reload-bound",
            "Ray Tune, reuse_actors, a load per trial",
            1,
            reload,
            space,
            folder / "h",
            reuse=True,
            mlflow=False,
            search="grid",
        ),
        ray_tune(
            "reload-bound",
            "Ray Tune, its default",
            1,
            reload,
            space,
            folder / "i",
            reuse=False,
            mlflow=False,
            search="grid",
        ),
    ]


def bench_features(folder: Path) -> list[Measurement]:
    """Eight ratios on the same features."""
    from ray import tune

    _, _, feature = _trainables()
    counts = [1, 2, 4, 8, 16, 64, 144, 576]
    spec = _spec("features", len(counts), "grid", "bench/noop", "bench-features", {"k": counts})
    return [
        ours("feature-bound", "isoflop", spec, folder / "j", track=False),
        ray_tune(
            "feature-bound",
            "Ray Tune, reuse_actors",
            1,
            feature,
            {"k": tune.grid_search(counts)},
            folder / "k",
            reuse=True,
            mlflow=False,
            search="grid",
        ),
    ]


def bench_growth(folder: Path, jobs: int) -> dict[str, float]:
    """Time per job at the end of a long random search against its beginning, memory, and resuming it finished."""
    from isoflop.sweep import driver as driver_module

    marks: list[tuple[int, float, int]] = []
    original = driver_module.Driver._commit

    def commit(self: Any, force: bool = False) -> None:
        original(self, force)
        marks.append((self._summary.ran, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

    driver_module.Driver._commit = commit  # type: ignore[method-assign]
    try:
        ours("growth", "isoflop", _spec("growth", jobs, "random"), folder / "l", track=False)
    finally:
        driver_module.Driver._commit = original  # type: ignore[method-assign]
    tenth = jobs // 10
    first = _cpu_between(marks, tenth // 2, tenth + tenth // 2)
    last = _cpu_between(marks, jobs - tenth, jobs)
    grown = (marks[-1][2] - next(m for n, _, m in marks if n >= tenth)) / 1024
    begin = time.monotonic()
    ours_again = _resume(_spec("growth", jobs, "random"), folder / "l")
    return {
        "last_to_first_tenth": last / first,
        "memory_growth_mb": grown,
        "resume_seconds_without_ray": time.monotonic() - begin,
        "resumed_jobs": ours_again,
    }


def _cpu_between(marks: list[tuple[int, float, int]], low: int, high: int) -> float:
    inside = [(n, t) for n, t, _ in marks if low <= n <= high]
    return (inside[-1][1] - inside[0][1]) / max(1, inside[-1][0] - inside[0][0])


def _resume(spec: dict[str, Any], folder: Path) -> int:
    """What a finished sweep costs to open, check and close again, with the in-process executor (no Ray start)."""
    import isoflop

    found = isoflop.run(
        spec, store=str(folder / "store"), cache_dir=folder / "cache", executor="local", tracking_uri="none"
    )
    assert found.summary is not None
    return found.summary.ran


def bench_writer(folder: Path, rows: int) -> dict[str, float]:
    """The bulk writer of MLflow against bare inserts of the same rows into bare SQLite tables."""
    import datetime as dt

    from isoflop.track.bulk import run_id_of
    from isoflop.track.projection import Projection
    from isoflop.track.run_data import RunData

    now = dt.datetime.now(dt.UTC)
    data = [
        RunData(f"job{i}", i + 1, f"run {i}", "FINISHED", int(now.timestamp() * 1000), int(now.timestamp() * 1000) + 5,
                {f"p{k}": str(k * i) for k in range(20)}, {f"m{k}": float(k + i) for k in range(30)}, (), {f"t{k}": str(k) for k in range(15)})
        for i in range(rows)
    ]  # fmt: skip
    projection = Projection(f"sqlite:///{folder / 'writer.db'}", "writer", f"file://{folder}")
    projection.begin("", {})
    begin = time.monotonic()
    for start in range(0, rows, 200):
        projection.show(data[start : start + 200])
    bulk = time.monotonic() - begin
    with contextlib.closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        schema = sqlite3.connect(folder / "writer.db").execute(
            "SELECT sql FROM sqlite_master WHERE tbl_name IN ('runs','params','metrics','latest_metrics','tags') AND sql IS NOT NULL"
        )
        for (text,) in schema.fetchall():
            connection.execute(text)
        begin = time.monotonic()
        for start in range(0, rows, 200):
            _bare_insert(connection, [(run_id_of("writer", d.job_id), d) for d in data[start : start + 200]])
        bare = time.monotonic() - begin
    client = Projection(f"sqlite:///{folder / 'client.db'}", "writer", f"file://{folder}", bulk=False)
    client.begin("", {})
    begin = time.monotonic()
    client.show(data[:50])
    public = (time.monotonic() - begin) / 50 * rows
    return {
        "bulk_ms_per_run": 1000 * bulk / rows,
        "bulk_to_bare_sqlite": bulk / bare,
        "public_client_to_bulk": public / bulk,
    }


def _bare_insert(connection: sqlite3.Connection, batch: list[tuple[str, Any]]) -> None:
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO runs (run_uuid, name, source_type, status, start_time, end_time, lifecycle_stage) VALUES (?, ?, 'UNKNOWN', ?, ?, ?, 'active')",
        [(i, d.name, d.status, d.start_ms, d.end_ms) for i, d in batch],
    )
    connection.executemany(
        "INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)",
        [(k, v, i) for i, d in batch for k, v in d.params.items()],
    )
    connection.executemany(
        "INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)",
        [(k, v, i) for i, d in batch for k, v in d.tags.items()],
    )
    for table in ("metrics", "latest_metrics"):
        connection.executemany(
            f"INSERT INTO {table} (key, value, timestamp, step, is_nan, run_uuid) VALUES (?, ?, ?, 0, 0, ?)",
            [(k, v, d.end_ms, i) for i, d in batch for k, v in d.metrics.items()],
        )
    connection.execute("COMMIT")


# what the peers run


def _trainables() -> tuple[type, type, type]:
    from ray import tune

    class Noop(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.knobs = config

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.knobs = new_config
            return True

        def step(self) -> dict[str, Any]:
            return {"error": parts.noop_score(self.knobs["x"], self.knobs["y"], self.knobs["z"]), "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing to keep."""

    class Reload(Noop):
        def step(self) -> dict[str, Any]:
            return {
                "error": parts.forward_score(parts.load_big(Path(self.knobs["path"])), self.knobs["x"]),
                "done": True,
            }

    class Feature(Noop):
        def step(self) -> dict[str, Any]:
            return {"error": parts.pooled_error(parts.compute_features(), self.knobs["k"]), "done": True}

    return Noop, Reload, Feature


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        num_cpus=_SLOTS,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _make_database(uri: str) -> None:
    """MLflow's migrations, paid before the clock starts."""
    from mlflow import MlflowClient

    Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    MlflowClient(tracking_uri=uri).search_experiments()
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


@click.command("engine")
@click.option("--trials", default=1000, show_default=True, help="No-op jobs of ours.")
@click.option("--peer-trials", default=200, show_default=True, help="No-op trials of the peers, which are slower.")
@click.option("--growth", default=10_000, show_default=True, help="Jobs of the growth test; 0 leaves it out.")
@click.option(
    "--only",
    type=click.Choice(["noop", "reload", "features", "growth", "writer"]),
    multiple=True,
    help="Only these parts.",
)
@json_option
def engine(trials: int, peer_trials: int, growth: int, only: tuple[str, ...], as_json: bool) -> None:
    """Throughput, reloads, shared features, growth and the MLflow writer, against peers, in one run."""
    chosen = only or ("noop", "reload", "features", "growth", "writer")
    measured: list[Measurement] = []
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="isobench") as name:
        folder = Path(name)
        runs: dict[str, Callable[[], list[Measurement]]] = {
            "noop": lambda: bench_noop(folder, trials, peer_trials),
            "reload": lambda: bench_reload(folder, 20),
            "features": lambda: bench_features(folder),
        }
        for part in chosen:
            if part in runs:
                measured += runs[part]()
        if "growth" in chosen and growth:
            figures["growth"] = bench_growth(folder, growth)
        if "writer" in chosen:
            figures["writer"] = bench_writer(folder, 1000)
    ratios = _ratios(measured)
    data = {"measurements": [asdict(m) | {"jobs_per_second": m.rate} for m in measured], "ratios": ratios, **figures}
    emit(data, as_json, lambda: _print(measured, ratios, figures))


def _ratios(measured: list[Measurement]) -> dict[str, float]:
    """Our rate over each peer's, on the same workload with the same sampler."""
    out = {}
    for peer in measured:
        same = (m for m in measured if (m.workload, m.sampler) == (peer.workload, peer.sampler))
        mine = next(m for m in same if m.system.startswith("isoflop"))
        if peer is not mine:
            out[f"{peer.workload}: {mine.system} / {peer.system}"] = mine.rate / peer.rate
    return out


def _print(measured: list[Measurement], ratios: dict[str, float], figures: dict[str, dict[str, float]]) -> None:
    out = console()
    rows = [
        (
            m.workload,
            m.system,
            m.jobs,
            f"{m.rate:.1f}",
            *(f"{ms:.1f}" if ms is not None else "-" for ms in (m.cpu_ms_per_job, m.search_ms_per_job)),
        )
        for m in measured
    ]
    out.print(
        grid(
            ("workload", "system", "jobs", "jobs/s", "driver ms/job", "search ms/job"),
            rows,
            right=("jobs", "jobs/s", "driver ms/job", "search ms/job"),
        )
    )
    out.print()
    out.print(grid(("ratio", ""), [(k, f"{v:.1f} x") for k, v in ratios.items()], right=("",)))
    for name, values in figures.items():
        out.print(f"\n[bold]{name}[/bold] " + json.dumps({k: round(v, 3) for k, v in values.items()}))
