import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from fleet_device.api.app import create_app
from fleet_device.api.listening import ApiServer, listen
from fleet_device.api.status import render_status
from tests.fleet_device.api.client import ask, error
from tests.fleet_device.api.conftest import Make
from tests.support.device_status import device_status
from tests.support.keys_file import keys_file
from tests.support.memory_device import settings

HOSTILE = "</pre></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7 * 7 }}\u202e\x1b[2J"


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_style = False
        self.style = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"
        self.text += "" if tag in {"a", "span"} else " "

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data
        else:
            self.text += data


def words(page: str) -> str:
    return " ".join(Elements(page).text.split())


def poisoned(value: Any) -> Any:
    """Replace every string by hostile text."""
    match value:
        case str():
            return HOSTILE
        case dict():
            return {key: poisoned(each) for key, each in value.items()}
        case list():
            return [poisoned(each) for each in value]
        case _:
            return value


def test_the_page_says_how_the_device_is(app: Starlette) -> None:
    response = ask(app, "GET", "/")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    said = words(response.text)
    for part in (
        "device-1 · fleet home",
        "ok Texts can be written.",
        "toy (Q4_0)",
        "Context 2,048 tokens",
        "A draft token takes 11.3 ms",
        "127.0.0.1:1883, connected",
        "Edge edge-1 online, toy-target, software 9.9",
        "Round trip 42 ms from a draft to its verdict",
        "Acceptance 0.81 of the draft tokens that were tested",
        "While no edge answers texts fail Plan",
        "Plan ahead: Drafting ahead 31.0 tokens/s with 5 a draft.",
        "Queue 1 of at most 2 texts being written, 2 waiting",
        "Since 2026-01-02 00:00 UTC 1,234 tokens in 3 texts",
    ):
        assert part in said, part


def test_unverified_tokens_are_shown_as_such() -> None:
    page = render_status(device_status(offline="local", unverified=1234))
    said = words(page)
    assert "1,234" in said


def test_whatever_a_text_or_a_name_says_is_text() -> None:
    plain = device_status(reason="x")
    page, usual = Elements(render_status(poisoned(plain))), Elements(render_status(plain))
    # Except classes of good and bad words, which hostile words are not.
    names = [tag for tag, _ in page.found]
    assert names == [tag for tag, _ in usual.found]
    assert {"script", "img"}.isdisjoint(names)
    assert {name for _, attributes in page.found for name in attributes} <= {
        "class", "charset", "content", "href", "http-equiv", "lang", "name"
    }  # fmt: skip
    assert page.style == usual.style
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in page.text
    assert "\x1b" not in page.text


def test_the_browser_is_told_to_run_and_to_load_nothing_but_the_page_s_own_style(app: Starlette) -> None:
    response = ask(app, "GET", "/")
    page = Elements(response.text)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in response.headers["content-security-policy"].split(";"))
    assert rules == {
        "default-src": "'none'", "style-src": f"'sha256-{digest}'", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'",
    }  # fmt: skip
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?:|//|url\(|@import|\sstyle=", response.text)
    assert [attributes["href"] for tag, attributes in page.found if tag == "a"] == ["/status"]
    assert "prefers-color-scheme: dark" in page.style


def test_the_same_is_there_as_json(app: Starlette) -> None:
    response = ask(app, "GET", "/status")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == device_status()


def test_both_are_guarded_as_everything_else(make: Make, tmp_path: Path) -> None:
    app, _ = make(applications=keys_file(tmp_path))
    for path in ("/", "/status"):
        assert error(ask(app, "GET", path))["code"] == "invalid_api_key"
        assert ask(app, "GET", path, headers={"Authorization": "Bearer sesame"}).status_code == 200
        hostile = ask(app, "GET", path, headers={"Host": "evil.example", "Authorization": "Bearer sesame"})
        assert (hostile.status_code, error(hostile)["code"]) == (421, "wrong_host")
        assert ask(app, "POST", path, headers={"Authorization": "Bearer sesame"}).status_code == 405


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
def test_a_browser_applies_the_style_and_runs_nothing(make: Make, tmp_path: Path) -> None:
    _, backend = make()
    backend.status = lambda: poisoned(device_status())  # type: ignore[method-assign]
    server = ApiServer(create_app(backend, settings()), listen())
    server.start()
    try:
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom",
             "--enable-logging=stderr", server.address],
            capture_output=True, text=True, timeout=120.0, check=True,
        )  # fmt: skip
    finally:
        server.stop()
    page = Elements(done.stdout)
    assert "<script>alert(1)</script>" in page.text
    assert "Content Security Policy" not in done.stderr
