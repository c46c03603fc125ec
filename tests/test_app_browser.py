"""The Space in a real browser: as a visitor with a keyboard, a mouse or a phone uses it, and as one who means harm.

The page runs as a Space does: from a folder that holds the Space's files and nothing else, its model named by
`MODEL_ID`. `python tests/test_app_browser.py docs/space.png` takes the screenshot of the docs.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
WAIT = 60_000  # ms; a busy machine is slow
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}

# What Python runs first in the server: it notes every address outside this machine that is connected to.
GUARD = """
import os, socket
connect = socket.socket.connect
def guarded(self, address):
    if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
        with open(os.environ["OUTSIDE"], "a") as file:
            file.write(f"{address}\\n")
    return connect(self, address)
socket.socket.connect = guarded
"""


@dataclass(frozen=True)
class Served:
    """A running page.

    Args:
        url: where it is.
        log: what it has printed.
        outside: addresses outside this machine that it connected to.
    """

    url: str
    log: Path
    outside: Path


@contextmanager
def served() -> Iterator[Served]:
    """The page as a Space runs it."""
    with tempfile.TemporaryDirectory(prefix="space_") as name:
        folder = Path(name)
        shutil.copytree(ROOT / "space", folder / "space", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("app.py", "demo.py"):
            shutil.copy(ROOT / file, folder)
        (folder / "sitecustomize.py").write_text(GUARD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        page = Served(f"http://127.0.0.1:{port}/", folder / "log", folder / "outside")
        environment = {
            **os.environ,
            "MODEL_ID": str(ROOT),
            "PYTHONPATH": name,
            "OUTSIDE": str(page.outside),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "app.py", "--port", str(port)]
        with page.log.open("w") as log:
            server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(port, server, page.log)
            yield page
        finally:
            server.terminate()
            server.wait(30)


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the page answers."""
    for _ in range(2400):
        assert server.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"The page does not answer: {log.read_text()}")


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def space() -> Iterator[Served]:
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the path")
    with served() as page:
        yield page


@pytest.fixture(scope="module")
def browser(space: Served) -> Iterator[Any]:
    with browsing() as browser:
        yield browser


@contextmanager
def visiting(browser: Any, space: Served, viewport: dict[str, int] = DESKTOP, **options: Any) -> Iterator[Any]:
    """A fresh visit; behind it nothing may have left this machine and the console holds no error."""
    context = browser.new_context(viewport=viewport, **options)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    faults: list[str] = []
    page.on("request", lambda request: faults.append(request.url) if not is_local(request.url) else None)
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())  # type: ignore[func-returns-value]
    page.goto(space.url)
    page.get_by_label("Request", exact=True).wait_for()
    yield page
    context.close()
    assert faults == []


def is_local(url: str) -> bool:
    """Whether a request stays on this machine."""
    return urlsplit(url).scheme in ("data", "blob") or urlsplit(url).hostname == "127.0.0.1"


def ask(page: Any, text: str | None = None) -> Any:
    """Type a request if one is given, ask by Enter, and wait for what comes of it."""
    # A new result takes what was set on the elements of the last one off again.
    page.evaluate("document.querySelector('#sd-result .sd').dataset.last = ''")
    request = page.get_by_label("Request", exact=True)
    if text is not None:
        request.fill(text)
    request.press("Enter")
    page.locator("#sd-result .sd:not([data-last])").locator(".sd-cost, .sd-alert").wait_for()
    return page.locator("#sd-result")


def focused(page: Any) -> str:
    """The name of what has the focus."""
    return page.evaluate(
        "() => { const e = document.activeElement; return e.labels?.[0]?.innerText.split('\\n')[0]"
        " || e.getAttribute('aria-label') || e.innerText || e.tagName; }"
    ).strip()


def tab_to(page: Any, name: str) -> None:
    """Press Tab until something has the focus."""
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(focused(page))
        if seen[-1].startswith(name):
            return
    raise AssertionError(f"Tab does not reach {name!r} but {seen}")


