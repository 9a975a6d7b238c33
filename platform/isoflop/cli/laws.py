"""``isoflop fit`` and ``compare``: laws on a sweep's results, or on any CSV or Parquet file; and what ``frontier`` shares with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
from click.core import ParameterSource

from isoflop.cli.common import clean
from isoflop.core.errors import UserError
from isoflop.dashboards.files import ending
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
    return None if text is None else [number_of(part, option) for part in split_top(text)]


def parse_ranges(text: str | None, option: str) -> dict[str, tuple[float, float]] | None:
    """``alpha=0:1,E=0:`` as bounds; a missing end is open."""
    if text is None:
        return None
    ranges = {}
    for name, value in parse_map(text, option).items():
        low, colon, high = value.partition(":")
        if not colon:
            raise UserError(f"{option}: {name}={value!r}; allowed: {name}=LOW:HIGH")
        ranges[name] = (number_of(low, option) if low else -math.inf, number_of(high, option) if high else math.inf)
    return ranges


def number_of(text: str, option: str) -> float:
    """A number. Raises UserError for anything else."""
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a number") from None
    if math.isnan(value):
        raise UserError(f"{option}: {text!r} is not a number")
    return value


def law_options(command: Any) -> Any:
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


def fit_options(command: Any) -> Any:
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


def common(options: dict[str, Any]) -> dict[str, Any]:
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
        "fixed": {k: number_of(v, "--fix") for k, v in parse_map(options["fix"], "--fix").items()},
        "bootstrap": options["bootstrap"],
        "scheme": options["scheme"],
        "level": options["level"],
        "seed": options["seed"],
    }


_OPTION_OF = {"map": "mapping", "fixed": "fix", "held": "hold"}  # where an argument's option has another name


def given(arguments: dict[str, Any], rename: bool = True) -> dict[str, Any]:
    """The arguments that the user named: for a sweep, its own YAML says the rest.

    Args:
        rename: they are called as ``isoflop.fit`` calls them, else as the options are.
    """
    source = click.get_current_context().get_parameter_source
    names = _OPTION_OF if rename else {}
    return {k: v for k, v in arguments.items() if source(names.get(k, k)) == ParameterSource.COMMANDLINE}


def option_name(parameter: str) -> str:
    """``speed_up`` as ``--speed-up``."""
    return "--map" if parameter == "mapping" else f"--{parameter.replace('_', '-')}"


def _known_ending(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:  # before anything is computed
        ending(path)
    return path


save_option = click.option(
    "--save", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", callback=_known_ending,
    help="Keep it, too, as the ending says: a figure (.png, .pdf, .svg, .html) or a table (.csv, .tex, .parquet, .json).",
)  # fmt: skip


def print_result(result: Any, as_json: bool, save: Path | None = None) -> None:
    """The result for people or as JSON; and as a file."""
    if save is not None:
        from isoflop.dashboards.files import save_result

        save_result(result, save)
    click.echo(json.dumps(clean(result.to_dict()), indent=2, allow_nan=False) if as_json else str(result))
    if save is not None and not as_json:
        click.echo(f"wrote {save}")


@click.command("fit")
@law_options
@fit_options
@save_option
def fit_command(
    source: str, store: str | None, separator: str | None, as_json: bool, save: Path | None, **options: Any
) -> None:
    """Fit a scaling law to the rows of a sweep or a file."""
    from isoflop.laws import fit

    arguments = common(options)
    opened = open_source(source, store, separator)
    if isinstance(opened, pa.Table):
        print_result(fit(opened, **arguments), as_json, save)
    else:
        print_result(opened.fit(**given(arguments)), as_json, save)


@click.command("compare")
@law_options
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
@save_option
def compare_command(
    source: str, store: str | None, separator: str | None, as_json: bool, save: Path | None, **options: Any
) -> None:
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
    print_result(result, as_json, save)
