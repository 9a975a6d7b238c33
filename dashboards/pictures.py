"""The README's pictures, drawn anew from the sweeps of `make quickstart` and `make real`: ``make pictures``.

A headless Chromium takes them, since what people look at is what a browser makes of a figure, of the report, and of MLflow.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from isoflop.core.errors import UserError
from isoflop.dashboards.figures import frontier_figure
from isoflop.dashboards.palette import LIGHT, series
from isoflop.dashboards.report import report_html
from isoflop.methods.base import METHODS
from isoflop.sweep.api import SweepResults, open_sweep, own_tracking_uri
from isoflop.sweep.asking import answers
from isoflop.track.attach import experiment_id
from isoflop.track.links import runs_view
from isoflop.track.views import BEST

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Headless Chromium would otherwise call home at every start.
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
_NEEDS = (
    "pictures need Chromium, chromedriver and Selenium (Debian: apt-get install chromium-driver; pip install selenium)"
)
_PATIENCE = 120.0  # seconds, for a server to start and a page to fill itself


@contextlib.contextmanager
def browser(width: int, height: int) -> Iterator[Any]:
    """A headless Chromium with a window of this size, driven by Selenium. Raises UserError where there is none."""
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        raise UserError(_NEEDS) from None
    if found is None or driver is None:
        raise UserError(_NEEDS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = found
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            yield page
        finally:
            page.quit()


def save(page: Any, target: Path) -> None:
    """What the page shows now, as a PNG without the transparency that browsers add."""
    page.save_screenshot(str(target))
    with Image.open(target) as image:
        image.convert("RGB").save(target, optimize=True)


def frontier(sweep: SweepResults, target: Path) -> None:
    """Measured jobs and the law's frontier."""
    figure = frontier_figure(sweep)
    figure.update_layout(margin_l=60)
    body = figure.to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False})
    _photograph_html(
        f"<body style='margin:0'>{body}</body>", int(figure.layout.width), int(figure.layout.height) + 10, target
    )


def report(sweep: SweepResults, target: Path) -> None:
    """The head of the sweep's report."""
    _photograph_html(report_html(sweep), 1100, 1180, target)


def real(sweep: SweepResults, target: Path) -> None:
    """What methods on the cache cost, a panel per task: error over their share of its bytes."""
    table = sweep.results()
    family = {name for name in METHODS.names() if METHODS.get(name).family == "kv-cache"}
    found = answers(table, share=1.0, cost="kv_bytes", where=_one_of("method", {"none", *family}))
    figure = make_subplots(
        1, len(found), subplot_titles=[answer.key["task"] for answer in found], horizontal_spacing=0.06
    )
    methods = list(dict.fromkeys(c["method"] for answer in found for c in answer.candidates))
    for place, answer in enumerate(found, 1):
        for k, method in enumerate(methods):
            own = sorted((c["cost"], c["error"]) for c in answer.candidates if c["method"] == method)
            x, y = ([pair[n] for pair in own] for n in (0, 1))
            if method == "none":
                figure.add_hline(y[0], line_dash="dot", line_color=LIGHT["faint"], row=1, col=place)
                continue
            trace = go.Scatter(
                x=x, y=y, name=method, mode="lines+markers", line_color=series(k - 1), showlegend=place == 1
            )
            figure.add_trace(trace, row=1, col=place)
    figure.update_xaxes(title_text="share of the cache's bytes", range=[0, 0.8], dtick=0.25)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(
        template="plotly_white", width=1100, height=330, margin={"l": 45, "r": 10, "t": 35, "b": 45}, font_size=12
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.28}, yaxis_title="error (text: bits per byte)")
    body = figure.to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False})
    _photograph_html(f"<body style='margin:0'>{body}</body>", 1100, 340, target)


def _one_of(column: str, names: set[str]) -> str:
    return f"{column} IN ({', '.join(repr(name) for name in sorted(names))})"


def _photograph_html(html: str, width: int, height: int, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, browser(width, height) as page:
        path = Path(folder) / "page.html"
        path.write_text(html, encoding="utf-8")
        page.get(path.as_uri())
        page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        time.sleep(1.0)  # Plotly draws in steps
        save(page, target)


def mlflow(sweep: SweepResults, target: Path) -> None:
    """MLflow's runs table over the sweep's store, with the jobs of least error first."""
    experiment = _experiment(sweep)
    with _server(sweep) as address, browser(1500, 620) as page:
        page.get(f"{address}/{runs_view(experiment, BEST)}")
        _until(
            lambda: len(page.find_elements("css selector", ".ag-row [col-id='metrics.`error`']")) > 1, "the runs table"
        )
        for button in page.find_elements("css selector", "[aria-label='Close'], [aria-label='close']"):
            with contextlib.suppress(Exception):  # panels about MLflow itself, which differ between its versions
                button.click()
        time.sleep(2.0)
        save(page, target)


def _experiment(sweep: SweepResults) -> str:
    uri = own_tracking_uri(sweep.store)
    found = experiment_id(uri, sweep.name) if uri else None
    if found is None:
        raise UserError(f"MLflow has nothing of sweep {sweep.name!r} in store {sweep.store.shown}")
    return found


@contextlib.contextmanager
def _server(sweep: SweepResults) -> Iterator[str]:
    """``isoflop ui`` over the sweep's store, on a free port."""
    command = [sys.executable, "-m", "isoflop", "ui", "--store", sweep.store.uri, "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            yield _until(lambda: _answering(log), "MLflow's server")
        finally:
            process.terminate()
            process.wait()


def _answering(log: Any) -> str | None:
    log.seek(0)
    found = re.search(r"http://127\.0\.0\.1:\d+", log.read())
    if found is None:
        return None
    with contextlib.suppress(URLError, OSError), urllib.request.urlopen(f"{found.group()}/health", timeout=5) as answer:
        return found.group() if answer.status == 200 else None
    return None


def _until(found: Any, what: str) -> Any:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.3)
    raise UserError(f"{what} was not there after {_PATIENCE:g} s")


PICTURES = {
    "frontier": (frontier, "quickstart"),
    "report": (report, "quickstart"),
    "mlflow": (mlflow, "quickstart"),
    "real": (real, "real"),
}
"""What draws each, and of which sweep."""


def main() -> None:
    """Command line: the sweep to draw, and which pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", help="draw another sweep than the picture's own")
    parser.add_argument("--store")
    parser.add_argument("--folder", type=Path, default=Path("dashboards/pictures"))
    parser.add_argument("--only", nargs="*", choices=list(PICTURES), default=list(PICTURES))
    arguments = parser.parse_args()
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            draw, own = PICTURES[name]
            draw(open_sweep(arguments.sweep or own, arguments.store), (arguments.folder / f"{name}.png").resolve())
            print(arguments.folder / f"{name}.png")
    except UserError as error:
        sys.exit(f"isoflop: {error}")


if __name__ == "__main__":
    main()