def is_wider_than_the_screen(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


# ---------------------------------------------------------------- using it


def test_the_keyboard_alone_is_enough(browser: Any, space: Served) -> None:
    with visiting(browser, space) as page:
        tab_to(page, "Request")
        page.keyboard.press("Control+A")
        page.keyboard.type("wake me up at 7 am on monday")
        tab_to(page, "Tools")
        page.keyboard.press("Control+A")
        alarm = {
            "name": "set_alarm",
            "description": "Set an alarm",
            "parameters": {"type": "object", "properties": {"time": {"type": "string"}}, "required": ["time"]},
        }
        page.keyboard.insert_text(json.dumps([alarm]))
        page.get_by_text("set_alarm(time)").wait_for()
        page.keyboard.press("Control+Enter")
        result = page.locator("#sd-result")
        result.locator(".sd-cost").wait_for()
        text = result.inner_text()
        for words in ("The base calls set_alarm", "P(call) = ", "Scaffold", '"time"', "Draft and check", "Base alone"):
            assert words in text
        assert "The same tokens as the base alone." in text
        assert "set_alarm" in page.get_by_role("status").filter(has_text="The model calls").inner_text()
        tab_to(page, "Pause")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert int(outline.removesuffix("px")) >= 2, "the focus can be seen"
        page.keyboard.press("Space")
        assert focused(page) == "Play"
        tab_to(page, "Frame")
        page.keyboard.press("Home")
        assert result.locator(".sd-frame:visible b").inner_text() == "Scaffold"
        page.keyboard.press("ArrowRight")
        assert result.locator(".sd-frame:visible b").inner_text() == "Step 1"


def test_the_picture_moves_by_itself_and_can_be_stopped(browser: Any, space: Served) -> None:
    with visiting(browser, space) as page:
        result = ask(page)
        title = result.locator(".sd-frame:visible b")
        page.wait_for_function("document.querySelector('.sd-controls input').value > 1")
        page.get_by_role("button", name="Pause").click()
        stopped = title.inner_text()
        page.wait_for_timeout(1600)
        assert title.inner_text() == stopped
        page.get_by_role("slider", name="Frame").press("End")
        assert title.inner_text() == "Done"
        page.get_by_role("button", name="Replay").click()
        assert title.inner_text() == "Scaffold"
        page.get_by_role("button", name="One frame on").click()
        assert title.inner_text() == "Step 1"
        page.get_by_role("button", name="Play").click()
        ask(page, "Will it rain in Oslo?")  # a second picture takes the place of the first
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("slider", name="Frame").press("Home")
        assert title.inner_text() == "Scaffold"
        assert result.locator(".sd-frame:visible .sd-mask").count()
        page.get_by_role("button", name="One frame on").click()
        assert title.inner_text() == "Step 1"
        assert result.locator(".sd-frame:visible .sd-new").count()


def test_where_motion_is_not_wanted_nothing_moves(browser: Any, space: Served) -> None:
    with visiting(browser, space, reduced_motion="reduce") as page:
        result = ask(page)
        assert result.locator(".sd-frame:visible b").inner_text() == "Done"
        page.get_by_role("button", name="One frame back").click()
        before = result.locator(".sd-frame:visible").inner_html()
        page.wait_for_timeout(1600)
        assert result.locator(".sd-frame:visible").inner_html() == before
        assert page.evaluate("document.querySelector('#sd-result').getAnimations({subtree: true}).length") == 0


def test_examples_and_options_do_what_they_say(browser: Any, space: Served) -> None:
    with visiting(browser, space) as page:
        page.get_by_role("button", name="what can you do").click()
        page.get_by_text("The base talks").wait_for()
        page.get_by_role("button", name="Python functions").click()
        page.get_by_text("The base calls turn_on_light").wait_for()
        assert "def turn_on_light" in page.get_by_label("Tools").input_value()
        assert "turn_on_light(room)" in page.locator("#sd-tools-status").inner_text()
        page.get_by_role("button", name="Options of decoding").click()
        page.get_by_label("Draft alone").check()
        assert "Draft alone" in ask(page).locator(".sd-cost").inner_text()
        page.locator("#sd-result").get_by_text("What the base made of the draft").wait_for(state="detached")


def test_two_visitors_get_their_own_answers(browser: Any, space: Served) -> None:
    with visiting(browser, space) as one, visiting(browser, space) as other:
        one.get_by_label("Request").fill("Will it rain in Oslo?")
        other.get_by_label("Request").fill("Will it rain in Paris?")
        one.get_by_label("Request").press("Enter")
        other.get_by_label("Request").press("Enter")
        for page, city in ((one, "Oslo"), (other, "Paris")):
            page.locator("#sd-result .sd-cost").wait_for()
            assert city in page.locator("#sd-result .sd-code").inner_text()


# ---------------------------------------------------------------- what goes wrong


def test_faults_are_said_in_the_page(browser: Any, space: Served) -> None:
    with visiting(browser, space) as page:
        assert "The request is empty" in ask(page, "  ").inner_text()
        assert "at most 2,000" in ask(page, "word " * 500).inner_text()
        page.get_by_label("Tools").fill('[\n  {"name": }\n]')
        page.locator("#sd-tools-status").get_by_text("line 2, column 12").wait_for()
        assert "line 2, column 12" in ask(page, "Will it rain?").inner_text()
        page.get_by_label("Tools").fill("def f(x: Weather):\n    '''F.'''")
        page.locator("#sd-tools-status").get_by_text("type `Weather` has no schema").wait_for()
        schema = {"type": "object", "properties": {"a": {"anyOf": []}}}
        page.get_by_label("Tools").fill(json.dumps([{"name": "f", "parameters": schema}]))
        result = ask(page, "Will it snow?").inner_text()
        assert "/properties/a" in result
        assert "Traceback" not in result


def test_texts_of_visitors_stay_texts(browser: Any, space: Served) -> None:
    name = "<img src=x onerror=alert(1)>${alert(2)}{{value}}\"'</p>"
    schema = {"type": "object", "properties": {name: {"const": name}}, "required": [name]}
    with visiting(browser, space) as page:
        page.get_by_label("Tools").fill(json.dumps([{"name": name, "parameters": schema}]))
        page.locator("#sd-tools-status").get_by_text("<img src=x").wait_for()
        result = ask(page, f"Will it rain? {name}")
        page.wait_for_timeout(500)
        text = result.inner_text()
        if "The base calls" in text:
            assert "${alert(2)}{{value}}" in text
        assert page.locator("#sd-result img, #sd-result script, #sd-tools-status img, #sd-status img").count() == 0


# ---------------------------------------------------------------- how it looks


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Any, space: Served) -> None:
    with visiting(browser, space, PHONE, is_mobile=True, has_touch=True) as page:
        assert not is_wider_than_the_screen(page)
        page.get_by_role("button", name="wake me up").tap()
        page.locator("#sd-result .sd-cost").wait_for()
        page.wait_for_function("document.querySelector('#sd-result').getBoundingClientRect().top < innerHeight / 2")
        assert not is_wider_than_the_screen(page)
        ask(page, "Will it rain in " + "Llanfairpwllgwyngyll" * 5 + "?")
        assert not is_wider_than_the_screen(page)
        assert page.evaluate(SMALL_BUTTONS) == []


