"""MLflow's own pages over a finished sweep, in a real browser: what people meet behind ``isoflop ui``.

The server is the one that the command starts. Skipped where Chromium or Selenium are missing.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import browsers  # skips this module where there is no browser
import pytest
from report_sweeps import law_sweep
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By

from isoflop.dashboards.session import conclude
from isoflop.ledger import Store
from isoflop.sweep.api import RunOptions, SweepResults, run_resolved
from isoflop.sweep.progress import Quiet
from isoflop.sweep.stored import resolve_stored

PATIENCE = 240.0  # seconds; a dozen do on an idle machine
JOBS = 16


@dataclass(frozen=True)
class Shown:
    """A server over a store, and where it shows the sweep."""

    address: str
    experiment: str
    run: str
    sweep: SweepResults

    def at(self, place: str) -> str:
        return f"{self.address}/#/experiments/{self.experiment}/{place}"


def eventually(found: Callable[[], Any], what: str) -> Any:
    """What ``found`` gives once it gives anything; pages fill themselves piece by piece."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if value := found():
                return value
        except (NoSuchElementException, StaleElementReferenceException, OSError, ValueError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"not there after {PATIENCE:g} s: {what}")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """A sweep whose results exist is opened again, which brings MLflow up to date; then ``isoflop ui`` over its store."""
    folder = tmp_path_factory.mktemp("mlflow-pages")
    law_sweep(folder)
    store = Store.open(str(folder))
    options = RunOptions(store=str(folder), executor="local", cache_dir=folder / "cache")
    sweep = run_resolved(resolve_stored(store, "lawful"), options, Quiet(), conclude)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lawful").experiment_id
    (run,) = client.search_runs([experiment], "tags.`isoflop.parent` = 'true'")
    command = [sys.executable, "-m", "isoflop", "ui", "--store", str(folder), "--port", "0"]
    log = folder / "ui.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, stderr=stream, stdout=stream, start_new_session=True)
    try:
        address = eventually(lambda: _address(log), "the address that isoflop ui prints")
        eventually(lambda: urllib.request.urlopen(f"{address}/health", timeout=5).status == 200, "MLflow's server")
        yield Shown(address, experiment, run.info.run_id, sweep)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody of its group is left
                os.killpg(server.pid, signal.SIGKILL)


def _address(log: Path) -> str | None:
    found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
    return found.group() if found else None


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser that reaches this host and nothing else, as on a machine without network."""
    driver = browsers.start(tmp_path_factory.mktemp("profile"), reachable="127.0.0.1")
    yield driver
    driver.quit()


def visit(browser: Any, address: str) -> None:
    browser.get("about:blank")  # an address that differs behind # only would not load anew
    browser.get(address)


def texts(browser: Any, selector: str) -> list[str]:
    return [e.text for e in browser.find_elements(By.CSS_SELECTOR, selector)]


def test_the_runs_table_has_the_jobs_below_their_sweep(browser: Any, shown: Shown) -> None:
    visit(browser, shown.at("runs"))
    cell = ".ag-row [col-id='attributes.`Run Name`']"
    names = f"{cell} a"
    assert eventually(lambda: texts(browser, names), "a row of the runs table") == ["sweep lawful"]
    browser.find_element(By.CSS_SELECTOR, f"{cell} button").click()  # unfolds it
    unfolded = eventually(lambda: (t := texts(browser, names))[1:] and t, "jobs below their sweep")
    assert unfolded[0] == "sweep lawful"
    assert all(re.match(r"tiny-llava/d\d+ avgpool tokens \d+ reading", name) for name in unfolded[1:])
    assert f"{JOBS + 1} matching runs" in browser.find_element(By.TAG_NAME, "body").text


def test_the_description_has_the_law_the_frontier_and_a_link_that_opens_the_report(browser: Any, shown: Shown) -> None:
    visit(browser, shown.at(f"runs/{shown.run}"))
    link = eventually(lambda: browser.find_element(By.LINK_TEXT, "report"), "the description's link")
    body = browser.find_element(By.TAG_NAME, "body")
    assert shown.sweep.conclusion.headline[0] in " ".join(body.text.split())
    browser.find_element(By.XPATH, "//button[normalize-space()='Show more']").click()
    preformatted = eventually(lambda: texts(browser, "pre"), "the law")
    assert "alpha" in preformatted[0]
    cells = texts(browser, "table th")
    assert {"budget", "N*", "V*"} <= set(cells)
    target = link.get_attribute("href")
    assert target.startswith(f"{shown.address}/#/")
    visit(browser, target)
    _the_report_is_drawn(browser, shown)


def _the_report_is_drawn(browser: Any, shown: Shown) -> None:
    """Inside MLflow's page, in a frame, with its charts: MLflow's sandbox runs the page's script."""
    frame = eventually(lambda: browser.find_element(By.CSS_SELECTOR, "iframe.mlflow-html-iframe"), "the report's frame")
    browser.switch_to.frame(frame)
    try:
        assert eventually(lambda: browser.find_element(By.TAG_NAME, "h1").text, "the report") == "lawful"
        points = "#frontier svg.chart .marker"
        assert len(eventually(lambda: browser.find_elements(By.CSS_SELECTOR, points), "points")) == JOBS
        assert texts(browser, ".headline p")[0] == f"{shown.sweep.conclusion.headline[0]}."
    finally:
        browser.switch_to.default_content()


