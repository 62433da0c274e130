"""A headless Chromium that is driven over two pipes by its DevTools protocol: no driver, no library, no port.

https://chromedevtools.github.io/devtools-protocol/ (``--remote-debugging-pipe``: JSON messages, each ended by
a zero byte, come in by file 3 and go out by file 4).
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

FLAGS = (
    "headless",
    "remote-debugging-pipe",
    "no-sandbox",
    "disable-gpu",
    "disable-dev-shm-usage",
    "disable-background-networking",
    "disable-component-update",
    "disable-extensions",
    "disable-sync",
    "no-first-run",
    "no-default-browser-check",
    "no-proxy-server",
    "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
"""No sandbox: a container has no right to make one, and every page that is opened is ours."""

_PLACE_PIPES = (
    "import fcntl, os, sys\n"
    "ours = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]\n"
    "os.dup2(ours[0], 3), os.dup2(ours[1], 4)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)
"""Of a small Python that becomes the browser: the pipes get the numbers that it knows."""

_LIMIT = 120.0
"""Seconds, for hangs alone."""


def find() -> str | None:
    """The path of a Chromium that starts; None if there is none.

    A name may stand for an installer alone (``chromium-browser`` of Ubuntu).
    """
    paths = (path for name in NAMES if (path := shutil.which(name)))
    return next((path for path in paths if _starts(path)), None)


def _starts(path: str) -> bool:
    try:
        return not subprocess.run([path, "--version"], capture_output=True, timeout=_LIMIT).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


class PageError(RuntimeError):
    """A script failed in the page, or something did not come true there."""


class Browser:
    """One page at a time.

    Attributes:
      events: what the browser told of itself and of pages while they were the one, oldest first.
    """

    def __init__(self, program: str, folder: str):
        """Starts it.

        Args:
          program: as ``find`` gives it.
          folder: for its profile.
        """
        theirs, self._to = os.pipe()
        self._from, reply = os.pipe()
        command = [sys.executable, "-S", "-c", _PLACE_PIPES, str(theirs), str(reply), program]
        command += [f"--{flag}" for flag in FLAGS] + [f"--user-data-dir={folder}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, pass_fds=(theirs, reply), stdout=quiet, stderr=quiet, start_new_session=True
        )
        os.close(theirs)
        os.close(reply)
        self.events: list[dict[str, Any]] = []
        self._held, self._number, self._session, self._target = b"", 0, "", ""
        self._metrics: dict[str, Any] = {}
        self._new_tab()

    def _new_tab(self) -> None:
        """The page from now on; what one before still tells (of an answer that was late, say) is its own."""
        before, self._session = self._target, ""
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        if before:
            self.call("Target.closeTarget", targetId=before)
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        if self._metrics:
            self.call("Emulation.setDeviceMetricsOverride", **self._metrics)

    # -- the protocol

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a command of the protocol gives.

        Raises:
          PageError: the browser refuses it, or has ended.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self._number:
            if found.get("sessionId", self._session) == self._session:
                self.events.append(found)
        if "error" in found:
            raise PageError(f"{method}: {found['error']['message']}")
        return found["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._from], [], [], _LIMIT)
            more = os.read(self._from, 1 << 20) if ready else b""
            if not more:
                raise PageError("the browser has ended" if ready else "the browser does not answer")
            self._held += more
        whole, _, self._held = self._held.partition(b"\0")
        return json.loads(whole)

    # -- the page

    def open(self, url: str) -> None:
        """A page in a new tab, with nothing of the one before but what the browser keeps."""
        self._new_tab()
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str, *arguments: Any) -> Any:
        """What an expression of JavaScript gives; ``arguments`` are its ``args``."""
        function = f"(async (args) => ({script}))({json.dumps(arguments)})"
        found = self.call("Runtime.evaluate", expression=function, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise PageError(json.dumps(found["exceptionDetails"])[:2000])
        return found["result"].get("value")

    def until(self, script: str, *arguments: Any) -> Any:
        """What an expression gives as soon as that is true.

        Raises:
          PageError: it does not become true.
        """
        end = time.monotonic() + _LIMIT
        while not (found := self.run(script, *arguments)):
            if time.monotonic() > end:
                raise PageError(f"this did not come true: {script}; {self.run('document.body.innerText')}")
            time.sleep(0.02)
        return found

    def write(self, text: str) -> None:
        """As somebody who types where the cursor is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key that is named by what it does ("Enter", "Escape")."""
        code = {"Enter": 13, "Escape": 27}[key]
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **fields, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        """Pixels of this page and those after it; ``mobile``: as a phone lays it out."""
        self._metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **self._metrics)

    def picture(self, path: Path) -> None:
        """What is seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def requested(self) -> list[str]:
        """Addresses of all that pages asked for so far."""
        self.run("0")  # what has been told by now
        seen = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in seen]

    def complaints(self) -> list[str]:
        """Errors that the browser wrote into its console: scripts that failed, policies that were broken."""
        self.run("0")
        entries = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        thrown = [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        return [e["text"] for e in entries if e["level"] == "error"] + [json.dumps(t) for t in thrown]

    def close(self) -> None:
        """Ends it with all its processes."""
        with contextlib.suppress(PageError, OSError):
            self._session = ""
            self.call("Browser.close")
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


@contextlib.contextmanager
def opened(program: str) -> Iterator[Browser]:
    """A browser until the block ends."""
    with tempfile.TemporaryDirectory(prefix="qwen3-moe-chromium-", ignore_cleanup_errors=True) as folder:
        browser = Browser(program, folder)
        try:
            yield browser
        finally:
            browser.close()


def texts(browser: Browser, selector: str) -> Sequence[str]:
    """The texts of all elements that a selector finds."""
    return browser.run("[...document.querySelectorAll(args[0])].map((e) => e.textContent)", selector)
