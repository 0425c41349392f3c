import csv
import html
import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fleet_admin.dashboard.app import create_app
from fleet_admin.dashboard.pages.sessions import bars
from fleet_admin.dashboard.services import open_services
from fleet_admin.dashboard.settings import AccountRole, DashboardSettings
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.records import Record, segment_number
from fleet_edge.session_log.views import RoundView, SessionView
from schemas.control import Presence
from tests.fleet_admin.dashboard.conftest import ACTOR, BASE, NOW, PASSWORD, Browser, Clock
from tests.fleet_admin.dashboard.fleet_log import EVIL
from tests.fleet_edge.store import samples

IDS = re.compile(r'href="/sessions/([0-9a-f]{16})\?device=')
TRACED = f"/sessions/{1:016x}?device=gateway-1"


def write(url: str, records: list[Record]) -> None:
    with open_store(url) as store:
        store.apply(records)


def lines(browser: Browser, path: str) -> list[dict[str, str]]:
    answer = browser.get(path)
    assert answer.status_code == 200
    assert "attachment" in answer.headers["content-disposition"]
    return list(csv.DictReader(io.StringIO(answer.text)))


def test_an_edge_whose_load_is_old_does_not_count_as_free(viewer: Browser) -> None:
    found = {line["edge"]: line for line in lines(viewer, "/edges?format=csv")}
    assert (found["edge-1"]["state"], found["edge-1"]["free"]) == ("online", "4093")
    assert found["edge-1"]["step"] == "40.0"
    assert (found["edge-2"]["state"], found["edge-2"]["free"], found["edge-2"]["spool"]) == ("silent", "", "40")


@pytest.mark.parametrize(("presence", "free"), [(Presence.OFFLINE, ""), (Presence.DRAINING, "0")])
def test_a_closed_edge_has_no_headroom(viewer: Browser, url: str, presence: Presence, free: str) -> None:
    write(url, [samples.edge_seen(presence=presence, at=NOW)])
    found = {line["edge"]: line for line in lines(viewer, "/edges?format=csv")}
    assert (found["edge-1"]["state"], found["edge-1"]["free"]) == (presence.value, free)


def test_a_page_after_the_last_is_the_first(viewer: Browser) -> None:
    assert "gateway-1" in viewer.get("/devices?page=99").text


def test_a_page_is_told_when_the_log_changes(viewer: Browser, url: str) -> None:
    before = viewer.get("/live").text
    assert viewer.get("/live").text == before
    write(url, [samples.device_seen(device="newcomer", at=NOW + timedelta(seconds=1))])
    assert viewer.get("/live").text != before


def test_an_edge_has_a_page_of_its_own(viewer: Browser) -> None:
    page = viewer.get("/edges/edge-2").text
    assert "state silent" in page
    assert 'href="/devices/gateway-1"' in page
    assert viewer.get("/edges/nowhere").status_code == 404


@pytest.fixture
def newcomer(tmp_path: Path, clock: Clock) -> Browser:
    """Return the browser of a viewer of a log that is empty."""
    url = f"sqlite:///{tmp_path / 'new.sqlite3'}"
    open_store(url).close()
    services = open_services(DashboardSettings(db=url), now=lambda: clock.now, clock=lambda: clock.monotonic)
    services.accounts.add("victor", role=AccountRole.VIEWER, password=PASSWORD, actor=ACTOR)
    browser = Browser(TestClient(create_app(services), base_url=BASE, follow_redirects=False))
    browser.log_in("victor")
    return browser


def test_a_new_fleet_is_not_red(newcomer: Browser) -> None:
    for path in ("/", "/edges", "/devices", "/sessions", "/usage", "/alerts", "/account"):
        assert not re.findall(r'"tile bad"|"tile warn"|"state critical"', newcomer.get(path).text), path


def test_the_pages_say_which_part_of_a_tokens_time_is_long(viewer: Browser, url: str) -> None:
    at = NOW - timedelta(minutes=10)
    own = {"session": f"{7:016x}", "segment": segment_number(at), "device": "gateway-2"}
    counters = replace(samples.COUNTERS, wait_ms=9000.0, wall_ms=9700.0)
    write(url, [samples.opened(**own, at=at), samples.closed(**own, counters=counters, at=NOW)])
    page = viewer.get("/devices/gateway-2").text
    assert "The link takes" in page
    assert "<code>edge_only</code>" in page
    assert "No main cause" in viewer.get("/devices/gateway-1").text
    assert "median of the others" in viewer.get("/edges/edge-1").text


