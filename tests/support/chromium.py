"""Headless Chromium over its debugging pipe: pages as a browser shows them, and what it reports as errors."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from fleet_common.closing import Closing
from tests.support.needs import missing
from tests.support.waiting import PATIENCE_S

AXE = Path(__file__).parent.parent / "fleet_admin" / "dashboard" / "vendor" / "axe.min.js"


def chromium_path() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium(Closing):
    """A browser of its own profile; each `tab` begins with no cookies."""

    def __init__(self) -> None:
        path = chromium_path()
        assert path is not None
        self._profile = tempfile.mkdtemp(prefix="fleet-chromium-")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        arguments = [
            "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--no-first-run", "--disable-gpu",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb", "--disable-extensions",
            "--disable-background-networking", "--disable-component-update", "--no-proxy-server",
            f"--user-data-dir={self._profile}", "about:blank",
        ]  # fmt: skip
        # Chromium expects the pipe on descriptors 3 and 4, and Popen keeps the numbers.
        put = (
            f"import fcntl, os, sys; ends = ({to_browser}, {from_browser});"
            "a, b = (fcntl.fcntl(each, fcntl.F_DUPFD, 50) for each in ends);"
            "os.dup2(a, 3); os.dup2(b, 4); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", put, path, *arguments],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._answers: dict[int, Queue[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        self._contexts: list[str] = []
        self._number = 0
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def tab(self, *, width: int = 1280, height: int = 800, dark: bool = False) -> "Tab":
        context = self.call("Target.createBrowserContext")["browserContextId"]
        self._contexts.append(context)
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        self._tabs[session] = tab
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.size(width, height)
        tab.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        return tab

    def close_tabs(self) -> None:
        while self._contexts:
            self.call("Target.disposeBrowserContext", browserContextId=self._contexts.pop())
        self._tabs.clear()

    def call(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the debugging protocol and return its result."""
        answer: Queue[dict[str, Any]] = Queue()
        with self._lock:
            self._number += 1
            number = self._number
            self._answers[number] = answer
            message = {"id": number, "method": method, "params": parameters}
            if session is not None:
                message["sessionId"] = session
            os.write(self._write, json.dumps(message).encode() + b"\0")
        got = answer.get(timeout=PATIENCE_S)
        assert "error" not in got, (method, got["error"])
        result: dict[str, Any] = got["result"]
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _listen(self) -> None:
        kept = b""
        while piece := os.read(self._read, 1 << 20):
            *whole, kept = (kept + piece).split(b"\0")
            for text in whole:
                message = json.loads(text)
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                elif (tab := self._tabs.get(message.get("sessionId", ""))) is not None:
                    tab.happened(message["method"], message["params"])


@dataclass(slots=True)
class Tab:
    """A tab. `complaints` lists what the browser refused or what failed: scripts, policies, resources."""

    browser: Chromium
    session: str
    complaints: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    loaded: "Queue[None]" = field(default_factory=Queue)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, session=self.session, **parameters)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def happened(self, method: str, parameters: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self.loaded.put(None)
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.complaints.append(str(details.get("exception", {}).get("description", details["text"])))

    def goto(self, url: str) -> None:
        self.after_load(lambda: self.call("Page.navigate", url=url))

    def after_load(self, act: Callable[[], object]) -> None:
        while True:
            try:
                self.loaded.get_nowait()
            except Empty:
                break
        act()
        self.loaded.get(timeout=PATIENCE_S)

    def evaluate(self, expression: str) -> Any:
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def until(self, condition: str) -> None:
        check = f"() => Boolean({condition})"
        self.evaluate(
            f"new Promise((found, lost) => {{ const check = {check}; const began = Date.now();"
            f"const look = () => check() ? found(true) : Date.now() - began > {PATIENCE_S * 1000 // 2} ?"
            f" lost(new Error({json.dumps(condition)})) : setTimeout(look, 50); look(); }})"
        )

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        got = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(got["data"]))

    def axe(self) -> list[str]:
        """Return axe-core's findings about accessibility."""
        self.evaluate(AXE.read_text(encoding="utf-8") + ";0")
        found = self.evaluate(
            "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']})"
            ".then(all => all.violations.flatMap(each => each.nodes.map(node =>"
            " each.id + ': ' + node.html.slice(0, 200) + ' ' + (node.failureSummary || ''))))"
        )
        return list(found)


@pytest.fixture(scope="session")
def running_chromium() -> Iterator[Chromium]:
    if chromium_path() is None:
        missing("Chromium is not installed: apt install chromium.")
    with Chromium() as browser:
        yield browser


@pytest.fixture
def chromium(running_chromium: Chromium) -> Iterator[Chromium]:
    yield running_chromium
    running_chromium.close_tabs()
