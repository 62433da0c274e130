"""The chat page in headless Chromium, end to end: streams, markup that must not run, stop, edit, pictures.

    python -m scripts.check_page [--folder DIR]    (needs chromium and chromedriver on the path)

Talks WebDriver over loopback, without a library. Writes page-wide.png and page-360.png.
"""

import argparse
import base64
import json
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.testing.http_server import quick_start, running
from qwen3_moe_jax.testing.scripted_model import build_scripted_model
from qwen3_moe_jax.testing.scripts import HELLO

DRIVER_PORT = 9515
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run")
FLAGS += ("disable-background-networking", "disable-component-update", "disable-sync")


class Browser:
    """One session of chromedriver."""

    def __init__(self, width: int, profile: str):
        flags = [f"--{f}" for f in FLAGS] + [f"--user-data-dir={profile}", f"--window-size={width},800"]
        options = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        wanted = {"alwaysMatch": options}
        self._session = ""
        self._session = "/" + self.call("POST", "", {"capabilities": wanted})["sessionId"]

    def call(self, method: str, path: str, body: object = None) -> object:
        data = None if body is None and method != "POST" else json.dumps(body or {}).encode()
        url = f"http://127.0.0.1:{DRIVER_PORT}/session{self._session}{path}"
        request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
        return json.load(urllib.request.urlopen(request, timeout=60))["value"]

    def run(self, script: str, *arguments: object) -> object:
        """What a script in the page returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, seconds: float = 300) -> object:
        """Waits for a script to return something true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            if time.monotonic() > end:
                raise SystemExit(f"this did not come true: {script}")
            time.sleep(0.1)
        return found

    def size(self, width: int, height: int) -> None:
        """Sets the page's own size, also below what a window may have."""
        parameters = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": parameters}
        self.call("POST", "/goog/cdp/execute", command)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def close(self) -> None:
        self.call("DELETE", "")


SAY = "document.getElementById('text').value = arguments[0]; document.getElementById('ask').requestSubmit()"
QUIET = (
    "return document.getElementById('stop').hidden && document.querySelectorAll('.assistant').length === %d"
)
LAST = "return [...document.querySelectorAll('.assistant > .body')].at(-1).textContent"


WEATHER = [{"name": "get_current_weather", "parameters": {"type": "object", "properties": {}}}]


def retry(browser: Browser) -> None:
    """The last answer again."""
    browser.run("[...document.querySelectorAll('.assistant')].at(-1).querySelector('button').click()")
    browser.until(QUIET % 3)
    assert "21" in browser.run(LAST)


def tools(browser: Browser) -> None:
    """A call is shown, takes a result, and the model goes on."""
    browser.run("document.getElementById('tools').value = arguments[0]", json.dumps(WEATHER))
    browser.run(SAY, "weather")
    browser.until(QUIET % 4)
    call = "[...document.querySelectorAll('details.call')].at(-1)"
    assert "San Francisco" in browser.run(f"return {call}.textContent")
    browser.run(f"{call}.querySelector('input').value = 'rain'; {call}.querySelector('form').requestSubmit()")
    browser.until(QUIET % 5)
    assert browser.run(LAST) == "The tool answered, and so do I."
    browser.run("document.getElementById('tools').value = ''")


def check(browser: Browser, url: str, folder: Path) -> None:
    browser.size(900, 800)
    browser.call("POST", "/url", {"url": url})
    browser.until("return document.getElementById('model').textContent === 'scripted'")
    browser.run(
        "document.getElementById('experts').open = true;"
        "window.ran = 0; window.alert = () => { window.ran = 1 }"
    )
    browser.run(SAY, "[[hello]]")
    browser.until(QUIET % 1)
    assert browser.run(LAST) == HELLO, browser.run(LAST)
    browser.run(SAY, "[[markup]]")
    browser.until(QUIET % 2)
    assert (
        browser.run(
            "return document.querySelectorAll('#talk img, #talk svg, #talk a[href^=javascript]').length"
        )
        == 0
    )
    assert browser.run("return window.ran") == 0
    assert browser.run("return document.querySelectorAll('#talk pre code').length") == 1
    browser.run(SAY, "[[thinking]]")
    browser.until(QUIET % 3)
    assert "17" in browser.run("return document.querySelector('details.thinking').textContent")
    browser.until("return document.getElementById('heatmap').width === 2")
    figures = browser.run("return document.getElementById('figures').textContent")
    assert "tokens/s" in figures, figures
    assert "of 1024 tokens" in figures, figures
    retry(browser)
    tools(browser)
    browser.picture(folder / "page-wide.png")
    browser.run(SAY, "[[forever]]")
    browser.until("return !document.getElementById('stop').hidden")
    browser.until(
        "return [...document.querySelectorAll('.assistant > .body')].at(-1).textContent.length > 20"
    )
    browser.run("document.getElementById('stop').click()")
    browser.until(QUIET % 6)
    browser.run("[...document.querySelectorAll('.user button')].at(-1).click()")
    assert browser.run("return document.getElementById('text').value") == "[[forever]]"
    browser.size(360, 740)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    browser.picture(folder / "page-360.png")
    log = browser.call("POST", "/se/log", {"type": "browser"})
    assert not [entry for entry in log if "Content Security Policy" in entry["message"]], log


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the pictures go")
    args = parser.parse_args()
    driver = subprocess.Popen(["chromedriver", f"--port={DRIVER_PORT}"], stdout=subprocess.DEVNULL)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            model = Path(folder) / "model.gguf"
            model.write_bytes(build_scripted_model())
            with running(Settings(port=0, name="scripted"), quick_start(model)) as server:
                time.sleep(1)
                browser = Browser(900, f"{folder}/profile")
                try:
                    check(browser, server.url, args.folder)
                finally:
                    browser.close()
    finally:
        driver.terminate()
        driver.wait()
    print("the page works")


if __name__ == "__main__":
    main()