def test_a_page_of_sessions_is_sorted_and_filtered_by_application(viewer: Browser, url: str) -> None:
    at = NOW - timedelta(minutes=30)
    own = {"session": "ab" * 8, "segment": segment_number(at), "device": "gateway-1"}
    write(url, [samples.opened(**own, at=at, app="meter"), samples.progress(**own, at=at, tokens=4711)])
    assert [line["session"] for line in lines(viewer, "/sessions?filter=app%3Dmeter&format=csv")] == ["ab" * 8]
    latest, longest = f"/sessions/{999:016x}?", "/sessions/" + "ab" * 8
    by_time, by_tokens = (viewer.get(f"/sessions{query}").text for query in ("", "?sort=-tokens"))
    assert by_time.index(latest) < by_time.index(longest)
    assert by_tokens.index(longest) < by_tokens.index(latest)
    for query in ("sort=nonsense", "columns=nonsense"):
        assert viewer.get(f"/sessions?{query}").status_code == 400


def drawn(page: str) -> list[dict[str, Any]]:
    return [json.loads(html.unescape(each)) for each in re.findall(r'data-chart="([^"]*)"', page)]


def test_a_young_fleet_is_drawn_by_the_minute_for_any_range(newcomer: Browser, tmp_path: Path) -> None:
    at = NOW - timedelta(minutes=30)
    own = {"session": "aa" * 8, "segment": segment_number(at), "device": "first"}
    progress = samples.progress(**own, at=at, tokens=120)
    write(f"sqlite:///{tmp_path / 'new.sqlite3'}", [samples.opened(**own, at=at), progress])
    for path in ("/", "/?range=30d", "/usage?range=365d", "/devices/first", "/edges/edge-1"):
        page = newcomer.get(path).text
        assert "by minute" in page
        for chart in drawn(page):
            assert chart["between"] == [at.timestamp(), NOW.timestamp()]
            assert len(chart["times"]) == 30
    assert drawn(newcomer.get("/").text)[0]["lines"][0]["values"] == [2.0] + 29 * [0]


def test_failures_are_drawn_by_code(viewer: Browser, url: str) -> None:
    at = NOW - timedelta(hours=2)
    write(
        url,
        [
            samples.event(id=f"busy-{number}", kind="refused", code="busy", count=3, at=at + timedelta(minutes=number))
            for number in range(2)
        ],
    )
    for path in ("/", "/edges/edge-1", "/?range=1h", "/?range=6h"):
        lines = {line["name"]: line["values"] for chart in drawn(viewer.get(path).text) for line in chart["lines"]}
        assert ("refused busy" in lines) == ("1h" not in path)
        if "refused busy" in lines:
            assert sum(lines["refused busy"]) == 6


@pytest.mark.parametrize(
    "query",
    [
        "filter=reason%3Dnothing",
        "filter=mode%3Dx",
        "filter=opened%3Eyesterday",
        "filter=%22open",
        "filter=x",
        "page=x",
        "page=0",
        "page=%D9%A3",
        f"page={'9' * 25}",
        f"filter={'x' * 501}",
        "columns=a;+drop+table+devices",
    ],
)
def test_what_sessions_cannot_be_chosen_by_is_told(viewer: Browser, query: str) -> None:
    assert viewer.get(f"/sessions?{query}").status_code == 400


def test_pages_of_sessions_hold_each_once_also_where_many_began_at_once(viewer: Browser, url: str) -> None:
    at = NOW - timedelta(days=2)
    made = [
        samples.opened(session=f"{number:016x}", segment=segment_number(at), device="crowd", at=at)
        for number in range(5_000, 5_250)
    ]
    write(url, [*made])
    path, seen = "/sessions?filter=device%3Dcrowd", list[str]()
    for _ in range(4):
        page = viewer.get(path).text
        seen += IDS.findall(page)
        older = re.search(r'rel="next" href="([^"]+)"', page)
        if older is None:
            break
        path = older[1].replace("&amp;", "&")
    assert len(seen) == 250
    assert len(set(seen)) == 250
    assert len({line["session"] for line in lines(viewer, "/sessions?filter=device%3Dcrowd&format=csv")}) == 250


def test_a_session_shows_its_rounds_page_by_page(viewer: Browser, url: str) -> None:
    at = NOW - timedelta(days=1)
    own = {"session": f"{7_000:016x}", "segment": segment_number(at), "device": "gateway-1"}
    rounds = [samples.judged(**own, round=number, at=at + timedelta(seconds=number)) for number in range(1, 121)]
    write(url, [samples.opened(**own, at=at), *rounds])
    shown = list[int]()
    path = f"/sessions/{own['session']}"
    for _ in range(8):
        page = viewer.get(path).text
        shown += [int(each) for each in re.findall(r'<tr><td class="number">(\d+)</td>', page)]
        later = re.search(r'rel="next" href="([^"]+)"', page)
        if later is None:
            break
        path = later[1]
    assert shown == list(range(1, 121))


