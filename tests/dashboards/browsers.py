"""A headless Chromium for tests, driven by Selenium. Importing this skips the module where either is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs Chromium and chromedriver (Debian: apt-get install chromium-driver)", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="needs Selenium: pip install selenium")


def start(profile: Path, reachable: str = "") -> Any:
    """A browser.

    Args:
        profile: an empty folder.
        reachable: the one host that it can reach besides files; by default none.
    """
    allowed = f", EXCLUDE {reachable}" if reachable else ""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--host-resolver-rules=MAP * ~NOTFOUND{allowed}",
        "--window-size=1700,1000", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.command_executor.client_config.timeout = 300  # for one command; a busy machine takes its time
    driver.set_page_load_timeout(120)
    return driver
