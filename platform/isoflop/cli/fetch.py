"""``isoflop fetch``: public models and data into the cache, once."""

from __future__ import annotations

from typing import Any

import click

from isoflop.cli.common import console, emit, grid, json_option
from isoflop.core.errors import unknown
from isoflop.core.public import public_root


@click.command("fetch")
@click.argument("names", nargs=-1)
@click.option("--from", "origin", default="", metavar="ORIGIN", help="Where from; otherwise the first that is reached.")
@json_option
def fetch_command(names: tuple[str, ...], origin: str, as_json: bool) -> None:
    """Fetch public models and data into the cache, unless they are there; without NAMES, list what there is.

    A sweep names them as public:NAME. Their content is pinned and checked; nothing else of isoflop downloads them.
    """
    from isoflop.fetch.sources import SOURCES

    for name in names:
        if name not in SOURCES:
            raise unknown("public source", name, SOURCES)
    if not names:
        _list(SOURCES, as_json)
        return
    found = {name: SOURCES[name].fetch(origin, lambda line: click.echo(line, err=True)) for name in names}

    def human() -> None:
        for name, record in found.items():
            click.echo(f"public:{name} is in {SOURCES[name].folder}, from {record['from']}")
            if record.get("note"):
                click.echo(f"  {record['note']}")

    emit(found, as_json, human)


def _list(sources: dict[str, Any], as_json: bool) -> None:
    listed = [
        {"name": s.name, "what": s.what, "origins": list(s.origins), "fetched": s.record() is not None}
        for s in sources.values()
    ]

    def human() -> None:
        rows = [[f"public:{s['name']}", s["what"], ", ".join(s["origins"]), s["fetched"]] for s in listed]
        console().print(grid(["name", "what", "from", "fetched"], rows))
        click.echo(f"\nThey are kept in {public_root()}. Fetch: isoflop fetch NAME …")

    emit(listed, as_json, human)
