from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from fleet_edge import InvalidQuery, SessionLog, StoreError
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.records import segment_number
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import OTHER, SESSION, START, after


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    with open_store(url) as store:
        store.apply([samples.device_seen(), *samples.two_sessions(START + timedelta(hours=1))])
    return url


@pytest.fixture
def log(url: str) -> SessionLog:
    return SessionLog(url, now=lambda: START + timedelta(hours=1, minutes=1))


def found(log: SessionLog, **chosen: object) -> list[str]:
    return [session.session for session in log.sessions(**chosen)]  # type: ignore[arg-type]


@pytest.mark.parametrize("since", ["30m", timedelta(minutes=30), START + timedelta(minutes=31)])
def test_a_time_may_be_an_age_or_a_point(log: SessionLog, since: object) -> None:
    assert found(log, since=since) == [OTHER]
    assert found(log, until=since) == [SESSION]


@pytest.mark.parametrize(
    "ask",
    [
        lambda log: log.sessions(since="yesterday"),
        lambda log: log.sessions(until="2026-13-01"),
        lambda log: log.sessions(reason="bored"),
        lambda log: log.sessions(mode="greedy"),
        lambda log: log.sessions(limit=0),
        lambda log: log.usage(by=["country"]),
        lambda log: log.usage(since=""),
        lambda log: log.events(severity="dreadful"),
        lambda log: log.events(limit=0),
        lambda log: log.event_counts(by=["country"]),
    ],
)
def test_a_senseless_question_is_refused(log: SessionLog, ask: Callable[[SessionLog], object]) -> None:
    with pytest.raises(InvalidQuery) as caught:
        ask(log)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_two_devices_that_named_a_session_alike_are_told_apart(log: SessionLog, url: str) -> None:
    with open_store(url) as store:
        own = {"device": "stranger", "segment": segment_number(after(5))}
        store.apply([samples.opened(**own, at=after(5)), samples.progress(**own, tokens=999, at=after(6))])
    with pytest.raises(StoreError, match=f"{SESSION}"):
        log.session(SESSION)
    found = log.session(SESSION, device="sensor-1")
    assert (found.reason, found.counted.tokens) == ("stop", 20)
    assert [segment.device for segment in log.segments(SESSION, device="stranger")] == ["stranger"]
    assert (len(log.rounds(SESSION, device="sensor-1")), log.rounds(SESSION, device="stranger")) == (1, [])
    assert len(log.events(session=SESSION, device="sensor-1")) == 1
    assert log.events(session=SESSION, device="stranger") == []
