"""What the terminal shows: fits into 80 columns without breaking words, uses 200, and is plain text in a pipe."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from isoflop.cli import cli
from isoflop.cli.catalog import _flowing
from isoflop.cli.error_table import print_errors
from isoflop.cli.report import measured_frontier, print_measured, print_report, to_ask
from isoflop.ledger.schema import to_table
from isoflop.methods.base import METHODS
from isoflop.sweep.asking import answers, best_at_shares
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


def test_where_no_law_is_asked_for_the_rows_answer_and_say_why(compared: Reported, lawful: Reported) -> None:
    """A sentence per task and share, in the terminal and for programs; sweeps with laws have their own end."""
    found = measured_frontier(compared.sweep)
    assert found is not None
    out = io.StringIO()
    print_measured(Console(file=out, width=80), compared.sweep, found)
    lines = out.getvalue().splitlines()
    why = (
        r"(one model size: no law can be fitted|the YAML asks for no law)\. Measured, at shares of what is compressed:$"
    )
    assert re.match(why, lines[0])
    assert max(map(len, lines)) <= 120  # as wide as every answer
    tasks = set(usable(compared.sweep.results())["task"].to_pylist())
    for task in tasks:
        assert any(line.startswith(f"{task} on ") and "at half" in line for line in lines)
    shown = CliRunner().invoke(cli, ["show", compared.sweep.name, "--store", compared.sweep.store.uri, "--json"])
    assert [a["sentence"] for a in json.loads(shown.output)["answers"]] == [a.sentence for a in found]
    assert measured_frontier(lawful.sweep) is None


def test_a_sweep_that_compresses_several_things_is_answered_for_each_and_its_hint_works(tmp_path: Path) -> None:
    rows = [
        {"job_id": method, "model": "m", "task": "t", "method": method, "family": family, "repeat": 0, "status": "ok", "error": error,
         "scores": [error] * 4, "knobs": "{}", "N": 10.0, "ratio": ratio,
         "kv_bytes": kv, "weight_bytes": w, "footprint": [("kv_bytes", kv), ("kv_bytes_dense", 100.0), ("weight_bytes", w), ("weight_bytes_dense", 900.0)]}
        for method, family, error, ratio, kv, w in (
            ("none", "visual-tokens", 0.1, None, 100.0, 900.0),
            ("snapkv", "kv-cache", 0.2, 2.0, 50.0, 900.0),
            ("rtn", "weights", 0.3, 4.0, 100.0, 225.0),
        )
    ]  # fmt: skip
    found = best_at_shares(to_table(rows), (0.5,))
    assert found is not None
    assert [(a.sentence.partition(":")[0], "snapkv" in a.sentence, "rtn" in a.sentence) for a in found] == [
        ("t on m, at half the bytes of the KV cache", True, False),
        ("t on m, at half the bytes of the weights", False, True),
    ]
    assert to_ask("s", found) == "frontier s --share 0.5 --cost kv_bytes"
    assert answers(to_table(rows), share=0.5, cost="kv_bytes").answers
    assert best_at_shares(to_table(rows[:1]), (0.5,)) is None


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
