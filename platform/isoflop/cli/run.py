"""``isoflop run``, ``resume`` and ``plan``."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from isoflop.cli.common import console, duration, emit, grid, json_option, store_option
from isoflop.cli.live import LiveProgress, PlainProgress
from isoflop.cli.report import measured_frontier, print_measured, print_report, to_ask
from isoflop.dashboards.session import conclude, draw
from isoflop.frontier.answers import Answers
from isoflop.ledger import Store
from isoflop.sweep.api import EXECUTORS, RunOptions, SweepResults, run_resolved
from isoflop.sweep.plan import Plan, make_plan
from isoflop.sweep.progress import Progress
from isoflop.sweep.resolve import resolve
from isoflop.sweep.resolved import Sweep


def _run_options(command: Any) -> Any:
    for decorate in reversed(
        [
            store_option,
            click.option(
                "--executor",
                type=click.Choice(EXECUTORS),
                default="ray",
                show_default=True,
                help="local runs jobs in this process.",
            ),
            click.option(
                "--ray-address",
                metavar="ADDRESS",
                help="Use a running Ray cluster (auto, HOST:PORT); default: a private one.",
            ),
            click.option(
                "--ray-start-timeout",
                type=click.FloatRange(min=1),
                default=300.0,
                show_default=True,
                metavar="SECONDS",
                help="How long a private Ray may take to come up.",
            ),
            click.option("--node-ip", metavar="IP", help="This host's address in the cluster, if it has several."),
            click.option(
                "--tracking-uri", metavar="URI", help="MLflow; default: the store's own database; none for no tracking."
            ),
            click.option("--workers", type=click.IntRange(min=1), help="At most so many jobs at once."),
            click.option(
                "--cache-dir",
                type=click.Path(file_okay=False, path_type=Path),
                help="Stage cache (default: $ISOFLOP_CACHE or ~/.cache/isoflop).",
            ),
            click.option("--retry-failed", is_flag=True, help="Run the failed jobs again, and only what is missing."),
            click.option(
                "--report/--no-report", default=True, show_default=True, help="Write the report at the end (HTML)."
            ),
            json_option,
        ]
    ):
        command = decorate(command)
    return command


def find_spec(given: Path) -> Path:
    """The file as named, or else the sweep of that name that ships with isoflop."""
    if given.exists() or given.parent != Path("."):
        return given
    packaged = Path(str(files("isoflop.sweeps"))) / given.with_suffix(".yaml").name
    return packaged if packaged.is_file() else given


@click.command("run")
@click.argument("spec", type=click.Path(path_type=Path), metavar="SWEEP.yaml")
@_run_options
def run_command(spec: Path, as_json: bool, report: bool, **options: Any) -> int:
    """Run a sweep, or what is missing of it. The name of a sweep that ships with isoflop will do: quickstart.

    Exit code: 0 when every job has a result, 1 when some failed or MLflow lacks some, 3 when Ray did not come up or died
    for good (finished jobs are kept), 130 when it was interrupted.
    """
    return _run(resolve(find_spec(spec)), as_json, report, RunOptions(**options))


@click.command("resume")
@click.argument("name")
@_run_options
def resume_command(name: str, as_json: bool, report: bool, store: str | None, **options: Any) -> int:
    """Go on with a sweep of the store by its name: runs what is missing, brings MLflow up to date."""
    opened = Store.open(store)
    if name not in opened.sweeps():
        from isoflop.core.errors import unknown

        raise unknown("sweep", name, opened.sweeps(), within=f" in store {opened.shown}")
    from isoflop.sweep.stored import resolve_stored

    return _run(resolve_stored(opened, name), as_json, report, RunOptions(store=opened.uri, **options))


def _run(sweep: Sweep, as_json: bool, report: bool, options: RunOptions) -> int:
    err = console(stderr=True)
    live = err.is_terminal and not as_json
    with LiveProgress(err, sweep.spec.name) if live else PlainProgress() as progress:
        shown: Progress = progress
        opened = run_resolved(sweep, options, shown, conclude if report else None, draw)
    summary = opened.summary
    assert summary is not None
    findings = opened.findings_of_run
    measured = measured_frontier(opened)
    data = {
        "name": opened.name,
        "store": opened.store.shown,
        "summary": vars(summary) | {"ran": summary.ran},
        "report": opened.conclusion.path or None,
        **findings.to_dict(),
        **({"answers": measured.to_dict()["answers"]} if measured is not None else {}),
    }
    emit(data, as_json, lambda: _print_end(opened, options, measured))
    if summary.interrupted:
        return 130
    return 1 if summary.failed or summary.untracked else 0


def _print_end(opened: SweepResults, options: RunOptions, measured: Answers | None) -> None:
    out = console()
    summary = opened.summary
    assert summary is not None
    print_report(out, opened, opened.findings_of_run)
    if measured is not None:
        print_measured(out, opened, measured)
    for line in opened.search_lines():
        out.print(Text(line))
    parts = [
        f"{n} {word}"
        for n, word in (
            (summary.ok, "ok"),
            (summary.failed, "failed"),
            (summary.infeasible, "infeasible"),
            (summary.pruned, "pruned"),
        )
        if n
    ]
    told = ", ".join(parts) or ("none finished" if summary.left else "nothing was missing")
    out.print(
        f"[bold]{opened.name}[/bold]: {summary.ran} jobs in {duration(summary.seconds)} ({told}), {summary.cached} from before"
        + (f", {summary.left} left" if summary.left else "")
    )
    if summary.untracked:
        out.print(Text(summary.untracked, style="yellow"))
    if summary.stage_seconds:
        busy = f"{duration(summary.stage_seconds)} in {summary.stages} shared stages, {duration(summary.job_seconds)} in jobs"
        out.print(f"workers were busy for {busy}")
    program, python = _programs()
    where = (
        ""
        if options.store is None and "ISOFLOP_STORE" not in os.environ and opened.spec.store is None
        else f" --store {opened.store.shown}"
    )
    resume, before = f"{program} resume {opened.name}", f"{where}{_as_before(options)}"
    hints = [("go on", f"{resume}{before}")] if summary.interrupted or summary.left else []
    if summary.failed:
        hints.append(("try again", f"{resume} --retry-failed{before}"))
    hints.append(("look", f"{program} show {opened.name}{where}"))
    hints.append(("report", opened.conclusion.path or f"{program} report {opened.name}{where}"))
    if options.tracking_uri != "none":
        hints.append(("browse", f"{program} ui{where}"))
    if measured is not None:
        asked = f"{program} {to_ask(opened.name, measured)}{where}"
        hints += [
            ("ask", asked),
            ("save", f"{asked} --save {opened.name}.png"),
            ("", f"{asked} --save {opened.name}.csv"),
        ]
    if opened.spec.frontiers:
        argument = f", store={opened.store.shown!r}" if where else ""
        asked = f"import isoflop; print(isoflop.open('{opened.name}'{argument}).frontier())"
        hints.append(("ask", f'{python} -c "{asked}"'))
    for what, how in hints:
        click.echo(f"{what + ':' if what else '':11} {how}")  # never broken over lines: these are to be copied


def _as_before(options: RunOptions) -> str:
    """Where jobs run and are tracked, if not as usual; an address with a user's name in it may hold a password, and is not told."""
    usual = RunOptions()
    named = {"--executor": "executor", "--tracking-uri": "tracking_uri", "--ray-address": "ray_address"}
    given = {
        flag: getattr(options, name) for flag, name in named.items() if getattr(options, name) != getattr(usual, name)
    }
    return "".join(f" {flag} {shlex.quote(str(value))}" for flag, value in given.items() if "@" not in str(value))


