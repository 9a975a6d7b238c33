"""``isoflop bench``: ratios against named peers, each measured in one run."""

from __future__ import annotations

import importlib

import click

_BENCHES = {
    "laws": ("isoflop.bench.laws", "laws"),
    "engine": ("isoflop.bench.engine", "engine"),
    "kernels": ("isoflop.bench.kernels", "kernels"),
    "memory": ("isoflop.bench.memory", "memory"),
    "prefill": ("isoflop.bench.prefill", "prefill"),
    "search": ("isoflop.bench.search", "search"),
    "weights": ("isoflop.bench.weights", "weights"),
}


class _BenchGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_BENCHES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _BENCHES:
            return None
        module, attribute = _BENCHES[name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group("bench", cls=_BenchGroup)
def bench_group() -> None:
    """Measure against peers; prints ratios from one run."""