# Every text with less contrast than 4.5 to 1 against the nearest colour behind it (WCAG 2.2, 1.4.3).
LOW_CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => colour.slice(0, 3)
    .map((value) => value / 255)
    .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if ((colour[3] ?? 1) > 0.9) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), element = walk.currentNode.parentElement;
    const style = getComputedStyle(element);
    if (!text || style.visibility === "hidden" || element.getBoundingClientRect().width < 3) continue;
    const [a, b] = [light(numbers(style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""

# Every button that is hard to hit with a finger.
SMALL_BUTTONS = """() => [...document.querySelectorAll("button")]
  .filter((button) => button.offsetHeight && button.offsetHeight < 32)
  .map((button) => button.innerText)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(scheme: str, browser: Any, space: Served) -> None:
    with visiting(browser, space, color_scheme=scheme, reduced_motion="reduce") as page:
        page.get_by_role("button", name="Options of decoding").click()
        assert page.evaluate(LOW_CONTRAST) == []
        ask(page)
        page.evaluate("document.querySelectorAll('.sd-frame').forEach((frame) => (frame.hidden = false))")
        assert page.evaluate(LOW_CONTRAST) == []


# ---------------------------------------------------------------- afterwards


def test_the_server_has_asked_no_other_machine_and_logged_no_fault_and_no_request(space: Served) -> None:
    assert not space.outside.exists(), space.outside.read_text()
    log = space.log.read_text()
    assert "Running on local URL" in log
    assert "Traceback" not in log
    assert "rain" not in log


def screenshot(path: Path) -> None:
    """Take the picture of the docs: the third frame of the first example.

    Args:
        path: a PNG file.
    """
    with served() as space, browsing() as browser, visiting(browser, space, reduced_motion="reduce") as page:
        ask(page)
        page.get_by_role("slider", name="Frame").press("Home")
        page.get_by_role("button", name="One frame on").click()
        page.screenshot(path=path, full_page=True)


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]))