def _programs() -> tuple[str, str]:
    """How to call isoflop and its Python from here: by name when the shell would find this very program, else by path."""
    called = Path(sys.argv[0])
    found = shutil.which("isoflop")
    if called.name != "isoflop" or (found is not None and Path(found).resolve() == called.resolve()):
        return "isoflop", "python"
    folder = Path(os.path.relpath(called.parent))
    return str(folder / "isoflop"), str(folder / "python")


@click.command("plan")
@click.argument("spec", type=click.Path(path_type=Path), metavar="SWEEP.yaml")
@store_option
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), help="Stage cache.")
@json_option
def plan_command(spec: Path, store: str | None, cache_dir: Path | None, as_json: bool) -> None:
    """Say what a sweep would run, share and cost, without running it."""
    plan = make_plan(resolve(find_spec(spec)), store, cache_dir)
    emit(plan.to_dict(), as_json, lambda: _print_plan(plan))


def _print_plan(plan: Plan) -> None:
    out = console()
    trials = plan.trials if plan.trials is not None else "as many as the budget allows"
    out.print(f"[bold]{plan.name}[/bold]  {plan.sampler} search, store {plan.store}")
    if plan.budget:
        out.print("budget: " + ", ".join(f"{v:g} {k}" for k, v in plan.budget.items()))
    out.print(
        f"trials: {trials}; jobs: {plan.jobs if plan.jobs is not None else '?'}, of which {plan.done} have results"
    )
    for method, axes in plan.axes.items():
        ends = (f"{axis} {low:.4g}" + (f" … {high:.4g}" if high > low else "") for axis, (low, high) in axes.items())
        out.print(f"{method} plans {', '.join(ends)}")
    if meaning := _meaning(plan):
        out.print(Text(f"ratio: uncompressed over compressed, {meaning}"))
        out.print("as knobs say; grids, indices and tokens behind a prompt come on top, and are measured when it runs")
    for found in plan.calibration:
        name = Path(found["data"]).name
        out.print(Text(f"calibration on {name}: {found['documents']} documents, {found['bytes']} bytes"))
    if any({"ratio", "bits"} <= set(axes) for axes in plan.axes.values()):
        for line in _dense_bits(plan):
            out.print(Text(line))
    if plan.stages:
        rows = []
        for stage in plan.stages:
            known = sum(stage.seconds) / len(stage.seconds) if stage.seconds else None
            todo = stage.count - stage.cached
            rows.append(
                (
                    stage.kind,
                    stage.count,
                    stage.cached,
                    todo,
                    f"{stage.uses / stage.count:.1f}",
                    f"{known:.1f} s" if known is not None else "not measured yet",
                )
            )
        out.print(
            grid(
                ("shared stage", "count", "on disk", "to compute", "jobs each", "mean time"),
                rows,
                right=("count", "on disk", "to compute", "jobs each"),
            )
        )
        if plan.sampled:
            out.print("(stages of the first trials that the search would propose)")
    if plan.job_seconds is not None and plan.left:
        out.print(
            f"a job took {plan.job_seconds:.1f} s (median); {plan.left} to go: about {duration(plan.job_seconds * plan.left)} of one worker, without stages"
        )
    if plan.flops is not None:
        out.print(f"answers so far took {plan.flops:.3g} FLOPs (measured)")
    if plan.forecast is not None:
        for line in plan.forecast.lines():
            out.print(line)
    for line in plan.infeasible[:10]:
        out.print(Text(f"infeasible: {line}", style="yellow"))
    if len(plan.infeasible) > 10:
        out.print(f"… and {len(plan.infeasible) - 10} more infeasible points")


def _meaning(plan: Plan) -> str:
    """What planned ratios compare, of the methods that stand alone."""
    from isoflop.methods.base import METHODS
    from isoflop.sweep.compression import Compression, definitions

    planned = [name for name, axes in plan.axes.items() if "ratio" in axes and name in METHODS]
    found = [(name, Compression(of, 1.0)) for name in planned if (of := METHODS.get(name).ratio_of)]
    return definitions(found) if any(name != "none" for name, _ in found) else ""


def _dense_bits(plan: Plan) -> list[str]:
    """What ratios of bits are against."""
    lines = []
    for bits in sorted(set(plan.dense_bits.values())):
        models = [model for model, own in plan.dense_bits.items() if own == bits]
        whose = "" if len(models) == len(plan.dense_bits) else f" of {', '.join(models)}"
        hint = "; {served: bfloat16} beside the model counts 16" if bits == 32 else ""
        lines.append(f"these ratios are against {bits} bits per element{whose}{hint}")
    return lines
