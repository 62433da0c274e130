"""The chat page in a headless Chromium, as somebody sees it who types and clicks."""

import pytest

from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.testing import browser as chromium
from qwen3_moe_jax.testing.browser import texts
from qwen3_moe_jax.testing.fake_engine import FakeEngine
from qwen3_moe_jax.testing.http_server import quick_start, running
from qwen3_moe_jax.testing.scripts import HELLO
from tests.serve.waits import until

pytestmark = pytest.mark.browser

ANSWERS = ".assistant > .body"
QUIET = "document.getElementById('stop').hidden && document.querySelectorAll('.assistant').length === args[0]"
SPOKEN = "[...document.querySelectorAll('.assistant > .body')].at(-1)?.textContent.length > 20"
WEATHER = '[{"name": "get_current_weather", "parameters": {"type": "object", "properties": {}}}]'


@pytest.fixture(scope="module")
def browser():
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium on this machine: install the package chromium or google-chrome-stable")
    with chromium.opened(program) as found:
        yield found


@pytest.fixture
def page(browser, server):
    """A new chat, as wide as a window; what pages ask for and complain of is looked at in the end."""
    browser.events.clear()
    browser.size(900, 800)
    browser.open(server.url)
    browser.until("document.getElementById('model').textContent === 'scripted'")
    yield browser
    foreign = [url for url in browser.requested() if not url.startswith((f"{server.url}/", "data:"))]
    assert not foreign, "it loads something from elsewhere"
    assert not browser.complaints()


@pytest.fixture
def held(browser, model_files):
    """A page, its server, and its engine, which writes 60 tokens of an answer and then waits until it is told
    to go on: whatever is done meanwhile is done in mid-answer, however busy or quick the machine is."""
    start = quick_start(model_files["hermes"])
    engine = FakeEngine(start, holds_after=60)
    with running(Settings(port=0, name="held"), start, engine=engine) as server:
        browser.size(900, 800)
        browser.open(server.url)
        browser.until("document.getElementById('model').textContent === 'held'")
        yield browser, engine


def say(page, text, answers):
    """Types, presses Enter, and waits for the end of answer number ``answers``."""
    page.run("document.getElementById('text').focus()")
    page.write(text)
    page.press("Enter")
    page.until(QUIET, answers)


def click(page, selector, number=-1):
    page.run("[...document.querySelectorAll(args[0])].at(args[1]).click()", selector, number)


def button(page, name):
    """Clicks the last button of that name."""
    page.run(
        "[...document.querySelectorAll('button')].filter((b) => b.textContent === args[0]).at(-1).click()",
        name,
    )


def test_an_answer_says_what_it_took(page):
    say(page, "[[longer]]", 1)
    assert texts(page, ANSWERS) == [" ".join(f"word{i}" for i in range(60)) + "."]
    assert "tokens/s" in page.run("document.getElementById('figures').textContent")
    assert "of 1024 tokens" in page.run("document.getElementById('figures').textContent")
    say(page, "[[hello]]", 2)
    assert texts(page, ANSWERS)[1] == HELLO


def test_shift_and_enter_is_a_new_line_of_the_message(page):
    page.run("document.getElementById('text').focus()")
    page.write("[[hello]]")
    page.press("Enter", shift=True)
    page.write("second")
    page.press("Enter")
    page.until(QUIET, 1)
    assert page.run("document.querySelector('.user > .body').textContent") == "[[hello]]\nsecond"


def test_markup_of_the_model_is_text_and_code_is_coloured(page):
    page.run("window.ran = 0, window.alert = () => { window.ran = 1 }")
    say(page, "[[markup]]", 1)
    assert (
        page.run("document.querySelectorAll('#talk img, #talk svg, #talk a[href^=javascript]').length") == 0
    )
    assert page.run("window.ran") == 0
    assert "<img src=x onerror=alert(1)>" in texts(page, ANSWERS)[0]
    assert texts(page, "#talk strong") == ["bold"]
    assert texts(page, "#talk pre code") == ["print(1)"]
    assert texts(page, "#talk pre code .num") == ["1"]


