"""``isoflop report FILE.csv``: the page of a plain table of results."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from isoflop.cli.html_report import report_command
from isoflop.core.errors import UserError
from isoflop.dashboards.report import table_data

ROWS = {
    "technique": ["none"] * 3 + ["<b>prune</b>"] * 3 + ["other"] * 3,
    "run": [1, 2, 3] * 3,
    "accuracy": [0.9, 0.91, 0.92, 0.89, 0.9, 0.88, 0.7, 0.72, float("nan")],
    "size": [100.0] * 3 + [50.0] * 6,
}
NAMES = "method=technique,repeat=run,bytes=size"


def report(folder: Path, *options: str) -> tuple[str, Path]:
    source, target = folder / "my results.csv", folder / "page.html"
    pd.DataFrame(ROWS).to_csv(source, index=False)
    found = CliRunner().invoke(report_command, [str(source), "--out", str(target), *options], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output, target


def test_a_file_has_a_page_with_its_frontier_methods_failures_and_origin(tmp_path: Path) -> None:
    words, target = report(tmp_path, "--y", "1-accuracy", "--map", NAMES)
    page = target.read_text()
    assert "wrote" in words
    for section in ("Frontier", "Methods compared", "Rows without an error", "Where the numbers come from"):
        assert f"<h2>{section}</h2>" in page
    assert "my results.csv" in page
    assert "&lt;b&gt;prune" in page
    assert "<b>prune" not in page.split("<script")[0]


def test_rows_of_examples_are_compared_by_them() -> None:
    rows = {
        "method": ["none"] * 4 + ["a"] * 4,
        "example": [1, 2, 3, 4] * 2,
        "error": [0.0, 1, 0, 0, 0, 1, 1, 0],
        "flops": [4.0] * 4 + [2.0] * 4,
    }
    (headline,) = table_data("x", rows)["headline"]
    assert "; 2 × cheaper than the cheapest uncompressed model that is as good" in headline
    said = re.search(r"over 4 paired examples, worse with probability ([\d.]+)", headline)
    assert said is not None
    assert float(said[1]) == pytest.approx(1 - 2**-2, abs=0.03)  # one of four differs


def test_the_terminal_is_80_columns_wide(tmp_path: Path) -> None:
    words, _ = report(tmp_path, "--y", "1-accuracy", "--map", NAMES)
    said = words.partition("wrote")[0].splitlines()
    assert len(said) > 2
    assert max(map(len, said)) <= 80


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([0.3, 0.4], "is probably better, error 0.2 (difference to it 0.15 (95 %:"),  # Student's over two would hold 0
        ([0.201, 0.199], "is as good (none, error 0.2; difference to it 0 (95 %:"),
    ],
)
def test_two_repeats_make_no_equality(errors: list[float], said: str) -> None:
    """What so few repeats leave open is told; what is likelier than not worse saves nothing."""
    rows = {
        "method": ["none"] * 2 + ["a"] * 2,
        "repeat": [0, 1] * 2,
        "error": [0.2, 0.2, *errors],
        "flops": [4.0] * 2 + [2.0] * 2,
        "model": ["none"] * 4,
    }
    data = table_data("x", rows)
    texts = [s["text"] for s in data["sections"][0]["groups"][0]["panels"][0]["slider"]["states"]]
    assert said in texts[0]
    assert "over 2 repeats, worse with probability " in texts[0]
    assert ("cheaper" in data["headline"][0]) == ("as good" in said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no column 'method'"),
        (["--map", "method=techniqe"], "unknown column 'techniqe' .did you mean 'technique'"),
        (["--map", NAMES], "unknown column 'error'"),
    ],
)
def test_a_file_that_says_too_little_is_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    source = tmp_path / "x.csv"
    pd.DataFrame(ROWS).to_csv(source, index=False)
    result = CliRunner().invoke(report_command, [str(source), *arguments])
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=words):
        raise result.exception
    assert not list(tmp_path.glob("*.html"))
