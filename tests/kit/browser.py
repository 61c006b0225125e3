"""
A real Chromium without a window, by the DevTools protocol over two pipes
(https://chromedevtools.github.io/devtools-protocol/).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Errors that a page wrote to the console: resources that were blocked or are not there, too.
_ERRORS: Final = ("Log.entryAdded", "Runtime.exceptionThrown")


class Browser:
    """One tab."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._number, self._rest = 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        attached = self.do("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.do(f"{domain}.enable")
        # Their width would be taken from the page's.
        self.do("Emulation.setScrollbarsHidden", hidden=True)

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command; events that come before it are kept."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._back, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def open(self, url: str, *, width: int, dark: bool = False) -> None:
        """Load *url* at a width in CSS pixels, in the light or dark scheme."""
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.do("Page.navigate", url=url)
        while not any(each.get("method") == "Page.loadEventFired" for each in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, which the page's own rules do not bind."""
        found = self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def errors(self) -> list[str]:
        """What the console has of errors since the last page was opened."""
        return [json.dumps(each) for each in self.events if each.get("method") in _ERRORS]

    def requested(self) -> list[str]:
        """The URLs that were asked for since the last page was opened."""
        return [
            each["params"]["request"]["url"]
            for each in self.events
            if each.get("method") == "Network.requestWillBeSent"
        ]

    def screenshot(self, path: Path) -> None:
        """The whole page, as PNG."""
        shot = self.do("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(home: Path) -> Iterator[Browser]:
    """A Chromium with its profile below *home*."""
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    # The protocol's pipes are 3 and 4. The shell of Debian knows no descriptors of two digits.
    script = f'exec 3<&{their_in} 4>&{their_out}; exec "$@"'
    command = (
        "chromium", "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run",
        # Its own sandbox needs namespaces that root and containers have not.
        "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={home}/chromium",
        "about:blank",
    )  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(their_in, their_out), env=os.environ | {"HOME": str(home)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(their_in)
    os.close(their_out)
    try:
        yield Browser(our_out, our_in)
    finally:
        process.terminate()
        process.wait(60)
        os.close(our_out)
        os.close(our_in)
