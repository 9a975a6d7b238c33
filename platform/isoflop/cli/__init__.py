"""The ``isoflop`` command. Each command takes ``--json``; bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from isoflop.cli.failures import Shown, end_with, traceback_option
from isoflop.core.errors import UserError, nearest
from isoflop.core.version import __version__

# Modules are imported when their command is used: `isoflop --help` must not wait for torch.
_COMMANDS = {
    "run": ("isoflop.cli.run", "run_command"),
    "plan": ("isoflop.cli.run", "plan_command"),
    "resume": ("isoflop.cli.run", "resume_command"),
    "submit": ("isoflop.cli.submit", "submit_command"),
    "simulate": ("isoflop.cli.simulate", "simulate_command"),
    "ls": ("isoflop.cli.show", "ls_command"),
    "show": ("isoflop.cli.show", "show_command"),
    "watch": ("isoflop.cli.watch", "watch_command"),
    "report": ("isoflop.cli.html_report", "report_command"),
    "export": ("isoflop.cli.export", "export_command"),
    "ui": ("isoflop.cli.ui", "ui_command"),
    "fit": ("isoflop.cli.laws", "fit_command"),
    "compare": ("isoflop.cli.laws", "compare_command"),
    "frontier": ("isoflop.cli.frontier", "frontier_command"),
    "methods": ("isoflop.cli.catalog", "methods_command"),
    "models": ("isoflop.cli.catalog", "models_command"),
    "tasks": ("isoflop.cli.catalog", "tasks_command"),
    "samplers": ("isoflop.cli.catalog", "samplers_command"),
    "fetch": ("isoflop.cli.fetch", "fetch_command"),
    "bench": ("isoflop.cli.bench", "bench_group"),
}
_HELP = {
    "run": "Run a sweep, or what is missing of it.",
    "plan": "Say what a sweep would run, share and cost, without running it.",
    "submit": "Run a sweep on a cluster, through its head node.",
    "simulate": "Run a sweep's scheduling on a cluster in simulated time.",
    "resume": "Go on with a sweep of the store by name.",
    "ls": "List the sweeps of a store.",
    "show": "Show a sweep: counts, results, failures, laws.",
    "watch": "Watch a sweep that runs somewhere else.",
    "report": "Write the report of a sweep or a file of results: one HTML file.",
    "export": "Write the compressed model of a job as a checkpoint.",
    "ui": "Start MLflow over a store, on 127.0.0.1.",
    "fit": "Fit a scaling law to a sweep or to any CSV or Parquet file.",
    "compare": "Compare laws on the same rows.",
    "frontier": "The best configuration under a budget, and what compressing saves.",
    "methods": "List compression methods, or document one.",
    "models": "List models.",
    "tasks": "List tasks, or document one.",
    "samplers": "List ways to propose trials, or document one.",
    "fetch": "Fetch public models and data into the cache.",
    "bench": "Measure against peers.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _HELP[name]) for name in _COMMANDS])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            hint = nearest(args[0], _COMMANDS)
            guess = f" (did you mean {hint!r}?)" if hint else ""
            raise UserError(f"unknown command {args[0]!r}{guess}; allowed: {', '.join(_COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="isoflop")
@traceback_option
def cli() -> None:
    """Sweeps for compression research: which compression, at which ratio, on which model size, gives the least error at a
    fixed inference budget?"""


def main() -> None:
    """Entry point of the ``isoflop`` command."""
    shown = Shown()
    try:
        code = cli.main(standalone_mode=False, obj=shown)
    except (Exception, KeyboardInterrupt) as error:
        code = end_with(error, shown)
    sys.exit(code if isinstance(code, int) else 0)
