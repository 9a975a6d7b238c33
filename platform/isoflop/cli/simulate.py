"""``isoflop simulate``."""

from __future__ import annotations

from pathlib import Path

import click

from isoflop.cli.common import console, duration, emit, grid, json_option
from isoflop.cli.run import find_spec
from isoflop.execute.simulated import Rates
from isoflop.sweep.resolve import resolve
from isoflop.sweep.simulate import Simulation, simulate


@click.command("simulate")
@click.argument("spec", type=click.Path(path_type=Path), metavar="SWEEP.yaml")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True, help="Slots per node.")
@click.option(
    "--job-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Median of a job with its model warm.",
)
@click.option(
    "--load-seconds", type=click.FloatRange(min=0), default=20.0, show_default=True, help="Median of loading a model."
)
@click.option(
    "--stage-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Median of a stage.",
)
@click.option(
    "--spread",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Spread of times: sigma of the logarithm.",
)
@click.option(
    "--failure-rate", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share of jobs that fail."
)
@click.option(
    "--node-hours",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Mean hours between losses of a node; 0: none.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@json_option
def simulate_command(
    spec: Path, nodes: int, gpus: int, job_seconds: float, load_seconds: float, stage_seconds: float, spread: float,
    failure_rate: float, node_hours: float, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Run a sweep's scheduling on a cluster that does not exist: how long, how busy, how often a model is loaded."""
    rates = Rates(job_seconds, load_seconds, stage_seconds, spread, failure_rate, node_hours)
    result = simulate(resolve(find_spec(spec)), nodes, gpus, rates, seed)
    emit(result.to_dict(), as_json, lambda: _print(result))


def _print(r: Simulation) -> None:
    rows = [
        ("jobs", f"{r.jobs:,}" + (f" ({r.failed:,} failed)" if r.failed else "")),
        ("stages", f"{r.stages:,}"),
        ("slots", f"{r.slots:,}"),
        ("makespan", duration(r.makespan)),
        ("utilisation", f"{r.utilisation:.1%}"),
        ("warm model", f"{r.affinity:.1%} of jobs; {r.loads:,} loads"),
        ("nodes lost", f"{r.lost_nodes:,}"),
        ("driver", f"{r.driver_ms:.2f} ms of CPU per job; simulated in {r.real_seconds:.1f} s"),
    ]
    console().print(grid(("", ""), rows))
