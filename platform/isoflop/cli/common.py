"""What the commands share: options, tables, numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isoflop.core.text import safe_text

store_option = click.option(
    "--store", metavar="PATH|URI", help="Where sweeps are kept (default: $ISOFLOP_STORE or ~/.local/share/isoflop)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


def console(stderr: bool = False) -> Console:
    """A console that is plain text without a terminal."""
    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def emit(data: Any, as_json: bool, human: Callable[[], None]) -> None:
    """JSON for programs, or the human form."""
    if as_json:
        click.echo(json.dumps(clean(data), indent=1))
    else:
        human()


def clean(value: Any) -> Any:
    """``value`` as JSON types; what JSON cannot say (NaN, infinities) becomes null, times become ISO strings."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)


def grid(headers: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = (), title: str = "") -> Table:
    """A plain table; columns named in ``right`` are numbers."""
    table = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold"
    )
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*[escape(show(v)) for v in row])
    return table


def show(value: Any) -> str:
    """A value for people: numbers to four digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        if value == int(value) and abs(value) < 1e6:
            return f"{int(value):,}"
        return f"{value:.4g}"
    return safe_text(value)


def duration(seconds: float | None) -> str:
    """``75`` as ``1:15``."""
    if seconds is None:
        return "?"
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