def test_stop_keeps_what_is_written_and_frees_the_slot(held):
    page, engine = held
    page.run("document.getElementById('text').focus()")
    page.write("anything")
    page.press("Enter")
    page.until(SPOKEN)  # an answer comes while it is written
    until(lambda: engine.is_held)
    assert (engine.active, len(engine.scheduler.running)) == (1, 1)
    click(page, "#stop")
    page.until(QUIET, 1)
    until(lambda: not engine.active)
    assert not engine.scheduler.running, "the slot is not free"
    written = texts(page, ANSWERS)[0]
    assert len(written) > 20
    assert not texts(page, "#talk .error")
    engine.go_on()
    say(page, "more", 2)
    assert texts(page, ANSWERS)[0] == written
    assert len(texts(page, ANSWERS)[1]) > len(written), "this one was not stopped"


def test_a_message_is_edited_and_an_answer_tried_again(page):
    say(page, "[[hello]]", 1)
    say(page, "[[haiku]]", 2)
    button(page, "Retry")
    page.until(QUIET, 2)
    assert [t.split()[0] for t in texts(page, ANSWERS)] == ["Hello!", "An"]
    click(page, ".user button", 0)
    assert page.run("document.getElementById('text').value") == "[[hello]]"
    assert texts(page, ANSWERS) == []
    page.run("document.getElementById('text').select()")
    say(page, "[[haiku]]", 1)
    assert texts(page, ".user > .body") == ["[[haiku]]"]
    button(page, "New chat")
    assert not texts(page, ".message")


def test_thinking_is_folded(page):
    say(page, "[[thinking]]", 1)
    assert texts(page, "details.thinking > div") == ["First I think of 17, then of 4."]
    assert not page.run("document.querySelector('details.thinking').open")
    assert not page.run("document.querySelector('details.thinking > div').checkVisibility()")
    click(page, "details.thinking summary")
    assert page.run("document.querySelector('details.thinking > div').checkVisibility()")
    assert texts(page, ANSWERS)[0].endswith("The sum is 21.")


def test_a_call_is_shown_takes_a_result_and_the_model_goes_on(page):
    click(page, "#tool-box summary")
    page.run("document.getElementById('tools').focus()")
    page.write(WEATHER)
    say(page, "weather", 1)
    assert texts(page, "details.call summary") == ["Tool call: get_current_weather"]
    assert "San Francisco" in texts(page, "details.call pre")[0]
    page.run("document.querySelector('details.call input').focus()")
    page.write("rain")
    page.press("Enter")
    page.until(QUIET, 2)
    assert texts(page, "details.call .result") == ["rain"]
    assert texts(page, ANSWERS)[1] == "The tool answered, and so do I."
    page.run("document.getElementById('tools').value = 'no JSON'")
    say(page, "[[hello]]", 3)
    assert "Tools are left out" in page.run("document.getElementById('tools-note').textContent")


def test_experts_are_drawn_while_an_answer_is_written(held):
    page, engine = held
    page.run(
        "window.drawn = [], CanvasRenderingContext2D.prototype.putImageData = function (picture) {"
        " drawn.push([picture.height, picture.width, new Set(picture.data).size]) }"
    )
    click(page, "#experts summary")
    page.run("document.getElementById('text').focus()")
    page.write("anything")
    page.press("Enter")
    layers, experts, colours = page.until("drawn[0]")
    assert engine.active, "they are drawn when the answer has ended"
    click(page, "#stop")
    page.until(QUIET, 1)
    assert (layers, experts) == (1, 2), "of the fake engine"
    assert colours > 2, "the experts look alike"
    assert "layers (down) by experts (across)" in page.run(
        "document.getElementById('heatmap-note').textContent"
    )


