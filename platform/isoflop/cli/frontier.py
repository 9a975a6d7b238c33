"""``isoflop frontier``: the best configuration under a budget by a law, or what the rows themselves answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pyarrow as pa

from isoflop.cli.laws import (
    common,
    fit_options,
    given,
    law_options,
    number_of,
    option_name,
    parse_map,
    parse_numbers,
    parse_ranges,
    print_result,
    save_option,
)  # fmt: skip
from isoflop.core.errors import UserError
from isoflop.sweep.asking import QUESTIONS
from isoflop.sweep.tables import open_source

if TYPE_CHECKING:
    from isoflop.sweep.api import SweepResults

_OF_ROWS = ("budget", "cost", "y", "mapping", "where", "seed", "level", "baseline")
_OF_LAWS = {
    "law", "by", "cluster", "bootstrap", "scheme", "bounds", "fix", "objective", "delta", "weights", "q", "sizes", "tokens", "limits",
    "hold",
}  # fmt: skip


@click.command("frontier")
@law_options
@fit_options
@click.option(
    "--cost",
    default="2*N*(Q+V)",
    show_default=True,
    help="Formula in the law's variables and Q; units as in --map. Of a sweep: as its YAML says, else all measured FLOPs. "
    "Of rows: bytes, kv_bytes, weight_bytes, flops, seconds or a formula of columns; default: what the methods compress.",
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
@click.option("--measured", is_flag=True, help="Answer from the rows, without a law; alone: all three questions below.")
@click.option("--share", metavar="NUMBERS", help="From the rows: what is best at this share of the uncompressed cost?")
@click.option(
    "--within", type=float, metavar="DELTA", help="From the rows: how far may one compress at DELTA more error?"
)
@click.option("--speed-up", is_flag=True, help="From the rows: how much cheaper at equal error (plus --within)?")
@click.option("--versus", metavar="METHOD", help="Speed-up over this method instead of uncompressed.")
@click.option("--baseline", metavar="METHOD", help="The method of a file that compresses nothing; default: none.")
@save_option
def frontier_command(
    source: str, store: str | None, separator: str | None, as_json: bool, save: Path | None, **options: Any
) -> None:
    """Find the best configuration under a budget, by a law fitted to the rows.

    With --share, --within, --speed-up or --measured the rows answer themselves, in a sentence per task and model:

    \b
      isoflop frontier SWEEP --share 0.5               what is best at half the cost?
      isoflop frontier SWEEP --within 0.01             how far may one compress?
      isoflop frontier SWEEP --speed-up --within 0.01  what does that save?
      isoflop frontier SWEEP --measured --budget 2e9 --cost flops
    """
    opened = open_source(source, store, separator)
    asked = {name: options.pop(name) for name in (*QUESTIONS, "baseline")}
    if any(asked[name] not in (None, False) for name in QUESTIONS):
        print_result(_answers(opened, {**asked, **options}), as_json, save)
        return
    if asked["baseline"] is not None:
        raise UserError("--baseline is for questions to the rows: --share, --within, --speed-up or --measured")
    print_result(_by_law(opened, options), as_json, save)


def _by_law(opened: pa.Table | SweepResults, options: dict[str, Any]) -> Any:
    from isoflop.frontier import frontier

    arguments = {
        "cost": options["cost"],
        "q": options["q"],
        "budget": parse_numbers(options["budget"], "--budget"),
        "sizes": parse_numbers(options["sizes"], "--sizes"),
        "tokens": parse_numbers(options["tokens"], "--tokens"),
        "limits": parse_ranges(options["limits"], "--limits"),
        "held": {k: number_of(v, "--hold") for k, v in parse_map(options["hold"], "--hold").items()},
        **common(options),
    }
    return frontier(opened, **arguments) if isinstance(opened, pa.Table) else opened.frontier(**given(arguments))


def _answers(opened: pa.Table | SweepResults, options: dict[str, Any]) -> Any:
    from isoflop.sweep.asking import answers

    named = set(given(options, rename=False))
    if strange := sorted(named & _OF_LAWS):
        raise UserError(
            f"{option_name(strange[0])} is of laws: it says nothing where the rows answer themselves; "
            f"allowed beside --share, --within, --speed-up and --measured: {', '.join(map(option_name, _OF_ROWS))}"
        )
    table = opened if isinstance(opened, pa.Table) else opened.results()
    return answers(
        table,
        share=parse_numbers(options["share"], "--share"),
        budget=parse_numbers(options["budget"], "--budget"),
        within=options["within"],
        speed_up=options["speed_up"],
        versus=options["versus"],
        cost=options["cost"] if "cost" in named else None,
        y=options["y"],
        map=parse_map(options["mapping"]),
        where=options["where"],
        baseline=options["baseline"],
        level=options["level"],
        seed=options["seed"],
    )
