"""``isoflop fit``, ``compare`` and ``frontier``: laws on a sweep's results, or on any CSV or Parquet file."""

from __future__ import annotations

import json
import math
from typing import Any

import click
import pyarrow as pa
from click.core import ParameterSource

from isoflop.cli.common import clean
from isoflop.core.errors import UserError
from isoflop.laws.objective import OBJECTIVES
from isoflop.sweep.tables import open_source, read_source


def split_top(text: str, separator: str = ",") -> list[str]:
    """Split at separators that are outside parentheses."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == separator and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [p.strip() for p in [*parts, current] if p.strip()]


def parse_map(text: str | None, option: str = "--map") -> dict[str, str]:
    """``N=COL,V=COL`` as a dictionary; values may be expressions of columns."""
    pairs: dict[str, str] = {}
    for part in split_top(text or ""):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise UserError(f"{option}: {part!r}; allowed: NAME=COLUMN or NAME=EXPRESSION, separated by commas")
        if name.strip() in pairs:
            raise UserError(f"{option}: {name.strip()!r} is given twice")
        pairs[name.strip()] = value.strip()
    return pairs


def parse_numbers(text: str | None, option: str) -> list[float] | None:
    """A comma-separated list of numbers."""
    return None if text is None else [_number(part, option) for part in split_top(text)]


def parse_ranges(text: str | None, option: str) -> dict[str, tuple[float, float]] | None:
    """``alpha=0:1,E=0:`` as bounds; a missing end is open."""
    if text is None:
        return None
    ranges = {}
    for name, value in parse_map(text, option).items():
        low, colon, high = value.partition(":")
        if not colon:
            raise UserError(f"{option}: {name}={value!r}; allowed: {name}=LOW:HIGH")
        ranges[name] = (_number(low, option) if low else -math.inf, _number(high, option) if high else math.inf)
    return ranges


def _number(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a number") from None
    if math.isnan(value):
        raise UserError(f"{option}: {text!r} is not a number")
    return value


def _law_options(command: Any) -> Any:
    """Options that fit, compare and frontier share."""
    for decorate in reversed(
        (
            click.argument("source", metavar="FILE_OR_SWEEP"),
            click.option(
                "--y",
                default="error",
                show_default=True,
                metavar="COL",
                help="Target: a column or an expression, e.g. '1-score'.",
            ),
            click.option(
                "--map",
                "mapping",
                metavar="N=COL,V=COL",
                help="Variables: columns or expressions, e.g. 'N=params_b*1e9'.",
            ),
            click.option("--objective", type=click.Choice(OBJECTIVES), default="squared", show_default=True),
            click.option(
                "--delta", type=float, default=1e-3, show_default=True, help="Where Huber's terms turn linear."
            ),
            click.option("--weights", metavar="COL", help="Weights, e.g. '1/stderr**2'."),
            click.option("--where", metavar="SQL", help="Condition on the rows."),
            click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
            click.option("--separator", metavar="CHAR", help="Between the columns of a CSV file; default: a comma."),
            click.option("--store", metavar="URI", help="Store of the sweep, when SOURCE is a sweep's name."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        )
    ):
        command = decorate(command)
    return command


def _fit_options(command: Any) -> Any:
    """Options of fit that frontier takes too."""
    for decorate in reversed(
        (
            click.option(
                "--law",
                default="product",
                show_default=True,
                help="A law's name, or an expression in the variables of --map.",
            ),
            click.option("--by", metavar="COLS", help="Columns whose groups are fitted apart."),
            click.option("--cluster", metavar="COL", help="Runs or models: the bootstrap resamples them whole."),
            click.option(
                "--bootstrap", type=click.IntRange(0), default=400, show_default=True, help="Resamples; 0 for none."
            ),
            click.option(
                "--scheme", type=click.Choice(("cases", "cluster", "wild", "parametric")), help="Bootstrap scheme."
            ),
            click.option("--bounds", metavar="P=LOW:HIGH,…", help="Bounds of parameters."),
            click.option("--fix", metavar="P=VALUE,…", help="Parameters held at a value."),
            click.option(
                "--level",
                type=click.FloatRange(0, 1, min_open=True, max_open=True),
                default=0.95,
                show_default=True,
                help="Level of intervals.",
            ),
        )
    ):
        command = decorate(command)
    return command


def _common(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``isoflop.fit`` from the command line."""
    return {
        "law": options["law"],
        "y": options["y"],
        "map": parse_map(options["mapping"]),
        "by": tuple(split_top(options["by"] or "")),
        "objective": options["objective"],
        "delta": options["delta"],
        "weights": options["weights"],
        "where": options["where"],
        "cluster": options["cluster"],
        "bounds": parse_ranges(options["bounds"], "--bounds"),
        "fixed": {k: _number(v, "--fix") for k, v in parse_map(options["fix"], "--fix").items()},
        "bootstrap": options["bootstrap"],
        "scheme": options["scheme"],
        "level": options["level"],
        "seed": options["seed"],
    }