def test_it_fits_a_phone(page):
    page.size(360, 740, mobile=True)
    for box in ("experts", "tool-box"):
        click(page, f"#{box} summary")
    page.run("document.getElementById('tools').focus()")
    page.write(WEATHER)
    for number, text in enumerate(("[[markup]]", "[[longer]]", "weather"), 1):
        say(page, text, number)
    page.run("[...document.querySelectorAll('details')].forEach((d) => { d.open = true })")
    assert page.run("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    wide = page.run(
        "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > 360.5"
        " && !e.closest('pre')).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert not wide
    for name in ("send", "text", "figures"):
        seen = page.run("document.getElementById(args[0]).getBoundingClientRect().toJSON()", name)
        assert seen["top"] >= 0, name
        assert seen["bottom"] <= 740, name


def test_what_a_page_says_when_it_has_gone_is_not_the_next_ones(browser, server):
    """Its last request may have been refused by a server that was ending."""
    browser.open(server.url)
    browser.run("setTimeout(() => { throw new Error('of the page before') }) && 0")
    browser.events.clear()
    browser.open(server.url)
    browser.until("document.getElementById('model').textContent === 'scripted'")
    assert not browser.complaints()
    browser.run("setTimeout(() => { throw new Error('its own') }) && 0")
    until(browser.complaints)


def test_an_address_cannot_ask_anything(page, server):
    page.open(f"{server.url}/?q=[[hello]]")
    page.until("document.getElementById('model').textContent === 'scripted'")
    assert not texts(page, ".message")


def test_the_policy_of_content_is_in_force(browser, server):
    """What a fault of the page could bring in does not run and reaches nobody."""
    browser.open(server.url)
    browser.run(
        "window.broken = [], "
        "addEventListener('securitypolicyviolation', (e) => broken.push(e.effectiveDirective))"
    )
    browser.run(
        "window.ran = 0, document.body.append(Object.assign(document.createElement('script'), "
        "{ textContent: 'window.ran = 1' }))"
    )
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', '<p style=\"color:red\" onclick=\"ran = 1\">x</p>')"
    )
    browser.run("document.body.lastElementChild.click()")
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'reached', (e) => e.name)") == "TypeError"
    browser.until("new Set(broken).size >= 4")
    assert set(browser.run("broken")) >= {
        "script-src-elem",
        "script-src-attr",
        "style-src-attr",
        "connect-src",
    }
    assert browser.run("window.ran") == 0


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser, model_files):
    start = quick_start(model_files["hermes"])
    with running(
        Settings(port=0, name="locked", api_keys=("right",)), start, engine=FakeEngine(start)
    ) as server:
        browser.open(server.url)
        for key in ("wrong", "right"):
            browser.until("document.getElementById('key-dialog').open")
            browser.run("document.getElementById('key').select()")
            browser.write(key)
            browser.press("Enter")
            browser.until(
                "!document.getElementById('key-dialog').open || sessionStorage.getItem('key') === args[0]",
                key,
            )
        browser.until("document.getElementById('model').textContent === 'locked'")
        kept = browser.run("[sessionStorage.getItem('key'), localStorage.length, document.cookie]")
        assert kept == ["right", 0, ""]
        say(browser, "anything", 1)
        assert not texts(browser, "#talk .error")


def test_a_server_that_fails_says_so_in_the_answer(browser, model_files):
    start = quick_start(model_files["hermes"])
    engine = FakeEngine(start, is_held=True)
    with running(Settings(port=0, name="mortal"), start, engine=engine) as server:
        browser.open(server.url)
        browser.run("document.getElementById('text').focus()")
        browser.write("anything")
        browser.press("Enter")
        until(lambda: engine.active)
        server.loop.call_soon_threadsafe(engine.die)
        browser.until(QUIET, 1)
        assert "engine" in texts(browser, "#talk .error")[0]
        button(browser, "Retry")
        browser.until(QUIET, 1)
        assert "try again later" in texts(browser, "#talk .error")[0]
