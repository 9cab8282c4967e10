"""Does a report work in a browser: charts drawn, nothing fetched, nothing of a run executed, narrow and wide?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qdist.cli.main import main
from tests.browser import WHY_NONE, opened_browser, pretend, pretend_nothing
from tests.cli.test_report import EVIL, run_of

pytestmark = pytest.mark.skipif(bool(WHY_NONE), reason=WHY_NONE)

ANSWER = dict.fromkeys(("question", "before", "after", "expected"), EVIL.replace("alert(", "window.hit=("))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run whose texts are hostile, and of it compared with another."""
    folder = tmp_path_factory.mktemp("reports")
    a = run_of(folder / f"a{EVIL.replace('/', '_').replace('alert(', 'window.hit=(')}", result={"answers": [ANSWER]})
    b = run_of(folder / "b", steps=4)
    made = {"one": folder / "one.html", "two": folder / "two.html"}
    for arguments in ([a, "--out", made["one"]], [a, b, "--out", made["two"]]):
        done = CliRunner().invoke(main, ["report", *map(str, arguments)])
        assert done.exit_code == 0, done.output
    return made


@pytest.fixture(params=["one", "two"])
def opened(request: pytest.FixtureRequest, browser: Any, pages: dict[str, Path]) -> Any:
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(pages[request.param].as_uri())
    return browser


def requests(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]


INK = """
return Array.from(document.querySelectorAll('.plot canvas')).map(canvas => {
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3]) colours.add(pixels[i] >> 5 << 6 | pixels[i + 1] >> 5 << 3 | pixels[i + 2] >> 5);
  return colours.size;
})"""  # noqa: E501


def test_a_page_fetches_nothing_complains_of_nothing_and_draws_every_chart(opened: Any) -> None:
    fetched = [url for url in requests(opened) if not url.startswith("data:")]
    assert fetched == [opened.current_url]
    assert opened.get_log("browser") == []
    ink = opened.execute_script(INK)
    assert (len(ink), min(ink) >= 3) == (4, True), ink


def test_nothing_that_a_run_holds_is_executed(opened: Any) -> None:
    assert opened.execute_script("return [window.hit === undefined, document.images.length]") == [True, 0]
    assert EVIL.replace("alert(", "window.hit=(") in opened.execute_script("return document.body.innerText")


def test_a_script_that_came_in_all_the_same_would_not_run(opened: Any) -> None:
    opened.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hit = 3'; document.body.append(s)"
    )
    assert opened.execute_script("return window.hit === undefined")
    assert "Content Security Policy" in opened.get_log("browser")[0]["message"]


def test_dragging_zooms_every_chart_and_a_double_click_goes_back(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    spans = "return Array.from(window.qdistPlots.values()).map(p => p.scales.x.max - p.scales.x.min)"
    before = opened.execute_script(spans)
    over = opened.find_element(By.CSS_SELECTOR, "figure[data-chart=loss] .u-over")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", over)
    ActionChains(opened).move_to_element_with_offset(over, -100, 0).click_and_hold().move_by_offset(
        200, 0
    ).release().perform()
    zoomed = opened.execute_script(spans)
    assert all(now < was for now, was in zip(zoomed, before, strict=True)), (before, zoomed)
    ActionChains(opened).double_click(over).perform()
    assert opened.execute_script(spans)[0] == pytest.approx(before[0])


def test_a_name_in_the_legend_hides_its_curve(opened: Any) -> None:
    from selenium.webdriver.common.by import By

    label = opened.find_elements(By.CSS_SELECTOR, "figure[data-chart=loss] .u-legend .u-series th")[1]
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", label)
    shown = "return window.qdistPlots.get('loss').series[1].show"
    assert opened.execute_script(shown) is True
    label.click()
    assert opened.execute_script(shown) is False


def test_hovering_says_the_values_of_a_step(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    over = opened.find_element(By.CSS_SELECTOR, "figure[data-chart=loss] .u-over")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", over)
    ActionChains(opened).move_to_element(over).move_by_offset(3, 3).perform()
    values = opened.find_elements(By.CSS_SELECTOR, "figure[data-chart=loss] .u-legend .u-value")
    assert [values[0].text, values[1].text] == ["3", "1"]


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1400, "dark")])
def test_no_screen_is_too_narrow_or_dark(opened: Any, width: int, scheme: str) -> None:
    pretend(opened, width, 800, scheme)
    try:
        opened.refresh()
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        light = opened.execute_script(
            "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v > 200)"
        )
        assert light == (scheme == "light")
        assert min(opened.execute_script(INK)) >= 3
    finally:
        pretend_nothing(opened)


def test_the_figures_are_there_without_scripts(opened: Any) -> None:
    opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened.refresh()
        text = opened.find_element("css selector", "#curves").text
        assert "Charts need scripts" in text
        assert "The curves in figures" in text
    finally:
        opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
