import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fleet_admin.dashboard.app import PAGES
from fleet_edge.session_log.database import open_store
from tests.fleet_admin.dashboard.conftest import NOW
from tests.fleet_admin.dashboard.fleet_log import EVIL
from tests.fleet_edge.store import samples
from tests.support.chromium import Chromium, Tab

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chromium")]

NAMED = [
    "/devices/gateway-1",
    "/devices/evil",
    "/edges/edge-1",
    f"/sessions/{999:016x}?device=gateway-1",
    f"/sessions/{EVIL}",
]
"""Pages with a name in their path."""

SHOWN = [page for page in PAGES if page.method == "GET" and page.title and page.path != "/login"]
PATHS = NAMED + [page.path for page in SHOWN if "{" not in page.path]
SHOTS = os.environ.get("FLEET_SCREENSHOTS")
"""Folder for screenshots of all pages."""


_CHOSEN_IN_SIGHT = """[...document.querySelectorAll("nav [aria-current]")].every((each) => {
  const [own, nav] = [each, each.parentElement].map((one) => one.getBoundingClientRect());
  return own.left >= nav.left - 1 && own.right <= nav.right + 1;
})"""
_CLIPPED = """[...document.querySelectorAll("td.wrap")].filter((each) => each.scrollWidth > each.clientWidth + 1)
  .map((each) => each.innerText)"""
_OUT_OF_SIGHT = """[...document.querySelectorAll("td.wrap, td[colspan]")]
  .filter((each) => each.getBoundingClientRect().right > innerWidth).map((each) => each.innerText)"""


def keep(tab: Tab, path: str, name: str) -> None:
    if SHOTS:
        page = path.partition("?")[0].strip("/").replace("/", "-") or "overview"
        tab.screenshot(Path(SHOTS) / f"{page}-{name}.png", whole=True)


@pytest.mark.parametrize("path", PATHS)
def test_a_page_is_as_it_should_be(log_in_tab: Callable[..., Tab], served: str, path: str) -> None:
    tab = log_in_tab()
    for name, width, height in (("wide", 1280, 800), ("phone", 390, 844)):
        tab.size(width, height)
        tab.goto(served + path)
        tab.until("document.getElementById('pulse').textContent.startsWith('Live')")
        keep(tab, path, name)
        assert tab.axe() == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(_CHOSEN_IN_SIGHT), "the navigation scrolls to the chosen page"
        assert tab.evaluate(_CLIPPED) == []
    assert tab.evaluate(_OUT_OF_SIGHT) == [], "sentences need no scrolling on a phone"
    assert tab.evaluate("document.title") != "broken"
    assert [text for text in tab.complaints if "[DOM]" not in text] == []
    assert [url for url in tab.requested if not url.startswith((served, "about:", "data:"))] == []


def test_a_phone_shows_whose_session_it_was_and_how_it_ended(log_in_tab: Callable[..., Tab], served: str) -> None:
    tab = log_in_tab()
    tab.size(390, 844)
    tab.goto(f"{served}/sessions")
    shown = (
        "[...document.querySelectorAll('thead th')].filter((each) => each.getBoundingClientRect().right <= innerWidth)"
    )
    assert {"device", "end"} <= set(tab.evaluate(f"{shown}.map((each) => each.innerText)"))


def test_a_sentence_that_no_row_has_takes_no_heading(log_in_tab: Callable[..., Tab], served: str) -> None:
    tab = log_in_tab()
    headings = "[...document.querySelectorAll('thead th')].map((each) => each.innerText)"
    tab.goto(f"{served}/devices?filter=throttled%3D")
    assert "throttled" not in tab.evaluate(headings)
    tab.goto(f"{served}/devices?filter=throttled!%3D")
    assert ("throttled" in tab.evaluate(headings)) is bool(tab.evaluate("document.querySelectorAll('td.wrap').length"))


@pytest.mark.parametrize("path", PATHS)
def test_a_page_can_be_read_in_the_dark(log_in_tab: Callable[..., Tab], served: str, path: str) -> None:
    tab = log_in_tab(dark=True)
    tab.goto(served + path)
    keep(tab, path, "dark")
    assert tab.axe() == []
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 22, 29)"


