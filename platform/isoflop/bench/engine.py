"""``isoflop bench engine``: the engine against its peers, same objective, same number of slots, one run.

Peers are measured in their best configuration: Ray Tune with ``reuse_actors`` and in-memory results, Optuna in memory.
Whether they are here is asked before anything runs; what was measured is printed, whatever happens to the rest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import click

from isoflop.bench import parts
from isoflop.bench.engine_ours import Measurement, bench_growth, ours, spec_of
from isoflop.bench.engine_peers import missing, optuna_mlflow, ray_tune, trainables
from isoflop.bench.engine_writer import bench_writer
from isoflop.cli.common import console, emit, grid, json_option
from isoflop.core.errors import UserError

PARTS = ("noop", "reload", "features", "growth", "writer")


def bench_noop(folder: Path, trials: int, peer_trials: int) -> Iterator[Measurement]:
    """Jobs that do nothing, over three knobs: with TPE, and with random search, where the sampler costs next to nothing."""
    from ray import tune

    noop, _, _ = trainables()
    space = {"x": tune.uniform(0, 1), "y": tune.loguniform(1e-3, 1), "z": tune.uniform(0, 10)}
    for track, workload, callback in ((False, "no-op", ""), (True, "no-op + MLflow", " + MLflowLoggerCallback")):
        for sampler in ("tpe", "random"):
            name = f"noop-{sampler}-{track}"
            peer = f"Ray Tune + OptunaSearch{callback}, reuse_actors, {sampler}"
            yield ours(workload, f"isoflop, {sampler}", spec_of(name, trials, sampler), folder / name, track)
            yield ray_tune(workload, peer, peer_trials, noop, space, folder / f"tune-{name}", True, track, sampler)
    yield optuna_mlflow(peer_trials, folder)


def bench_reload(folder: Path, trials: int) -> Iterator[Measurement]:
    """Configurations over one model of 50 million parameters that lies on disk."""
    from ray import tune
    from safetensors.torch import save_file

    _, reload, _ = trainables()
    weights = folder / "model.safetensors"
    save_file(parts.big_network().state_dict(), weights)
    space = {"x": tune.grid_search([i / trials for i in range(trials)]), "path": str(weights)}
    knobs = {"x": [i / trials for i in range(trials)]}
    spec = spec_of("reload", trials, "grid", "bench/big", "bench-forward", knobs)
    first = {**spec, "name": "warm-up", "budget": {"trials": 1}}
    ours("reload", "warm-up of the stage", first, folder / "g", track=False)
    yield ours("reload-bound", "isoflop", spec, folder / "g", track=False)
    for label, reuse in (("Ray Tune, reuse_actors, a load per trial", True), ("Ray Tune, its default", False)):
        yield ray_tune(
            "reload-bound", label, 1, reload, space, folder / f"h-{reuse}", reuse, mlflow=False, search="grid"
        )


def bench_features(folder: Path) -> Iterator[Measurement]:
    """Eight ratios on the same features."""
    from ray import tune

    _, _, feature = trainables()
    counts = [1, 2, 4, 8, 16, 64, 144, 576]
    spec = spec_of("features", len(counts), "grid", "bench/noop", "bench-features", {"k": counts})
    yield ours("feature-bound", "isoflop", spec, folder / "j", track=False)
    space = {"k": tune.grid_search(counts)}
    yield ray_tune(
        "feature-bound", "Ray Tune, reuse_actors", 1, feature, space, folder / "k", True, mlflow=False, search="grid"
    )


@click.command("engine")
@click.option("--trials", default=1000, show_default=True, help="No-op jobs of ours.")
@click.option("--peer-trials", default=200, show_default=True, help="No-op trials of the peers, which are slower.")
@click.option("--growth", default=10_000, show_default=True, help="Jobs of the growth test; 0 leaves it out.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Only these parts.")
@json_option
def engine(trials: int, peer_trials: int, growth: int, only: tuple[str, ...], as_json: bool) -> int:
    """Throughput, reloads, shared features, growth and the MLflow writer, against peers, in one run.

    Exit code: 1 when a part could not be measured to its end, which is said; 130 when somebody stopped it.
    """
    chosen = only or PARTS
    if absent := missing(chosen):
        installs = " ".join(f"'{name}'" for name in dict.fromkeys(absent.values()))
        raise UserError(
            f"bench engine: {', '.join(absent)} cannot be imported; pip install {installs}, or choose parts without these "
            f"peers: {', '.join(f'--only {part}' for part in PARTS if not missing((part,)))}"
        )
    measured: list[Measurement] = []
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="isobench") as name:
        folder = Path(name)
        runs: dict[str, Callable[[], Iterator[Measurement]]] = {
            "noop": lambda: bench_noop(folder, trials, peer_trials),
            "reload": lambda: bench_reload(folder, 20),
            "features": lambda: bench_features(folder),
        }
        alone: dict[str, Callable[[], dict[str, float]]] = {"writer": lambda: bench_writer(folder, 1000)}
        if growth:
            alone["growth"] = lambda: bench_growth(folder, growth)
        code = _measure([part for part in PARTS if part in chosen], runs, alone, measured, figures)
    ratios = _ratios(measured)
    data = {"measurements": [asdict(m) | {"jobs_per_second": m.rate} for m in measured], "ratios": ratios, **figures}
    emit(data, as_json, lambda: _print(measured, ratios, figures))
    return code


def _measure(
    chosen: list[str],
    runs: dict[str, Callable[[], Iterator[Measurement]]],
    alone: dict[str, Callable[[], dict[str, float]]],
    measured: list[Measurement],
    figures: dict[str, dict[str, float]],
) -> int:
    """Measure part after part into ``measured`` and ``figures``; a part that fails costs what is left of it. The exit code."""
    code = 0
    for part in chosen:
        try:
            if part in runs:
                for found in runs[part]():
                    measured.append(found)
            elif part in alone:
                figures[part] = alone[part]()
        except KeyboardInterrupt:
            click.echo(f"stopped in {part}; what was measured before:", err=True)
            return 130
        except Exception as error:  # a peer's failure must not cost the minutes before it
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            click.echo(f"{part} was not measured to its end: {reason}", err=True)
            code = 1
    return code


def _ratios(measured: list[Measurement]) -> dict[str, float]:
    """Our rate over each peer's, on the same workload with the same sampler, where both were measured."""
    out = {}
    for peer in measured:
        same = [m for m in measured if (m.workload, m.sampler) == (peer.workload, peer.sampler)]
        mine = next((m for m in same if m.system.startswith("isoflop")), None)
        if mine is not None and peer is not mine:
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