_OPTION_OF = {"map": "mapping", "fixed": "fix", "held": "hold"}  # where an argument's option has another name


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the user named: for a sweep, its own YAML says the rest."""
    source = click.get_current_context().get_parameter_source
    return {k: v for k, v in arguments.items() if source(_OPTION_OF.get(k, k)) == ParameterSource.COMMANDLINE}


def _print(result: Any, as_json: bool) -> None:
    click.echo(json.dumps(clean(result.to_dict()), indent=2, allow_nan=False) if as_json else str(result))


@click.command("fit")
@_law_options
@_fit_options
def fit_command(source: str, store: str | None, separator: str | None, as_json: bool, **options: Any) -> None:
    """Fit a scaling law to the rows of a sweep or a file."""
    from isoflop.laws import fit

    arguments = _common(options)
    opened = open_source(source, store, separator)
    if isinstance(opened, pa.Table):
        _print(fit(opened, **arguments), as_json)
    else:
        _print(opened.fit(**_given(arguments)), as_json)


@click.command("frontier")
@_law_options
@_fit_options
@click.option(
    "--cost",
    default="2*N*(Q+V)",
    show_default=True,
    help="Formula in the law's variables and Q; units as in --map. Of a sweep: as its YAML says, else all measured FLOPs.",
)
@click.option(
    "--q", type=click.FloatRange(0), help="Text tokens Q per answer; default: the mean of the rows' column Q."
)
@click.option(
    "--budget", metavar="NUMBERS", help="One or several, comma-separated; default: the range of the rows' costs."
)
@click.option("--sizes", metavar="NUMBERS", help="Menu of the first variable; default: its levels in the rows.")
@click.option("--tokens", metavar="NUMBERS", help="Menu of the second variable.")
@click.option("--limits", metavar="V=LOW:HIGH,…", help="Allowed ranges for the continuous optimum.")
@click.option("--hold", metavar="D=VALUE,…", help="Variables kept at a value.")
def frontier_command(source: str, store: str | None, separator: str | None, as_json: bool, **options: Any) -> None:
    """Find the best configuration under a budget, by a law fitted to the rows."""
    from isoflop.frontier import frontier

    arguments = {
        "cost": options["cost"],
        "q": options["q"],
        "budget": parse_numbers(options["budget"], "--budget"),
        "sizes": parse_numbers(options["sizes"], "--sizes"),
        "tokens": parse_numbers(options["tokens"], "--tokens"),
        "limits": parse_ranges(options["limits"], "--limits"),
        "held": {k: _number(v, "--hold") for k, v in parse_map(options["hold"], "--hold").items()},
        **_common(options),
    }
    opened = open_source(source, store, separator)
    if isinstance(opened, pa.Table):
        _print(frontier(opened, **arguments), as_json)
    else:
        _print(opened.frontier(**_given(arguments)), as_json)


@click.command("compare")
@_law_options
@click.option(
    "--forms", default="product,semilog", show_default=True, help="Laws by name or expression, separated by commas."
)
@click.option("--by", metavar="COLS", help="Columns whose groups are compared apart.")
@click.option(
    "--along", metavar="VARIABLE", help="The size whose largest values are held out; default: the first variable."
)
@click.option(
    "--bootstrap",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Resamples for the coverage of held-out rows.",
)
def compare_command(source: str, store: str | None, separator: str | None, as_json: bool, **options: Any) -> None:
    """Compare forms on the same rows: AICc, extrapolation to the largest size, baselines."""
    from isoflop.laws import compare

    result = compare(
        read_source(source, store, options["where"], separator),
        split_top(options["forms"]),
        y=options["y"],
        map=parse_map(options["mapping"]),
        by=tuple(split_top(options["by"] or "")),
        objective=options["objective"],
        delta=options["delta"],
        weights=options["weights"],
        where=options["where"],
        along=options["along"],
        bootstrap=options["bootstrap"],
        seed=options["seed"],
    )
    _print(result, as_json)
