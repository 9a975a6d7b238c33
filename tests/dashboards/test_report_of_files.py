"""``isoflop report FILE.csv``: the page of a plain table of results."""

from __future__ import annotations

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
        "error": [0.0, 1, 0, 0, 1, 1, 1, 0],
        "flops": [4.0] * 4 + [2.0] * 4,
    }
    data = table_data("x", rows)
    (headline,) = data["headline"]
    assert "on the same examples" in headline


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
