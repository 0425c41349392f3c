import random
from typing import Any

import pytest

from fleet_edge.service import migrate_sessions
from fleet_edge.session_log.records import LeaveReason
from schemas.codec import encode_close
from schemas.policy import Mode
from schemas.reasons import EndReason
from schemas.topics import Topic
from tests.support.memory_fleet import Device, MemoryFleet, lossless_text, run, terms

ENDS = 4  # the output of this seed ends before LONG
LONG = 60
SHORT = 5


def ended(fleet: MemoryFleet, seed: int, *, most: int) -> Device:
    """Return a device whose text has ended and whose Close has not been sent."""
    device = Device(fleet, f"device-{seed}", terms(seed, mode=Mode.COUPLED, max_new_tokens=most), length=3, ahead=False)
    device._close = lambda: None  # type: ignore[method-assign] # it is under way
    while device.session.ended is None:
        device.act()
        fleet.settle()
    return device


def give_up(fleet: MemoryFleet) -> int:
    return migrate_sessions(fleet.edge.sessions, answers=fleet.edge.answers, scheduler=fleet.edge.scheduler)


def test_a_session_in_the_middle_of_its_text_is_left_with_all_that_was_counted() -> None:
    fleet = MemoryFleet()
    device = Device(fleet, "device-6", terms(6, mode=Mode.COUPLED, max_new_tokens=40), length=3, ahead=False)
    while len(device.session.committed) < 10:
        device.act()
        fleet.settle()
    room = fleet.verifier.capacity()
    held = fleet.edge.sessions.by_name(device.name, device.terms.session)
    assert give_up(fleet) == 1
    assert len(fleet.edge.sessions) == 0
    assert fleet.verifier.capacity() > room
    (left,) = fleet.sink.of("left")
    assert left.reason is LeaveReason.HANDED_OVER
    progress = fleet.sink.of("progress")[-1]
    assert (progress.rounds, progress.tokens) == (held.counters.rounds, held.committed)
    assert fleet.sink.of("closed") == []
    # The next edge, without state, resumes the session.
    fleet.restart_edge()
    device.resume()
    run(fleet, [device], random.Random(0))
    assert device.session.committed == lossless_text(device.terms)


@pytest.mark.parametrize(("seed", "most", "reason"), [(ENDS, LONG, EndReason.STOP), (6, SHORT, EndReason.LENGTH)])
def test_a_text_that_has_ended_is_not_left_open(seed: int, most: int, reason: EndReason) -> None:
    fleet = MemoryFleet()
    device = ended(fleet, seed, most=most)
    assert device.session.ended is reason
    assert give_up(fleet) == 0
    assert fleet.sink.of("left") == []
    (closed,) = fleet.sink.of("closed")
    assert (closed.reason, closed.tokens) == (reason, len(device.session.committed))


def test_closes_that_follow_each_other_are_all_taken_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = MemoryFleet()
    devices = [ended(fleet, seed, most=SHORT) for seed in (1, 2, 6)]
    waiting = list(devices)
    take = fleet.edge.inbox.take

    def take_one(**options: Any) -> list[object]:
        """Deliver one message at a time, as a network does."""
        if waiting:
            device = waiting.pop()
            device.publish(Topic.CLOSE, encode_close(device.session.close(wall_ms=1.0)))
            fleet.broker.pump()
        return list(take(**options))

    monkeypatch.setattr(type(fleet.edge.inbox), "take", lambda _inbox, **options: take_one(**options))
    fleet.edge.receive_last(wait_s=0.01)
    assert len(fleet.edge.sessions) == 0
    assert [closed.counters is not None for closed in fleet.sink.of("closed")] == [True] * 3


def test_a_device_that_never_falls_silent_does_not_keep_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = MemoryFleet()
    ended(fleet, 6, most=SHORT)
    monkeypatch.setattr(type(fleet.edge.inbox), "take", lambda _inbox, **_wait: [lambda: None])
    fleet.edge.receive_last(wait_s=0.01)
    assert len(fleet.edge.sessions) == 1
