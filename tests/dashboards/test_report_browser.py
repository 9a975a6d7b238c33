"""The report in a real browser: headless Chromium, driven by Selenium. Skipped where either is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import browsers  # skips this module where there is no browser
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

if TYPE_CHECKING:
    from conftest import Reported


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that cannot reach anything but files."""
    driver = browsers.start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


def show(browser: Any, reported: Reported, folder: Path, width: int = 1200) -> None:
    """Load a report's page at a width, with an empty console."""
    path = folder / "report.html"
    path.write_text(reported.page, encoding="utf-8")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.classList.contains('scripted')")


@pytest.mark.parametrize("name", ["lawful", "compared", "failed"])
def test_loads_without_a_word_in_the_console(
    name: str, browser: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    reported = request.getfixturevalue(name)
    show(browser, reported, tmp_path)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return typeof window.alerted") == "undefined"
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('figure')].filter(f => f.offsetWidth).map(f => !!f.querySelector('svg.chart'))"
    )
    assert all(drawn)
    assert (name == "failed") == (not drawn)


def test_charts_draw_every_series_and_point(browser: Any, lawful: Reported, tmp_path: Path) -> None:
    show(browser, lawful, tmp_path)
    counted = browser.execute_script(
        "return [...document.querySelectorAll('#frontier figure svg.chart .series')].map(g => [g.dataset.name, g.querySelectorAll('.marker').length])"
    )
    assert counted == [["frontier of the law", 0], *([f"V = {v}", 4] for v in (1, 4, 9, 36))]
    bands = browser.execute_script("return document.querySelectorAll('#laws figure svg.chart .band').length")
    assert bands == 4
    hollow = browser.execute_script("return document.querySelectorAll('#predicted svg.chart .marker.hollow').length")
    assert hollow == 4


def test_slider_changes_the_stated_optimum_by_keyboard(browser: Any, lawful: Reported, tmp_path: Path) -> None:
    show(browser, lawful, tmp_path)
    states = lawful.section("frontier")["groups"][0]["panels"][0]["slider"]["states"]
    slider = browser.find_element(By.CSS_SELECTOR, "#frontier input.budget")
    statement = browser.find_element(By.CSS_SELECTOR, "#frontier .statement")
    budget = browser.find_element(By.CSS_SELECTOR, "#frontier output.budget")
    middle = len(states) // 2
    assert statement.text == states[middle]["text"]
    line = "return document.querySelector('#frontier .mark .budget').getAttribute('d')"
    before = browser.execute_script(line)
    slider.send_keys(Keys.ARROW_RIGHT)
    assert (statement.text, budget.text) == (states[middle + 1]["text"], states[middle + 1]["label"])
    assert browser.execute_script(line) != before
    slider.send_keys(Keys.HOME)
    assert statement.text == states[0]["text"]
    slider.send_keys(Keys.END)
    assert statement.text == states[-1]["text"]
    assert slider.get_attribute("aria-valuetext") == states[-1]["label"]


def test_menu_shows_one_group_and_its_charts(browser: Any, compared: Reported, tmp_path: Path) -> None:
    show(browser, compared, tmp_path)
    visible = (
        "return [...document.querySelectorAll('#frontier .group')].filter(g => g.offsetHeight).map(g => g.dataset.name)"
    )
    names = [g["name"] for g in compared.section("frontier")["groups"]]
    assert browser.execute_script(visible) == names[:1]
    browser.find_element(By.CSS_SELECTOR, "#frontier select").send_keys(Keys.ARROW_DOWN)
    assert browser.execute_script(visible) == names[1:2]
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert browser.execute_script(
        "return !!document.querySelectorAll('#frontier .group')[1].querySelector('svg.chart .marker')"
    )


def test_points_are_read_by_keyboard_and_series_toggle(browser: Any, compared: Reported, tmp_path: Path) -> None:
    show(browser, compared, tmp_path)
    browser.execute_script("document.querySelector('#frontier svg.chart').focus()")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    told = browser.find_element(By.CSS_SELECTOR, "#frontier .tooltip").text
    assert "error" in told
    assert "FLOPs" in told
    names = "return [...document.querySelectorAll('#frontier .group:not([hidden]) svg.chart .series')].map(g => g.dataset.name)"
    before = browser.execute_script(names)
    button = browser.find_elements(By.CSS_SELECTOR, "#frontier .legend button")[1]
    button.send_keys(Keys.SPACE)
    assert browser.execute_script(names) == [n for n in before if n != button.text.strip()]
    assert button.get_attribute("aria-pressed") == "false"


def test_parallel_slider_fades_all_but_the_best(browser: Any, compared: Reported, tmp_path: Path) -> None:
    show(browser, compared, tmp_path)
    count = "return [document.querySelectorAll('#parallel .thread').length, document.querySelectorAll('#parallel .faded').length]"
    assert browser.execute_script(count) == [10, 0]
    browser.find_element(By.CSS_SELECTOR, "#parallel input").send_keys(Keys.HOME)
    assert browser.execute_script(count) == [10, 9]


@pytest.mark.parametrize("name", ["lawful", "compared", "failed"])
def test_narrow_page_does_not_scroll_sideways(
    name: str, browser: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    show(browser, request.getfixturevalue(name), tmp_path, width=400)
    for _ in range(2):
        widths = browser.execute_script("return [document.documentElement.scrollWidth, document.body.scrollWidth]")
        assert max(widths) <= 400
        browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")


def test_dark_and_print_change_colours_and_nothing_else(browser: Any, lawful: Reported, tmp_path: Path) -> None:
    show(browser, lawful, tmp_path)
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(ground)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    try:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
        assert browser.execute_script(ground) not in (light, "rgba(0, 0, 0, 0)")
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})
        assert browser.execute_script(ground) == light  # paper is white
        assert browser.execute_script("return document.querySelector('nav').offsetHeight") == 0
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
