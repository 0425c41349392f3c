from datetime import UTC, datetime, timedelta

import pytest

from fleet_edge.watch import CertificateWatch

START = datetime(2026, 3, 1, tzinfo=UTC)


class Calendar:
    def __init__(self) -> None:
        self.at = START

    def __call__(self) -> datetime:
        return self.at


@pytest.fixture
def calendar() -> Calendar:
    return Calendar()


def names(expiry: CertificateWatch) -> list[str]:
    return [ending.name for ending in expiry.due()]


def test_what_ends_soon_is_told_the_nearest_first(calendar: Calendar) -> None:
    expiry = CertificateWatch(calendar, warn_before=timedelta(days=14))
    for name, days in (("late", 13), ("ended", -2), ("far", 15), ("soon", 3)):
        expiry.note(name, START + timedelta(days=days, hours=1))
    found = expiry.due()
    assert [(ending.name, ending.days) for ending in found] == [("ended", -2), ("soon", 3), ("late", 13)]
    assert "ended on 2026-02-27" in found[0].sentence
    assert "ends in 3 days (2026-03-04)" in found[1].sentence
    assert "rotate_certs.yml" in found[1].sentence


def test_each_is_told_once_a_day(calendar: Calendar) -> None:
    expiry = CertificateWatch(calendar)
    expiry.note("soon", START + timedelta(days=3))
    assert names(expiry) == ["soon"]
    calendar.at += timedelta(hours=23)
    assert names(expiry) == []
    expiry.note("other", START + timedelta(days=4))
    assert names(expiry) == ["other"]
    calendar.at += timedelta(hours=1)
    assert names(expiry) == ["soon"]


def test_one_that_has_renewed_is_told_of_again_when_the_next_end_is_near(calendar: Calendar) -> None:
    expiry = CertificateWatch(calendar)
    expiry.note("device", START + timedelta(days=3))
    assert names(expiry) == ["device"]
    expiry.note("device", START + timedelta(days=90))
    assert names(expiry) == []
    expiry.note("device", START + timedelta(days=2))
    assert names(expiry) == ["device"]


def test_the_memory_is_bounded(calendar: Calendar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_edge.watch._MOST", 2)
    expiry = CertificateWatch(calendar)
    for name in ("one", "two", "three"):
        expiry.note(name, START)
    expiry.note("one", START + timedelta(days=1))
    assert names(expiry) == ["two", "one"]
