"""Takes pictures of `qdist web`'s page in headless Chromium: `python -m bench.web_picture [FOLDER]`, docs by default.

No model is loaded: the answers are canned, the curves are those of a run that is made up.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from bench.web_answers import ANSWERS, made_up_run
from qdist.host.run.rundir import RunDir
from tests.browser import opened_browser, pretend
from tests.runtime.serve.canned import Canned, serving

PICTURES = {"web-light": ("light", 1200, 780), "web-dark": ("dark", 1200, 780), "web-phone": ("light", 360, 760)}


def take(driver: Any, address: str, name: str, folder: Path) -> None:
    """One picture: a conversation of two questions, beside the base on wide screens."""
    scheme, width, height = PICTURES[name]
    pretend(driver, width, height, scheme)
    driver.get(address)
    driver.execute_script("sessionStorage.clear()")
    driver.refresh()
    wait = WebDriverWait(driver, 10)
    wait.until(lambda each: each.find_element("id", "send").is_enabled())
    if width > 700:
        driver.find_element("id", "beside").click()
    for question in ANSWERS:
        if ":" not in question:
            driver.find_element("id", "question").send_keys(question, Keys.ENTER)
            wait.until(lambda each: each.find_element("id", "send").is_displayed())
    driver.execute_script("document.activeElement.blur()")
    driver.save_screenshot(str(folder / f"{name}.png"))


def main() -> None:
    """All pictures, and how large they are."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    with tempfile.TemporaryDirectory() as place:
        run = made_up_run(Path(place) / "capitals")
        with serving(Canned(ANSWERS, RunDir(run), seconds_a_piece=0.02)) as address, opened_browser() as driver:
            for name in PICTURES:
                take(driver, address, name, folder)
                print(f"{name}.png {(folder / f'{name}.png').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