def test_the_login_is_for_everybody(chromium: Chromium, served: str) -> None:
    tab = chromium.tab(width=390)
    tab.goto(f"{served}/login")
    assert tab.axe() == []
    assert tab.evaluate("document.activeElement.name") == "account"


def test_no_name_of_a_device_gets_out_of_its_cell(log_in_tab: Callable[..., Tab], served: str) -> None:
    tab = log_in_tab()
    tab.goto(f"{served}/devices?filter=device%3Devil")
    assert "<img src=x" in tab.evaluate("document.querySelector('#live tbody').innerText")
    assert tab.evaluate("document.querySelectorAll('#live img, #live script').length") == 0


def test_a_script_within_a_page_would_not_run(log_in_tab: Callable[..., Tab], served: str) -> None:
    """The content security policy protects against a missing escape."""
    tab = log_in_tab()
    tab.goto(served)
    tab.evaluate(
        "document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=\"document.title='broken'\">`);"
        "const made = document.createElement('script'); made.textContent = \"document.title='broken'\";"
        "document.body.append(made)"
    )
    tab.until("document.querySelector('body > img').complete")
    assert tab.evaluate("document.title") != "broken"
    assert any("Content Security Policy" in text for text in tab.complaints)


def test_a_page_follows_the_log(log_in_tab: Callable[..., Tab], served: str, url: str) -> None:
    tab = log_in_tab()
    tab.goto(f"{served}/devices")
    tab.until("document.getElementById('pulse').textContent.startsWith('Live')")
    tab.evaluate("document.querySelector('.filters details').open = true; window.here = true")
    with open_store(url) as store:
        store.apply([samples.device_seen(device="newcomer", at=NOW)])
    tab.until("document.querySelector('#live tbody').innerText.includes('newcomer')")
    # The page itself was not reloaded, so typed input stays.
    assert tab.evaluate("window.here && document.querySelector('.filters details').open")


def test_devices_are_ticked_and_acted_on(log_in_tab: Callable[..., Tab], served: str) -> None:
    tab = log_in_tab()
    tab.goto(f"{served}/devices?filter=device~gateway")
    tab.evaluate(
        "document.querySelector('[data-all]').click(); document.querySelector('[name=act]').value = 'unquarantine'"
    )
    tab.after_load(lambda: tab.evaluate("document.getElementById('act').requestSubmit()"))
    assert "applies to 4 devices" in tab.evaluate("document.body.innerText")
    keep(tab, "/acting", "wide")
    assert tab.axe() == []
    tab.after_load(lambda: tab.evaluate("document.querySelector('main form').requestSubmit()"))
    tab.until("document.body.innerText.includes('4 done')")
    keep(tab, "/acted", "wide")
    assert tab.axe() == []


def test_a_chart_is_drawn_and_kept_when_the_page_follows_the_log(log_in_tab: Callable[..., Tab], served: str) -> None:
    tab = log_in_tab()
    tab.goto(f"{served}/devices/gateway-1")
    tab.until("document.querySelectorAll('.chart canvas').length > 2")
    number = tab.evaluate("document.querySelectorAll('.chart canvas').length")
    tab.evaluate("document.querySelector('.chart canvas').kept = true")
    tab.evaluate(
        "window.swapped = 0; document.addEventListener('htmx:after:swap', () => window.swapped++);"
        "document.body.dispatchEvent(new CustomEvent('fleet:change'))"
    )
    tab.until("window.swapped > 0")
    assert tab.evaluate("document.querySelectorAll('.chart canvas').length") == number
    assert tab.evaluate("document.querySelector('.chart canvas').kept")


def test_a_ticked_device_stays_ticked_on_reload(log_in_tab: Callable[..., Tab], served: str, url: str) -> None:
    tab = log_in_tab()
    tab.goto(f"{served}/devices")
    tab.until("document.getElementById('pulse').textContent.startsWith('Live')")
    tab.evaluate("document.querySelector('#live [value=\"gateway-1\"]').click()")
    with open_store(url) as store:
        store.apply([samples.device_seen(device="latecomer", at=NOW)])
    tab.until("document.querySelector('#live tbody').innerText.includes('latecomer')")
    assert tab.evaluate("document.querySelector('#live [value=\"gateway-1\"]').checked")
