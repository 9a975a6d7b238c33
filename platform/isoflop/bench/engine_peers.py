"""The peers of ``isoflop bench engine``, in their best configuration, and whether they are here."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isoflop.bench import parts
from isoflop.bench.engine_ours import SLOTS, Measurement

_NEEDED = {  # part of the bench -> modules of its peers, and what to install for them
    "noop": {"ray.tune": "ray[tune]", "optuna_integration": "isoflop[bench]"},
    "reload": {"ray.tune": "ray[tune]"},
    "features": {"ray.tune": "ray[tune]"},
}


def missing(chosen: tuple[str, ...]) -> dict[str, str]:
    """Peers of these parts that cannot be imported here: module -> what to install."""
    needed = {module: name for part in chosen for module, name in _NEEDED.get(part, {}).items()}
    return {module: name for module, name in needed.items() if not _importable(module)}


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


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
    algorithm = None if search == "grid" else ConcurrencyLimiter(OptunaSearch(sampler=sampler), SLOTS)
    with _ray():
        begin, cpu = time.monotonic(), time.process_time()
        found = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="error", mode="min", num_samples=samples, reuse_actors=reuse,
                search_alg=algorithm, max_concurrent_trials=None if algorithm else SLOTS,
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
    from optuna_integration import MLflowCallback

    uri = f"sqlite:///{folder / 'optuna.db'}"
    _make_database(uri)
    study = optuna.create_study(study_name="bench", sampler=optuna.samplers.TPESampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        return parts.noop_score(
            trial.suggest_float("x", 0, 1), trial.suggest_float("y", 1e-3, 1, log=True), trial.suggest_float("z", 0, 10)
        )

    begin, cpu = time.monotonic(), time.process_time()
    study.optimize(
        objective, n_trials=trials, n_jobs=SLOTS, callbacks=[MLflowCallback(tracking_uri=uri, metric_name="error")]
    )
    seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    return Measurement(
        "no-op + MLflow", "Optuna n_jobs=2 + MLflowCallback", trials, seconds, 1000 * cpu / trials, sampler="tpe"
    )


def trainables() -> tuple[type, type, type]:
    """What Ray Tune runs: nothing, a load with a forward, features that are computed anew."""
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
        num_cpus=SLOTS,
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
