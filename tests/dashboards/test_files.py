"""Results as data frames, LaTeX, figures and files: every kind of result, every ending."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner

import isoflop
from isoflop.cli.frontier import frontier_command
from isoflop.cli.laws import compare_command, fit_command
from isoflop.core.errors import UserError
from isoflop.core.result import Result
from isoflop.dashboards.files import FIGURES, TABLES, save_result
from isoflop.dashboards.plots import _DRAWN
from isoflop.frontier import compare_methods, frontier
from isoflop.frontier.rate_curves import RateCurve
from isoflop.frontier.rate_tables import RateCurves

FIRST_BYTES = {
    ".png": b"\x89PNG",
    ".pdf": b"%PDF",
    ".svg": b"<?xml",
    ".html": b"<!doctype html>",
    ".csv": b"",
    ".tex": b"\\begin{tabular}",
    ".parquet": b"PAR1",
    ".json": b"{",
}


def rows() -> dict[str, Any]:
    n, v = (a.ravel() for a in np.meshgrid([1e8, 3e8, 1e9, 3e9], [1.0, 4, 16, 64]))
    n, v = np.tile(n, 2), np.tile(v, 2)
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(len(n))
    method = np.repeat(["a_b", "c&d"], 16)
    error = np.where(method == "a_b", 1.0, 1.1) * 0.6 * (n / 1e8) ** -0.2 * v**-0.1 * noise
    return {"N": n, "V": v, "error": error, "method": method}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    table, fast = rows(), {"bootstrap": 20, "profile": False}
    one = {k: np.asarray(a)[:16] for k, a in table.items()}
    fitted, grouped = isoflop.fit(one, **fast), isoflop.fit(table, by="method", **fast)
    measured = {
        "method": ["none", "none", "x", "x"],
        "repeat": [0, 1, 0, 1],
        "error": [0.1, 0.12, 0.2, 0.21],
        "bytes": [4.0, 4, 2, 2],
    }
    curve = RateCurve.of([(1.0, 0.4), (2.0, 0.2)])
    found = [
        fitted, grouped, isoflop.compare(one, ["product"]), isoflop.compare(table, ["product"], by="method"), frontier(fitted, q=1),
        frontier(grouped, q=1), compare_methods(grouped, q=1), isoflop.pareto(one, {"N": "min", "error": "min"}),
        RateCurves("bytes", "error", ("method",), {("t", "m", "png"): curve}), isoflop.answers(measured),
    ]  # fmt: skip
    return {type(r).__name__: r for r in found}


def kinds() -> list[str]:
    def below(cls: type) -> list[type]:
        return [cls, *(c for s in cls.__subclasses__() for c in below(s))]

    return sorted(c.__name__ for c in below(Result)[1:])


@pytest.mark.parametrize("kind", kinds())
def test_every_result_is_a_frame_latex_and_a_figure(kind: str, results: dict[str, Any]) -> None:
    """A new kind of result needs an example here, and a figure."""
    result = results[kind]
    frame = result.to_pandas()
    assert len(frame) == result.to_arrow().num_rows > 0
    text = result.to_latex()
    lines = text.splitlines()
    assert lines[1:4:2] == ["\\toprule", "\\midrule"]
    assert len(lines) == len(frame) + 6
    cells = [line.replace("\\&", "").count("&") for line in lines if line.endswith("\\\\")]
    assert len(set(cells)) == 1
    assert "nan" not in text
    figure = result.plot()
    assert isinstance(figure, go.Figure)
    assert figure.data
    assert figure.to_dict() == isoflop.plot(result).to_dict()


def test_every_figure_is_of_a_result() -> None:
    assert {cls.__name__ for cls in _DRAWN} == set(kinds())


@pytest.mark.parametrize("kind", kinds())
def test_every_figure_is_drawn_without_a_browser(kind: str, results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    save_result(results[kind], path)
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[1] > 1000
    assert (pixels < 200).mean() > 0.005  # something stands on it


@pytest.mark.parametrize("suffix", [*FIGURES, *TABLES])
def test_the_ending_says_what_is_written(suffix: str, results: dict[str, Any], tmp_path: Path) -> None:
    for name in ("Fit", "Answers"):
        path = tmp_path / f"{name}{suffix.upper()}"
        save_result(results[name], path)
        assert path.read_bytes().startswith(FIRST_BYTES[suffix])
    if suffix == ".csv":
        assert path.read_text().splitlines()[0].startswith("question,task")
    if suffix == ".parquet":
        assert pa.parquet.read_table(path).num_rows == len(results["Answers"])
    if suffix == ".json":
        assert json.loads(path.read_text())["answers"]


def test_latex_escapes_what_it_would_obey() -> None:
    class One(Result):
        def to_arrow(self) -> pa.Table:
            return pa.table(
                {
                    "a_b": ["50 % of ~x^2 {y} \\z $#&"],
                    "n": [1.5e-7],
                    "none": pa.array([None], pa.float64()),
                    "yes": [True],
                }
            )

    line = One().to_latex().splitlines()[4]
    assert line == (
        "50 \\% of \\textasciitilde{}x\\textasciicircum{}2 \\{y\\} \\textbackslash{}z \\$\\#\\& & "
        "$1.5 \\times 10^{-7}$ & -- & yes \\\\"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.pngg", "ending '.pngg' .did you mean '.png'.*; allowed: .png, .pdf"),
        ("x", "ending ''; allowed"),
        ("no/folder/x.csv", "no folder"),
    ],
)
@pytest.mark.parametrize("command", [fit_command, frontier_command, compare_command])
def test_a_wrong_file_is_one_line_before_anything_is_computed(
    command: Any, name: str, words: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(command, [str(tmp_path / "not there.csv"), "--save", str(tmp_path / name)])
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=words):
        raise result.exception


def test_the_commands_save(tmp_path: Path) -> None:
    import pandas as pd

    source = tmp_path / "rows.csv"
    pd.DataFrame(rows()).to_csv(source, index=False)
    made: list[tuple[Any, list[str]]] = [
        (fit_command, ["--bootstrap", "0"]),
        (frontier_command, ["--bootstrap", "0", "--q", "1"]),
        (compare_command, ["--forms", "product"]),
    ]
    for k, (command, options) in enumerate(made):
        path = tmp_path / f"{k}.pdf"
        result = CliRunner().invoke(command, [str(source), *options, "--save", str(path)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert result.output.endswith(f"wrote {path}\n")
        assert path.read_bytes().startswith(b"%PDF")
