from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from fleet_edge import InvalidQuery, NotFound, SessionLog, StoreError, StoreUnavailable
from fleet_edge.store.database import open_store
from fleet_edge.store.records import ADMINISTRATOR, segment_number
from schemas.policy import Mode
from schemas.reasons import EndReason
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import SESSION, START, after

LATER = "ff00000000000001"


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    at = START + timedelta(hours=1)
    other = {"session": LATER, "segment": segment_number(at)}
    with open_store(url) as store:
        store.apply(
            [
                samples.device_seen(),
                samples.opened(),
                samples.progress(),
                samples.judged(),
                samples.closed(),
                samples.event(),
                samples.opened(**other, device="sensor-2", mode=Mode.COUPLED, at=at),
            ]
        )
    return url


@pytest.fixture
def log(url: str) -> SessionLog:
    return SessionLog(url, now=lambda: START + timedelta(hours=1, minutes=1))


def found(log: SessionLog, **chosen: object) -> list[str]:
    return [session.session for session in log.sessions(**chosen)]  # type: ignore[arg-type]


def test_sessions_are_chosen_by_what_is_asked_for(log: SessionLog) -> None:
    assert found(log) == [LATER, SESSION]
    assert found(log, limit=1) == [LATER]
    assert found(log, device="sensor-2") == found(log, open=True) == found(log, mode="coupled") == [LATER]
    assert found(log, device=["sensor-1", "sensor-2"]) == [LATER, SESSION]
    assert found(log, reason=EndReason.STOP) == found(log, reason="stop")
    assert found(log, edge="nowhere") == []


@pytest.mark.parametrize("since", ["30m", timedelta(minutes=30), START + timedelta(minutes=31)])
def test_a_time_may_be_an_age_or_a_point(log: SessionLog, since: object) -> None:
    assert found(log, since=since) == [LATER]
    assert found(log, until=since) == [SESSION]


def test_one_session_is_found_by_its_beginning_with_all_that_belongs_to_it(log: SessionLog) -> None:
    prefix = SESSION[:6]
    assert log.session(prefix).session == SESSION
    assert [segment.edge for segment in log.segments(prefix)] == [log.session(SESSION).edge]
    assert len(log.rounds(prefix)) == 1
    assert log.events(session=prefix) == log.events(session=SESSION)
    with pytest.raises(NotFound):
        log.rounds("12")


def test_devices_and_their_events(log: SessionLog) -> None:
    assert [device.device for device in log.devices()] == ["sensor-1", "sensor-2"]
    assert log.device("sensor-1").sessions == 1
    assert isinstance(log.events(device="sensor-1"), list)
    with pytest.raises(NotFound, match="sensor-9"):
        log.device("sensor-9")


def test_totals_whole_or_by_name(log: SessionLog) -> None:
    assert len(log.usage()) == 1
    assert {each.device for each in log.usage(by=["device"])} == {"sensor-1", "sensor-2"}
    assert {each.device for each in log.usage(by=["device"], since="30m")} == {"sensor-2"}


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


def test_a_log_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="database"):
        SessionLog(f"sqlite:///{tmp_path / 'none.sqlite3'}")
    with pytest.raises(StoreError, match="cannot be read"):
        SessionLog("nonsense")
    assert not list(tmp_path.iterdir())


def test_devices_are_quarantined_and_let_in_again(log: SessionLog) -> None:
    assert log.quarantines() == []
    held = log.quarantine("sensor-1", duration=timedelta(hours=2), reason="It floods.")
    assert log.quarantines() == [held]
    assert (held.until_at, held.reason, held.by) == (START + timedelta(hours=3, minutes=1), "It floods.", ADMINISTRATOR)
    assert log.quarantine("sensor-1").until_at is None
    lifted = log.unquarantine("sensor-1")
    assert lifted is not None
    assert log.quarantines() == []
    assert log.unquarantine("sensor-1") is None
    with pytest.raises(InvalidQuery, match="duration"):
        log.quarantine("sensor-1", duration="for a while")
    with pytest.raises(InvalidQuery):
        log.quarantine("up/#")


def test_two_devices_that_named_a_session_alike_are_told_apart(log: SessionLog, url: str) -> None:
    with open_store(url) as store:
        store.apply([samples.opened(device="stranger", segment=segment_number(after(5)), at=after(5))])
    with pytest.raises(StoreError, match=f"{SESSION}"):
        log.session(SESSION)
    assert log.session(SESSION, device="sensor-1").reason == "stop"
    assert [segment.device for segment in log.segments(SESSION, device="stranger")] == ["stranger"]
    assert (len(log.rounds(SESSION, device="sensor-1")), log.rounds(SESSION, device="stranger")) == (1, [])
    assert len(log.events(session=SESSION, device="sensor-1")) == 1
    assert log.events(session=SESSION, device="stranger") == []
