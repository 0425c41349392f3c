import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_device.client.messaging import EdgeStateChanged
from fleet_device.client.reports import UnconfirmedCloses, UnverifiedReports
from schemas.control import Presence
from schemas.messages import Close, Closed
from schemas.reasons import EndReason
from tests.support.drafts import close
from tests.support.scripted_edge import closed
from tests.support.waiting import PATIENCE_S, until

BACK = EdgeStateChanged("edge-1", Presence.ONLINE)


class Edge:
    def __init__(self) -> None:
        self.there = self.confirms = True
        self.said: list[Close] = []
        self.reports: UnverifiedReports | None = None
        self.heard = threading.Event()

    def hear(self, message: Close) -> None:
        self.said.append(message)
        self.heard.set()
        if self.confirms and self.reports is not None:
            self.reports.on_event(confirmed(int.from_bytes(message.session)))


class Site:
    def __init__(self, folder: Path) -> None:
        self.path, self.now, self.edge = folder / "unverified", 1000.0, Edge()
        self.made: list[UnverifiedReports] = []

    def reports(self, *, most: int = 1000) -> UnverifiedReports:
        found = UnverifiedReports(
            self.path, self.edge.hear, lambda: self.edge.there, wall_clock=lambda: self.now, most=most
        )
        self.edge.reports = found
        self.made.append(found)
        found.start()
        return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for reports in made.made:
        reports.stop()


def told(site: Site) -> list[int]:
    """Return the reports without repetitions: an edge that comes back gets the unconfirmed ones again."""
    return list(dict.fromkeys(each.tokens for each in site.edge.said))


def unverified(number: int, **given: object) -> Close:
    return numbered(number, unverified=number, **given)


def test_what_was_written_without_an_edge_is_told_once_when_one_is_back(site: Site) -> None:
    site.edge.there = False
    reports = site.reports()
    for number in (3, 1, 2):
        site.now += 1.0
        reports.keep(unverified(number))
    assert len(reports) == 3
    assert site.edge.said == []
    site.now += 60.0
    site.edge.there = True
    reports.on_event(BACK)
    until(lambda: len(reports) == 0)
    said = [(each.tokens, each.age_s, each.edge, each.handle) for each in site.edge.said]
    assert list(dict.fromkeys(said)) == [(3, 62.0, None, None), (1, 61.0, None, None), (2, 60.0, None, None)]
    reports.on_event(BACK)
    reports.keep(unverified(9))  # an edge is there: at once
    until(lambda: len(reports) == 0)
    assert told(site) == [3, 1, 2, 9]


def test_a_report_that_nobody_confirms_is_said_again_when_an_edge_is_there(site: Site) -> None:
    reports = site.reports()
    site.edge.confirms = False
    reports.keep(unverified(1))
    assert site.edge.heard.wait(PATIENCE_S)
    reports.keep(unverified(2))
    site.edge.confirms = True
    reports.on_event(BACK)
    until(lambda: len(reports) == 0)
    assert told(site) == [1, 2]
    assert len(site.edge.said) > 2


def test_another_process_tells_what_one_has_left(site: Site) -> None:
    site.edge.there = False
    before = site.reports()
    before.keep(unverified(1))
    before.keep(unverified(2, reason=EndReason.FAILED), under_way=True)
    before.keep(unverified(3, reason=EndReason.FAILED), under_way=True)
    before.keep(unverified(3))  # ended after all
    # No goodbye: it is killed.
    after = site.reports()
    site.edge.there = True
    after.on_event(BACK)
    until(lambda: len(after) == 0)
    assert sorted({(each.tokens, each.reason) for each in site.edge.said}) == [
        (1, EndReason.STOP),
        (2, EndReason.FAILED),
        (3, EndReason.STOP),
    ]


def test_a_text_under_way_is_not_told_and_one_whose_end_was_verified_is_forgotten(site: Site) -> None:
    reports = site.reports()
    reports.keep(unverified(1), under_way=True)
    reports.on_event(BACK)
    reports.forget(numbered(1).session)
    reports.keep(unverified(2))
    until(lambda: len(reports) == 0)
    assert told(site) == [2]


def test_they_are_bounded_and_the_oldest_go_first(site: Site) -> None:
    site.edge.there = False
    reports = site.reports(most=5)
    for number in range(1, 9):
        site.now += 1.0
        reports.keep(unverified(number))
    assert len(reports) == 5
    site.edge.there = True
    reports.on_event(BACK)
    until(lambda: len(reports) == 0)
    assert told(site) == [4, 5, 6, 7, 8]


def test_a_file_that_cannot_be_used_costs_the_reports_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    site = Site(tmp_path / "state")
    reports = site.reports()
    reports.keep(unverified(1))
    assert len(reports) == 0
    reports.stop()


def test_a_file_that_holds_something_else_is_told_of(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.path.write_bytes(b"no folder")
    reports = site.reports()
    reports.keep(unverified(1))
    assert len(reports) == 0
    assert "cannot be written" in caplog.text
    reports.stop()


def test_a_spoiled_report_does_not_hold_up_the_others(site: Site) -> None:
    site.edge.there = False
    reports = site.reports()
    reports.keep(unverified(1))
    site.now += 1.0
    reports.keep(unverified(2))
    reports.stop()
    (site.path / f"{numbered(1).session.hex()}.ended").write_bytes(b"\0")
    after = site.reports()
    site.edge.there = True
    after.on_event(BACK)
    until(lambda: len(after) == 0)
    assert told(site) == [2]


def test_a_program_ends_although_reports_wait(site: Site) -> None:
    before = set(threading.enumerate())
    site.reports().keep(unverified(1))
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon


def numbered(number: int, **given: object) -> Close:
    return close(session=number.to_bytes(8, "big"), edge="edge-1", tokens=number, **given)


def confirmed(number: int) -> Closed:
    return closed(numbered(number), reason=EndReason.STOP, tokens=number)


def test_what_is_not_confirmed_is_said_to_whichever_edge_is_there_next() -> None:
    said: list[Close] = []
    closes = UnconfirmedCloses(said.append)
    for number in (1, 2):
        closes.keep(numbered(number))
    closes.on_event(confirmed(1))
    assert said == []
    closes.on_event(EdgeStateChanged("edge-1", Presence.OFFLINE))
    closes.on_event(BACK)
    assert [(each.tokens, each.edge, each.handle) for each in said] == [(2, None, None)] * 2
    closes.on_event(confirmed(2))
    closes.on_event(BACK)
    assert len(said) == 2


def test_an_edge_that_loads_its_target_uses_no_repetition_up() -> None:
    said: list[Close] = []
    closes = UnconfirmedCloses(said.append)
    closes.keep(numbered(1))
    for _ in range(100):
        closes.on_event(EdgeStateChanged("edge-1", Presence.OFFLINE, Presence.OFFLINE))
    assert said == []
    closes.on_event(EdgeStateChanged("edge-1", Presence.ONLINE, Presence.OFFLINE))
    assert len(said) == 1


def test_neither_are_they_many_nor_said_without_end() -> None:
    said: list[Close] = []
    closes = UnconfirmedCloses(said.append)
    for number in range(1, 30):
        closes.keep(numbered(number))
    assert len(closes) == 8
    for _ in range(100):
        closes.on_event(BACK)
    assert len(closes) == 0
    assert {each.tokens for each in said} == set(range(22, 30))
    assert len(said) == 8 * 20
