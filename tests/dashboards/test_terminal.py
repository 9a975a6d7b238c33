"""What the terminal shows: fits into 80 columns without breaking words, uses 200, and is plain text in a pipe."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from isoflop.cli import cli
from isoflop.cli.catalog import _flowing
from isoflop.cli.error_table import print_errors
from isoflop.cli.report import print_report
from isoflop.methods.base import METHODS
from isoflop.sweep.results import usable

if TYPE_CHECKING:
    from conftest import Reported


def printed(reported: Reported, width: int, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, highlight=False)
    print_report(console, reported.sweep, reported.sweep.findings())
    return out.getvalue()


@pytest.mark.parametrize("name", ["lawful", "compared", "searched"])
@pytest.mark.parametrize("width", [80, 200])
def test_nothing_is_wider_than_the_terminal_or_broken_over_lines(
    name: str, width: int, request: pytest.FixtureRequest
) -> None:
    text = printed(request.getfixturevalue(name), width)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    assert "\x1b" not in text
    tables = [line for line in lines if re.search(r"\d\.\d{3}( |$)", line) or "N=" in line]
    assert tables
    for line in tables:  # a cell that is folded leaves a line that begins with blanks
        assert re.match(r"(\S| *[\d.]+e[+-]?\d+ ?°? )", line), line


def test_frontier_has_a_line_per_budget(lawful: Reported) -> None:
    points = lawful.sweep.findings().frontiers[0].frontiers[0].points
    lines = [
        line
        for line in printed(lawful, 80).splitlines()
        if re.match(r" *[\d.]+(e-?\d+)?( °)?  ", line) and "N=" in line
    ]
    assert len(lines) == len(points)


def test_settings_that_do_not_fit_beside_each_other_stand_below_each_other(compared: Reported) -> None:
    table = usable(compared.sweep.results())
    out = io.StringIO()
    print_errors(Console(file=out, width=80), table, "reading")
    rows = [re.split(r" {2,}", line.strip()) for line in out.getvalue().splitlines()[2:] if line.strip()]
    found = {(method, at): value for method, at, value in rows}
    assert len(found) == 10
    for (method, at), value in found.items():
        tokens = float(at.removeprefix("V="))
        own = [r["error"] for r in table.to_pylist() if (r["method"], r["V"]) == (method, tokens)]
        assert float(value) == pytest.approx(np.mean(own), abs=5e-4)


@pytest.mark.parametrize("tokens", [None, 0.0])
def test_ratios_tell_settings_apart_where_there_are_no_visual_tokens(compared: Reported, tokens: float | None) -> None:
    """A model that sees no images has no V, or V = 0."""
    table = usable(compared.sweep.results())
    without = table.set_column(table.schema.get_field_index("V"), "V", [[tokens] * table.num_rows]).cast(table.schema)
    out = io.StringIO()
    print_errors(Console(file=out, width=80), without, "reading")
    *lines, note = [line for line in out.getvalue().splitlines()[2:] if line.strip()]
    assert {line.split()[1] for line in lines} == {"1", "4", "9", "36"}
    assert "36 ×" in out.getvalue()
    assert note == "×: uncompressed over compressed, visual tokens"


def test_methods_are_listed_on_a_line_each_and_families_with_knobs() -> None:
    brief = CliRunner().invoke(cli, ["methods"]).output
    for name in METHODS:
        cls = METHODS.get(name)
        assert re.search(rf"^{cls.family} +{name} ", brief, re.MULTILINE), name  # whole lines, for grep
    assert "[" not in brief
    family = CliRunner().invoke(cli, ["methods", "--family", "visual-tokens"]).output
    assert "tokens* = " in family
    assert "kv-cache" not in family
    assert "tokens* = " not in CliRunner().invoke(cli, ["methods", "--family", "visual-tokens", "--brief"]).output


def test_paragraphs_of_documentation_flow_and_lists_keep_their_lines() -> None:
    doc = "What it is\nin short.\n\n1. One.\n2. Two,\nand more.\n\nAs code::\n\n    a\n    b\nEnd."
    assert _flowing(doc) == "What it is in short.\n\n1. One.\n2. Two, and more.\n\nAs code::\n\n    a\n    b\nEnd."
