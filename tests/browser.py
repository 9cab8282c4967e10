"""A headless Chromium for tests and pictures of pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_DRIVER = shutil.which("chromedriver")
WHY_NONE = (
    "selenium is not installed" if find_spec("selenium") is None
    else "" if _CHROMIUM and _DRIVER
    else "chromium or chromedriver is not here (apt-get install chromium chromium-driver)"
)  # fmt: skip
"""Why no browser can be opened; empty if one can."""


@contextmanager
def opened_browser() -> Iterator[Any]:
    """A browser whose console and requests are logged."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def pretend(browser: Any, width: int, height: int, scheme: str) -> None:
    """Show pages on a screen of this size, to someone who prefers this scheme of colours."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def pretend_nothing(browser: Any) -> None:
    """Show pages in the browser's own window and colours again."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
