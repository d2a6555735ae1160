"""A headless Chromium, driven by the DevTools protocol over a pipe: no port, so it also works inside a host of a lab.

    with Browser() as browser:
        tab = browser.open("http://127.0.0.1:8077/", width=320, height=640)
        tab.wait("document.title.startsWith('weft')", "the page is there")

Facts of the protocol: https://chromedevtools.github.io/devtools-protocol/ and Chromium's --remote-debugging-pipe:
messages end with a NUL, descriptor 3 is read and 4 written by it.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.process import LabError

_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--font-render-hinting=none",
    "--remote-debugging-pipe",
)
_ANSWER_SECONDS = 30.0
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """:param enter: makes of a command one that runs where the page can be reached, as `Host.enter`."""

    def __init__(self, enter: Callable[[Sequence[str]], list[str]] = list) -> None:
        self._enter = enter
        self._ids = count(1)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        """What Chromium has said by itself, in order."""

    def __enter__(self) -> Self:
        program = shutil.which("chromium")
        if program is None:
            raise LabError("there is no chromium (lab/setup.sh installs it)")
        self._folder = tempfile.mkdtemp(prefix="weft-browser-")
        theirs, self._in = os.pipe()
        self._out, others = os.pipe()
        # The shell puts the pipe's ends where Chromium wants them, by way of numbers that are neither.
        shell = f'exec {theirs + 20}<&{theirs} {others + 20}>&{others}; exec "$@" 3<&{theirs + 20} 4>&{others + 20}'
        argv = self._enter(["bash", "-c", shell, "chromium", program, *_FLAGS, f"--user-data-dir={self._folder}"])
        with open(f"{self._folder}/log", "wb") as log:
            self._process = subprocess.Popen(argv, pass_fds=(theirs, others), stdout=log, stderr=log)
        os.close(theirs)
        os.close(others)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._in)  # this ends it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1) -> Tab:
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        tab = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height, scale=scale)
        tab.emulate(dark=dark)
        tab.call("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete' && document.body !== null", f"{url} is there")
        return tab

    def call(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(_ANSWER_SECONDS, method)
            if answer.get("id") != number:
                self.events.append(answer)
            elif "error" in answer:
                raise LabError(f"chromium refuses {method}: {answer['error']['message']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self, timeout: float, what: str) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._out, 1 << 20) if ready else b""
            if not part:
                log = Path(self._folder, "log").read_text(errors="replace")[-1500:]
                raise LabError(f"chromium does not answer {what}; its log ends with:\n{log}")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


class Tab:
    """One page."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, parameters, self._session)

    def close(self) -> None:
        self._browser.call("Target.closeTarget", {"targetId": self._target})

    def resize(self, width: int, height: int, *, scale: float = 1) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def emulate(self, *, dark: bool = False, still: bool = False) -> None:
        """What the user prefers."""
        wishes = {"color-scheme": "dark" if dark else "light", "reduced-motion": "reduce" if still else "no-preference"}
        features = [{"name": f"prefers-{name}", "value": value} for name, value in wishes.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of its promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if failure := answer.get("exceptionDetails"):
            raise LabError(f"{expression}: {failure.get('exception', failure).get('description', failure['text'])}")
        return answer["result"].get("value")

    def wait(self, condition: str, what: str, timeout: float = 15) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + timeout
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise LabError(f"not within {timeout:g} s: {what}; the page says:\n{self.text()[:1500]}")
            time.sleep(0.05)

    def text(self) -> str:
        """What a person reads."""
        return str(self.evaluate("document.body.innerText"))

    def press(self, *keys: str) -> None:
        for key in keys:
            code = _KEYS.get(key, ord(key[0].upper()))
            said = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            if key == "Enter" or len(key) == 1:
                said["text"] = "\r" if key == "Enter" else key
            self.call("Input.dispatchKeyEvent", type="keyDown", **said)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self) -> list[str]:
        """Errors and warnings on the console, uncaught ones, and violations of the content security policy."""
        found = []
        for event in self._mine():
            told = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"].get("exception", told)))
            elif event["method"] == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(str(told["args"]))
            elif event["method"] == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        return found

    def requests(self) -> list[str]:
        """URLs of all that was fetched or tried."""
        return [e["params"]["request"]["url"] for e in self._mine() if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """As PNG; `whole`: with what is below the fold."""
        if whole:
            height = self.evaluate("document.documentElement.scrollHeight")
            size = self.evaluate("[innerWidth, devicePixelRatio]")
            self.resize(size[0], height, scale=size[1])
            self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _mine(self) -> list[dict[str, Any]]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]
