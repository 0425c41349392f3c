import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette

from fleet_device.api.listening import ApiServer, listen
from fleet_device.errors import EdgeUnavailable
from tests.fleet_device.api.client import ask
from tests.fleet_device.api.conftest import Make
from tests.support.chromium import Chromium, Tab
from tests.support.keys_file import keys_file
from tests.support.letter_codec import LetterCodec
from tests.support.memory_device import ScriptedAgent

SHOTS = os.environ.get("FLEET_SCREENSHOTS")
"""Folder for screenshots."""

_BROWSER = [pytest.mark.slow, pytest.mark.xdist_group("chromium")]
_ANSWERS = "[...document.querySelectorAll('.assistant')]"


def test_the_page_needs_no_key_and_runs_no_code_but_its_own(make: Make, tmp_path: Path) -> None:
    app, _ = make(applications=keys_file(tmp_path))
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        sent = ask(app, "GET", path)
        assert (sent.status_code, sent.headers["content-type"].partition(";")[0]) == (200, kind)
        assert "unsafe" not in sent.headers["content-security-policy"]
    assert "style=" not in ask(app, "GET", "/").text
    assert ask(app, "GET", "/status").status_code == 401


def test_the_page_can_be_switched_off(make: Make) -> None:
    app, _ = make(api_page=False)
    assert {ask(app, "GET", path).status_code for path in ("/", "/page.js")} == {404}


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    server = ApiServer(app, listen())
    server.start()
    try:
        yield server.address
    finally:
        server.stop()


def press(tab: Tab, key: str, **more: object) -> None:
    for kind in ("keyDown", "keyUp"):
        tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)


def send(tab: Tab, question: str) -> None:
    """Ask by keyboard alone: the field for questions is reached by its skip link, or has the focus already."""
    tab.evaluate("document.getElementById('question').focus()")
    tab.call("Input.insertText", text=question)
    press(tab, "Enter", windowsVirtualKeyCode=13, text="\r")


def finished(tab: Tab, answers: int = 1) -> None:
    tab.until(f"{_ANSWERS}.length === {answers} && document.getElementById('stop').disabled")


def keep(tab: Tab, name: str) -> None:
    if SHOTS:
        tab.screenshot(Path(SHOTS) / f"chat-{name}.png")


class TestBrowser:
    pytestmark = _BROWSER

    @pytest.mark.parametrize(("width", "height", "dark"), [(1280, 800, False), (390, 844, False), (390, 844, True)])
    def test_an_answer_shows_where_its_tokens_come_from(
        self, make: Make, chromium: Chromium, width: int, height: int, *, dark: bool
    ) -> None:
        app, _ = make(ScriptedAgent(batches=((1, 2, 3), (1,)), alone=(1,)))
        tab = chromium.tab(width=width, height=height, dark=dark)
        with served(app) as address:
            tab.goto(address)
            send(tab, "Why?")
            finished(tab)
            origins = f"{_ANSWERS}[0].querySelectorAll('[title]')"
            assert tab.evaluate(f"[...{origins}].map((each) => each.className)") == ["drafted", "bonus", "unverified"]
            assert "unverified" in tab.evaluate(f"{_ANSWERS}[0].querySelector('.figures').textContent")
            assert tab.evaluate("document.querySelectorAll('#facts dd').length") == 11
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.axe() == []
            keep(tab, f"{width}{'-dark' if dark else ''}")
            tab.goto(address)
            assert tab.evaluate(f"{_ANSWERS}.length") == 1, "the chat is kept in this browser"
        assert tab.complaints == []
        assert [url for url in tab.requested if not url.startswith((address, "about:", "data:"))] == []

    @pytest.mark.parametrize(("width", "height", "dark"), [(1280, 800, False), (390, 844, True)])
    def test_thinking_is_folded_beside_the_answer(
        self, make: Make, chromium: Chromium, width: int, height: int, *, dark: bool
    ) -> None:
        output = "Two and two.\n</think>\n\nIt is 4."
        app, _ = make(ScriptedAgent(batches=[[ord(letter)] for letter in output]), codec=LetterCodec("<think>"))
        tab = chromium.tab(width=width, height=height, dark=dark)
        with served(app) as address:
            tab.goto(address)
            send(tab, "What is 2 + 2?")
            finished(tab)
            thinking = f"{_ANSWERS}[0].querySelector('details')"
            assert not tab.evaluate(f"{thinking}.hidden || {thinking}.open")
            assert tab.evaluate(f"{thinking}.querySelector('.thinking').textContent.trim()") == "Two and two."
            assert "Two" not in tab.evaluate(f"{_ANSWERS}[0].innerText")
            tab.evaluate(f"{thinking}.querySelector('summary').focus()")
            press(tab, "Enter", windowsVirtualKeyCode=13, text="\r")
            tab.until(f"{thinking}.open")
            assert "It is 4." in tab.evaluate(f"{_ANSWERS}[0].innerText")
            assert tab.axe() == []
            keep(tab, f"thinking-{width}{'-dark' if dark else ''}")

    def test_an_answer_is_stopped_and_asked_again_by_keyboard(self, make: Make, chromium: Chromium) -> None:
        gate = threading.Semaphore(1)
        app, backend = make(ScriptedAgent(batches=((1, 2), (3,)), gate=gate))
        tab = chromium.tab()
        with served(app) as address:
            tab.goto(address)
            send(tab, "Why?")
            tab.until(f"{_ANSWERS}[0]?.querySelector('[title]')")
            keep(tab, "during")
            press(tab, "Escape")
            finished(tab)
            assert "Stopped" in tab.evaluate(f"{_ANSWERS}[0].innerText")
            gate.release(100)
            tab.evaluate("document.getElementById('retry').focus()")
            press(tab, "Enter", windowsVirtualKeyCode=13, text="\r")
            tab.until(f"{_ANSWERS}[0].innerText.includes('tokens/s') && document.getElementById('stop').disabled")
            assert tab.evaluate("document.activeElement.id") == "question"
        first, second = (asked["prompt"] for asked in backend.agent.asked)
        assert first == second

    def test_a_failure_is_shown_and_can_be_tried_again(self, make: Make, chromium: Chromium) -> None:
        app, backend = make(ScriptedAgent(error=EdgeUnavailable("No edge answers; start one."), batches=()))
        tab = chromium.tab()
        with served(app) as address:
            tab.goto(address)
            send(tab, "Why?")
            finished(tab)
            assert "start one" in tab.evaluate(f"{_ANSWERS}[0].querySelector('.problem').innerText")
            keep(tab, "away")
            backend.agent.error, backend.agent.batches = None, ((1, 2),)
            tab.evaluate("document.getElementById('retry').click()")
            tab.until(f"!{_ANSWERS}[0].querySelector('.problem') && document.getElementById('stop').disabled")

    def test_markup_in_an_answer_stays_text(self, make: Make, chromium: Chromium) -> None:
        app, backend = make(ScriptedAgent(batches=((1,),)))
        backend.drafter.codec.piece = lambda _token: b"<img src=x onerror=alert(1)>"  # type: ignore[method-assign]
        tab = chromium.tab()
        with served(app) as address:
            tab.goto(address)
            send(tab, "<b>Why?</b>")
            finished(tab)
            assert tab.evaluate("document.querySelectorAll('#messages img, #messages b').length") == 0
            assert "<img" in tab.evaluate(f"{_ANSWERS}[0].innerText")
