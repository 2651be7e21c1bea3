"""A headless Chromium that a test can ask questions: its debugging protocol over two pipes."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOOK = Path(__file__).with_name("page_checks.js").read_text(encoding="utf-8")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW = "no Chromium on the PATH; install one (Debian: apt-get install chromium) to check the page in it"
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
]


def find_chromium() -> str | None:
    """Path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. messages: what it wrote to its console; requests: every address it asked for."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._buffer, self._number = write, read, b"", 0
        self._session: str | None = None
        self.messages: list[str] = []
        self.requests: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            received = os.read(self._read, 1 << 16)
            if not received:
                raise RuntimeError("the browser is gone")
            self._buffer += received
        message, self._buffer = self._buffer.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        method, values = found.get("method"), found.get("params", {})
        if method == "Log.entryAdded":
            self.messages.append(values["entry"]["text"])
        if method == "Runtime.exceptionThrown":
            self.messages.append(values["exceptionDetails"]["text"])
        if method == "Runtime.consoleAPICalled":
            self.messages.append(str(values["args"]))
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        return found

    def open(self, url: str, width: int, dark: bool = False) -> None:
        """Load a page at a width in CSS pixels and wait until it is there."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def tabbed(self, limit: int) -> list[str]:
        """Where the Tab key leads from the top of the page, each place once; '' for one whose focus is not seen.

        Args:
            limit: presses.
        """
        self.run("window.places = [...document.querySelectorAll('*')]; document.activeElement.blur()")
        found: list[str] = []
        for _ in range(limit):
            self.press("Tab", 9)
            place = str(self.run(_FOCUSED))
            if place in found:
                break
            found.append(place)
        return found

    def press(self, key: str, code: int) -> None:
        """Press and let go of a key; code: its Windows virtual key code."""
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


_FOCUSED = """(() => {
  const place = document.activeElement;
  const seen = getComputedStyle(place).outlineStyle !== 'none';
  return seen ? `${places.indexOf(place)} ${place.tagName} ${place.className}` : '';
})()"""


@contextmanager
def chromium(binary: str, profile: Path, seconds: float = 60) -> Iterator[Browser]:
    """A browser with a profile of its own; killed if it takes longer than `seconds`."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def pipes() -> None:  # the protocol has them at 3 and 4
        # Copied first to numbers that neither of them has.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (to_browser[0], from_browser[1])]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [binary, *_FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=pipes,
            close_fds=False,
            stdout=log,
            stderr=log,
        )
    os.close(to_browser[0])
    os.close(from_browser[1])
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        yield Browser(to_browser[1], from_browser[0])
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