def test_a_session_that_is_not_there_and_one_that_several_have_are_told(viewer: Browser, url: str) -> None:
    assert viewer.get("/sessions/ffffffffffffffff").status_code == 404
    assert viewer.get("/sessions/..%2f..%2fetc").status_code == 404
    assert viewer.get("/sessions/'%20OR%201=1%20--").status_code == 404
    at = NOW - timedelta(days=1)
    for device in ("twin-1", "twin-2"):
        write(url, [samples.opened(session="aa" * 8, segment=segment_number(at), device=device, at=at)])
    assert viewer.get(f"/sessions/{'aa' * 8}").status_code == 400
    assert viewer.get(f"/sessions/{'aa' * 8}?device=twin-2").status_code == 200
    assert viewer.get(f"{TRACED}&first=0").status_code == 400
    assert viewer.get(f"{TRACED}&first=99999").status_code == 200


@pytest.mark.parametrize("path", ["/sessions", f"/sessions/{EVIL}", "/edges", "/alerts"])
def test_what_devices_and_playbooks_say_stays_text(viewer: Browser, path: str) -> None:
    page = viewer.get(path).text
    assert "<img src=x" not in page
    assert "<script>" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_usage_adds_up_by_what_is_asked_for(viewer: Browser) -> None:
    by_device = {line["device"]: int(line["tokens"]) for line in lines(viewer, "/usage?by=device&format=csv")}
    assert set(by_device) == {"evil", "gateway-1", "gateway-2", "gateway-3", "gateway-4"}
    by_time = lines(viewer, "/usage?by=device&format=csv&over=time&range=24h")
    assert sum(int(line["tokens"]) for line in by_time) == sum(by_device.values())
    assert all(line["start"].endswith(":00:00+00:00") for line in by_time)
    by_edge = lines(viewer, "/usage?by=edge&format=csv")
    assert sum(int(line["tokens"]) for line in by_edge) == sum(by_device.values())
    assert "edge-2" in viewer.get("/usage?by=edge&range=365d").text
    for query in ("by=secret", "range=9d", "by=device&sort=nothing"):
        assert viewer.get(f"/usage?{query}").status_code == 400


def test_loads_are_drawn_over_time(viewer: Browser, url: str) -> None:
    at = NOW - timedelta(minutes=3)
    write(url, [samples.edge_load(edge="edge-1", at=at, devices_connected=4711, memory_bytes=4_711_000_000)])
    assert "4,711" in viewer.get("/?range=1h").text
    page = viewer.get("/edges/edge-1?range=1h").text
    assert "Process memory" in page
    assert "4.71 GB" in page
    assert "4,711" not in viewer.get("/edges/edge-2?range=1h").text


def _round(number: int, at: datetime, **changes: float) -> RoundView:
    fields: dict[str, float] = {"queue_ms": 2.0, "prefill_ms": 0.0, "compute_ms": 40.0, **changes}
    return RoundView(
        segment=1, round=number, base=0, drafted=5, tested=5, accepted=5, batch=1, uplink_bytes=1, downlink_bytes=1,
        form=None, at=at, **fields,
    )  # fmt: skip


class TestTimeline:
    BEGIN = datetime(2026, 3, 4, tzinfo=UTC)

    def laid(self, *after_s: float, draft_ms: float | None = 60.0) -> list[list[tuple[str, float, float]]]:
        session = samples.view(SessionView, device_drafted=10, device_draft_ms=draft_ms)
        rounds = [_round(number, self.BEGIN + timedelta(seconds=each)) for number, each in enumerate(after_s)]
        found = bars(rounds, session=session, before=self.BEGIN)
        return [[(each.kind, each.begin_ms, each.length_ms) for each in bar.stretches] for bar in found]

    def test_what_is_between_verdict_and_draft_is_drafting_and_link(self) -> None:
        assert self.laid(0.1)[0] == [
            ("draft", 0.0, 30.0),
            ("link", 30.0, 28.0),
            ("queue", 58.0, 2.0),
            ("compute", 60.0, 40.0),
        ]

    def test_drafting_takes_no_longer_than_there_was_time_for(self) -> None:
        assert self.laid(0.052)[0][:2] == [("draft", 0.0, 10.0), ("queue", 10.0, 2.0)]

    def test_without_the_devices_word_drafting_and_link_are_one(self) -> None:
        assert self.laid(0.1, draft_ms=None)[0][0] == ("away", 0.0, 58.0)

    def test_nobody_waits_for_a_draft_that_was_made_ahead(self) -> None:
        second = self.laid(0.1, 0.13)[1]
        assert second == [("queue", 88.0, 2.0), ("compute", 90.0, 40.0)]
