"""Does the page work in a browser: streaming, stopping, comparing, editing; safe, readable, and by keyboard alone?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qdist.core.data.records import conversations
from qdist.host.run.rundir import RunDir
from tests.browser import WHY_NONE, opened_browser, pretend, pretend_nothing
from tests.cli.test_report import run_of
from tests.runtime.serve.canned import ADAPTER, BASE, Canned, serving

pytestmark = pytest.mark.skipif(bool(WHY_NONE), reason=WHY_NONE)

EVIL = (
    "<script>window.hit=1</script><img src=x onerror='window.hit=2'>\n\n[dead](javascript:window.hit=3) "
    "[data](data:text/html,x) ![shown](https://example.org/a.png) [**live**](https://example.org/b_(c))\n\n"
    "| a | <b>b</b> |\n|---|:-:|\n| `<i>` | x |\n\n<iframe src='/'></iframe>"
)
RICH = (
    "# Title\n\nSome *em*, **strong**, ***both***, ~~gone~~, `code *as is*`, snake_case_name, 2 * 3 * 4, https://a.org/x.\n"
    "second line\n\n- one\n  - inner\n- two\n\n3. three\n4. four\n\n> quoted\n\n---\n\n"
    "| n | x |\n|--:|---|\n| 1 | a\\|b |\n\n```python\nprint('<hi>')\n```\n\nend \\*plain\\*"
)
ANSWERS = {
    "evil": EVIL,
    "rich": RICH,
    "wide": f"{'x' * 400}\n\n```\n{'y' * 400}\n```\n\n| {' | '.join(['column'] * 20)} |\n|{'---|' * 20}\n",
    f"{BASE}: who": "I am the base.",
    f"{ADAPTER}: who": "I am the adapter.",
    "hostile": "*a **b `c [d" * 2000 + "\n" + "> " * 3000 + "\n" + "- " * 3000,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    answer = dict.fromkeys(("question", "before", "after", "expected"), "What is <b>held out</b>?")
    return run_of(tmp_path_factory.mktemp("runs") / ADAPTER, result={"answers": [answer]})


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[tuple[Canned, str]]:
    canned = Canned(ANSWERS, RunDir(run))
    with serving(canned) as address:
        yield canned, address


class Page:
    """The page as a person uses it."""

    def __init__(self, driver: Any, canned: Canned) -> None:
        self.driver, self.canned = driver, canned

    def the(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def run(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def until(self, true: Any) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 10, poll_frequency=0.02).until(lambda _: true())

    def open(self, address: str) -> None:
        if self.driver.current_url == address:
            self.run("sessionStorage.clear(); localStorage.clear()")
        self.driver.get(address)
        self.until(lambda: self.the("send").is_enabled() and self.the("headline").get_attribute("textContent"))
        self.canned.asked.clear()

    def press(self, *keys: str, holding: str = "") -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.driver)
        (chain.key_down(holding).send_keys(*keys).key_up(holding) if holding else chain.send_keys(*keys)).perform()

    def ask(self, question: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.the("question").send_keys(question, Keys.ENTER)
        self.until(lambda: self.the("send").is_displayed())

    def said(self) -> list[str]:
        return [each.get_attribute("innerText") for each in self.all(".said")]

    def turns(self) -> list[str]:
        return [each.get_attribute("textContent") for each in self.all(".asked .text")]

    def complaints(self) -> list[str]:
        return [each["message"] for each in self.driver.get_log("browser")]


@pytest.fixture
def page(browser: Any, served: tuple[Canned, str]) -> Iterator[Page]:
    canned, address = served
    opened = Page(browser, canned)
    opened.open(address)
    opened.complaints()
    yield opened
    pretend_nothing(browser)


def test_an_answer_streams_in_with_its_tokens_and_speed(page: Page) -> None:
    page.ask("hello")
    assert page.said() == [f"{ADAPTER} says hello"]
    foot = [each.text for each in page.all(".figures span")]
    assert foot[0] == "12 in, 3 out"
    assert [part.split()[0] for part in foot[-2:]] == ["first", "seed"]
    (body,) = page.canned.asked
    assert body["stream_options"] == {"include_usage": True}
    given = {key: value for key, value in body.items() if key not in ("seed", "stream", "stream_options")}
    message = {"role": "user", "content": "hello"}
    assert given == {"model": ADAPTER, "messages": [message], "temperature": 0.7, "top_p": 0.95}
    assert page.complaints() == []


def test_settings_and_system_message_are_sent_and_kept(page: Page) -> None:
    for name, value in {
        "system": "Be brief.",
        "top_k": "5",
        "min_p": "0.1",
        "repetition_penalty": "1.2",
        "seed": "7",
    }.items():
        page.the(name).clear()
        page.the(name).send_keys(value)
    page.driver.refresh()
    page.until(lambda: page.the("send").is_enabled())
    page.ask("hello")
    (body,) = page.canned.asked
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [body[name] for name in ("top_k", "min_p", "repetition_penalty", "seed")] == [5, 0.1, 1.2, 7]


def test_a_setting_out_of_range_is_shown_and_nothing_is_sent(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.the("top_p").clear()
    page.the("top_p").send_keys("2")
    page.the("close-panel").click()
    page.the("question").send_keys("hello", Keys.ENTER)
    assert page.canned.asked == []
    assert page.run("return [document.activeElement.id, document.getElementById('panel').hidden]") == ["top_p", False]


def test_stop_and_escape_end_an_answer_and_the_server_is_told(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    for end in (lambda: page.the("stop").click(), lambda: page.press(Keys.ESCAPE)):
        cut = page.canned.cut
        page.the("question").send_keys("endless", Keys.ENTER)
        page.until(lambda: page.said()[-1].startswith("on on"))
        assert page.the("stop").is_displayed()
        end()
        page.until(lambda: page.the("send").is_displayed())
        assert "stopped" in page.all(".answer:last-child .figures")[-1].text
        page.until(lambda cut=cut: page.canned.cut == cut + 1)
    page.ask("and now")
    messages = page.canned.asked[-1]["messages"]
    assert [each["role"] for each in messages] == ["user", "assistant"] * 2 + ["user"]


def test_base_and_adapter_answer_beside_each_other_and_each_goes_on_with_its_own_words(page: Page) -> None:
    page.the("beside").click()
    page.ask("who")
    assert [each.text for each in page.all(".who")] == [ADAPTER, BASE]
    assert page.said() == ["I am the adapter.", "I am the base."]
    left, right = page.all(".answer")
    assert left.rect["y"] == right.rect["y"]
    page.ask("more")
    earlier = {body["model"]: body["messages"][1]["content"] for body in page.canned.asked[2:]}
    assert earlier == {ADAPTER: "I am the adapter.", BASE: "I am the base."}
    pretend(page.driver, 600, 800, "light")
    page.until(lambda: not page.the("panel").is_displayed())
    left, right = page.all(".turn:last-child .answer")
    assert left.rect["y"] + left.rect["height"] <= right.rect["y"]


def test_nothing_that_a_model_says_becomes_markup(page: Page) -> None:
    page.ask("evil")
    assert page.run("return window.hit === undefined")
    assert page.all("img, iframe, .said script, .said b, .said i") == []
    links = [(each.get_attribute("href"), each.get_attribute("rel"), each.text) for each in page.all(".said a")]
    assert links == [
        ("https://example.org/a.png", "noopener noreferrer", "shown"),
        ("https://example.org/b_(c)", "noopener noreferrer", "live"),
    ]
    assert "[dead](javascript:window.hit=3) [data](data:text/html,x)" in page.said()[0]
    assert page.complaints() == []


def test_a_script_that_came_in_all_the_same_would_not_run(page: Page) -> None:
    ways = [
        "document.body.innerHTML = '<img src=x onerror=window.hit=4>'",
        "const s = document.createElement('script'); s.src = 'data:text/javascript,hit=4'; document.body.append(s)",
        "const b = document.createElement('b'); b.setAttribute('onclick', 'hit=4'); document.body.append(b); b.click()",
    ]
    refused = [page.run(f"try {{ {way}; return ''; }} catch (error) {{ return error.name; }}") for way in ways]
    assert (refused, page.run("return window.hit === undefined")) == (["TypeError"] * 3, True)
    assert page.complaints() != []


def test_markdown_is_drawn(page: Page) -> None:
    page.ask("rich")
    count = "return [...arguments[0]].map((name) => document.querySelectorAll(`.said ${name}`).length)"
    names = ["h3", "em", "strong", "del", "ul ul", "ol", "blockquote", "hr", "table", "pre code", "a", "br"]
    assert page.run(count, names) == [1, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    texts = "return [...arguments[0]].map((name) => document.querySelector(`.said ${name}`).textContent)"
    assert page.run(texts, ["h3", "p code", "td + td", "pre code", "figcaption span", "> p:last-child", "a"]) == [
        "Title", "code *as is*", "a|b", "print('<hi>')", "python", "end *plain*", "https://a.org/x",
    ]  # fmt: skip
    assert page.run("return document.querySelector('.said ol').start") == 3
    assert "snake_case_name, 2 * 3 * 4" in page.said()[0]


def test_hostile_markdown_neither_hangs_nor_breaks_the_page(page: Page) -> None:
    page.ask("hostile")
    assert "[d" in page.said()[0]
    assert page.complaints() == []


def test_a_block_that_did_not_change_stays_while_more_comes(page: Page) -> None:
    script = """
    const done = arguments[0];
    import('/page/markdown.js').then(({ showMarkdown }) => {
      const place = document.createElement('div');
      showMarkdown(place, 'first\\n\\nsec');
      const [first, second] = place.children;
      showMarkdown(place, 'first\\n\\nsecond\\n\\n- third');
      done([place.children[0] === first, place.children[1] === second, place.innerText]);
    })"""
    assert page.driver.execute_async_script(script)[:2] == [True, False]


def test_the_keyboard_alone_sends_edits_and_breaks_lines(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    assert page.run("return document.activeElement.id") == "question"
    page.press("one")
    page.press(Keys.ENTER, holding=Keys.SHIFT)
    page.press("two", Keys.ENTER)
    page.until(lambda: page.said() == [f"{ADAPTER} says one\ntwo"])
    page.until(lambda: page.the("send").is_displayed())
    page.press("draft")
    page.press(Keys.ARROW_UP, holding=Keys.ALT)
    assert page.the("question").get_attribute("value") == "one\ntwo"
    page.press(Keys.ESCAPE)
    assert page.the("question").get_attribute("value") == "draft"
    page.press(Keys.ARROW_UP, holding=Keys.ALT)
    page.press("!", Keys.ENTER)
    page.until(lambda: page.said() == [f"{ADAPTER} says one\ntwo!"])
    assert page.turns() == ["one\ntwo!"]
    page.run("document.querySelector('#toggle-panel').focus()")
    page.press(Keys.TAB)
    assert page.run("return document.activeElement !== document.body")
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_last_answer_can_be_had_again(page: Page) -> None:
    page.ask("hello")
    page.all("[data-act=again]")[0].click()
    page.until(lambda: len(page.canned.asked) == 2 and page.the("send").is_displayed())
    first, second = page.canned.asked
    assert (first["messages"], len(page.turns())) == (second["messages"], 1)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ("400", "Refused: 400. Try: a smaller max_tokens"),
        ("401", "The server wants its API key. Enter it under Settings, then try again."),
        ("429", "The server has as many answers at work as it takes. Try again in 3 s."),
        ("500", "Refused: 500 Try again; the server's terminal says more."),
    ],
)
def test_a_refusal_is_shown_where_the_answer_would_be(page: Page, status: str, sentence: str) -> None:
    page.ask(status)
    assert page.all(".answer .trouble")[0].text == f"{sentence} Try again"
    assert page.the("key").is_displayed() == (status == "401")


def test_a_server_that_is_gone_is_told_and_comes_back(browser: Any, page: Page) -> None:
    browser.execute_cdp_cmd("Network.enable", {})
    gone = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", gone)
    page.ask("hello")
    assert page.all(".answer .trouble")[0].text.startswith("The server does not answer. See whether `qdist web`")
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", gone | {"offline": False})
    page.all(".trouble [data-act=again]")[0].click()
    page.until(lambda: page.said() == [f"{ADAPTER} says hello"])


def test_what_is_exported_is_data_to_train_on(page: Page) -> None:
    page.the("system").send_keys("Be brief.")
    page.ask("one")
    page.ask("429")
    script = """
    const done = arguments[0], make = URL.createObjectURL;
    URL.createObjectURL = (blob) => { blob.text().then(done); return make(blob); };
    document.getElementById('export').click()"""
    text = page.driver.execute_async_script(script)
    (line,) = text.splitlines()
    (found,) = conversations(json.loads(line), where="line 1")
    assert [(turn.role, turn.text) for turn in found.turns] == [
        ("system", "Be brief."), ("user", "one"), ("assistant", f"{ADAPTER} says one"),
    ]  # fmt: skip


def test_a_conversation_is_still_there_after_a_reload_and_new_begins_another(page: Page) -> None:
    page.ask("hello")
    page.driver.refresh()
    page.until(lambda: page.said() == [f"{ADAPTER} says hello"])
    page.the("new").click()
    assert (page.turns(), page.the("welcome").is_displayed()) == ([], True)


def test_the_runs_curves_are_shown_and_its_held_out_questions_offered(page: Page) -> None:
    assert page.the("name").text == ADAPTER
    assert [each.get_attribute("data-chart") for each in page.all("#charts figure")] == ["loss", "speed"]
    assert len(page.all("#charts path.curve")) == 4
    (offered,) = page.all("#questions button")
    assert offered.text == "What is <b>held out</b>?"
    offered.click()
    assert page.the("question").get_attribute("value") == "What is <b>held out</b>?"


def test_screen_readers_hear_whole_sentences_and_the_end(page: Page) -> None:
    assert page.run("return [...document.querySelectorAll('[role=log], [role=status]')].map((e) => e.ariaLive)") == [
        "off",
        "polite",
    ]
    page.ask("hello")
    page.until(
        lambda: page.run("return document.getElementById('status').textContent").endswith(f"{ADAPTER} answered.")
    )
    unnamed = """
    return [...document.querySelectorAll('button, input, select, textarea')].filter((each) =>
      !(each.textContent.trim() || each.ariaLabel || (each.labels && each.labels.length))).map((each) => each.id)"""
    assert page.run(unnamed) == []


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1400, "light")])
def test_no_screen_is_too_narrow_or_dark(page: Page, width: int, scheme: str) -> None:
    pretend(page.driver, width, 760, scheme)
    page.ask("wide")
    across = """
    const parts = document.querySelectorAll('html, .talk, #scroller, .composer');
    return Math.max(...[...parts].map((part) => part.scrollWidth))"""
    assert page.run(across) <= width
    shown = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every((v) => v > 200)"
    assert page.run(shown) == (scheme == "light")
    other = "dark" if scheme == "light" else "light"
    page.run(
        "const s = document.getElementById('theme'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input', {bubbles: true}))",
        other,
    )
    assert page.run(shown) == (other == "light")
    assert page.complaints() == []