def _heads(browser: Any) -> list[str]:
    """Heads of the columns from left to right, which is not their order in the document."""
    cells = browser.find_elements(By.CSS_SELECTOR, ".ag-header-cell")
    return [text for _, text in sorted((cell.rect["x"], cell.text) for cell in cells)]


def test_the_view_of_the_best_jobs_has_its_columns_in_order(browser: Any, shown: Shown) -> None:
    browser.set_window_size(2400, 1000)  # the table draws only columns that are in sight
    visit(browser, shown.at("runs?viewStateShareKey=best"))
    error = ".ag-row [col-id='metrics.`error`']"
    eventually(lambda: len(texts(browser, error)) > 1, "rows")
    wanted = ["Run Name", "model", "method", "task", "error", "N", "V", "ratio", "flops"]
    eventually(lambda: [h for h in _heads(browser) if h in wanted] == wanted, f"columns {', '.join(wanted)}")
    least = min(shown.sweep.results()["error"].to_pylist())
    errors = eventually(lambda: (e := _errors(browser))[1:] and e, "errors")
    assert errors == sorted(errors)
    assert errors[0] == pytest.approx(least, abs=1e-3)
    eventually(lambda: f"{JOBS} matching runs" in browser.find_element(By.TAG_NAME, "body").text, "the count of runs")


def _errors(browser: Any) -> list[float]:
    """Errors of the rows in sight, from the top."""
    rows = browser.find_elements(By.CSS_SELECTOR, ".ag-row[row-index]")
    ordered = sorted(rows, key=lambda row: int(row.get_attribute("row-index")))
    cells = [row.find_elements(By.CSS_SELECTOR, "[col-id='metrics.`error`']") for row in ordered]
    return [float(c[0].text) for c in cells if c]


def _text(browser: Any) -> str:
    return str(browser.find_element(By.TAG_NAME, "body").text)


def test_charts_of_the_sweep_stand_first(browser: Any, shown: Shown) -> None:
    visit(browser, shown.at("runs?viewStateShareKey=best&compareRunsMode=CHART"))
    shown_points = "g.scatterlayer path.point"
    eventually(lambda: len(browser.find_elements(By.CSS_SELECTOR, shown_points)) >= 3 * JOBS, "points of three charts")
    section = r"\bSweep\s*\(4\).*flops vs\. error.*N vs\. error.*ratio vs\. error"
    text = eventually(lambda: re.search(section, _text(browser), re.S) and _text(browser), "the sweep's own section")
    assert "Sweep" in re.findall(r"^([A-Z][\w ]*?)\s*\(\d+\)$", text, re.M)[:1]  # before what MLflow generates
