"""Figures of results, and where their colours come from."""

from __future__ import annotations

import re

import pytest

import isoflop
from isoflop.core.errors import UserError
from isoflop.dashboards import palette
from isoflop.dashboards.plots import artifacts, figures
from isoflop.dashboards.report.render import _asset

DATA = {
    "N": [n for n in (1.0, 3.0, 10.0, 30.0) for _ in (1, 4)],
    "V": [1.0, 4.0] * 4,
    "error": [0.9, 0.7, 0.7, 0.52, 0.5, 0.42, 0.4, 0.3],
}


def test_a_fit_is_drawn_with_a_line_a_band_and_dots_per_level_in_the_palettes_colours() -> None:
    figure = isoflop.plot(isoflop.fit(DATA, "product", y="error", map={"N": "N", "V": "V"}, bootstrap=40))
    lines = [t for t in figure.data if t.mode == "lines" and t.fill is None]
    assert [(t.name, t.line.color) for t in lines] == [("V = 1", palette.series(0)), ("V = 4", palette.series(1))]
    assert [t.fillcolor for t in figure.data if t.fill] == [palette.faded(palette.series(k)) for k in (0, 1)]
    dots = [t for t in figure.data if t.mode == "markers"]
    assert [t.y.tolist() for t in dots] == [DATA["error"][0::2], DATA["error"][1::2]]


def test_something_that_is_no_result_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"draws results \(Fit, .*\), not dict"):
        isoflop.plot({})


def test_the_figures_of_a_sweep_are_files_for_its_run(lawful) -> None:
    findings = lawful.sweep.findings()
    found = figures(findings)
    tasks = [fit.key["task"] for fit in findings.laws[0].fits]
    assert set(found) == {f"{kind}-0-{task}" for kind in ("law", "frontier") for task in tasks}
    files = artifacts(findings)
    assert {f.path for f in files} == {f"{name}.html" for name in found}
    assert all("plotly" in str(f.content) for f in files)


def test_the_page_knows_every_colour_that_it_uses() -> None:
    style = palette.stylesheet() + _asset("page.css")
    used = set(re.findall(r"var\(--([\w-]+)\)", style)) - {"s"}
    light, dark, printed = re.findall(r":root \{ (.*?) \}", palette.stylesheet())
    for block in (light, dark, printed):
        assert used <= set(re.findall(r"--([\w-]+):", block))
    assert len(palette.SERIES) == len(palette.SERIES_ON_DARK) == len(palette.SYMBOLS)
    assert len(palette.RAMP) == len(palette.RAMP_ON_DARK)


@pytest.mark.parametrize("colours", [palette.SERIES, palette.SERIES_ON_DARK])
def test_series_are_told_from_the_ground_and_from_each_other(colours: tuple[str, ...]) -> None:
    """Contrast of at least 3 to 1, as graphics need by WCAG 2."""
    ground = palette.LIGHT["ground"] if colours is palette.SERIES else palette.DARK["ground"]
    for colour in colours:
        a, b = sorted((_luminance(colour), _luminance(ground)))
        assert (b + 0.05) / (a + 0.05) >= 3, colour
    assert len(set(colours)) == len(colours)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
