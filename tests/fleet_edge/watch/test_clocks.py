from datetime import datetime, timedelta

import pytest

from fleet_edge.store.records import EventLogged
from fleet_edge.watch import ClockWatch
from schemas.control import DeviceState, Presence, encode_json
from schemas.topics import Topic
from tests.support.memory_fleet import START, Device, MemoryFleet, terms

SECOND = timedelta(seconds=1)


def state(since: datetime, presence: Presence = Presence.ONLINE) -> DeviceState:
    return DeviceState(presence=presence, software="1", draft_model="toy", quantization="none", since=since)


@pytest.mark.parametrize(("ahead_s", "said"), [(3600 * 72, "ahead by 3 days"), (120, "by 2 minutes"), (31, "by 31 s")])
def test_a_time_that_has_not_come_is_said_in_a_sentence(ahead_s: int, said: str) -> None:
    assert said in ClockWatch().note("a", state(START + ahead_s * SECOND), now=START)


@pytest.mark.parametrize("late_s", [-30, 0, 86_400])
def test_a_state_that_was_long_on_its_way_is_not_held_against_a_clock(late_s: int) -> None:
    assert ClockWatch().note("a", state(START - late_s * SECOND), now=START) == ""


def test_a_start_before_the_last_start_means_that_a_clock_was_set_back() -> None:
    watch = ClockWatch()
    assert watch.note("a", state(START), now=START) == ""
    assert watch.note("b", state(START - 7200 * SECOND), now=START) == ""  # another device
    assert "gone back by 2 hours" in watch.note("a", state(START - 7200 * SECOND), now=START)
    assert watch.note("a", state(START - 7200 * SECOND), now=START) == ""  # said, and kept right from here on


def test_a_last_will_tells_of_the_time_before() -> None:
    watch = ClockWatch()
    watch.note("a", state(START), now=START)
    assert watch.note("a", state(START - 7200 * SECOND, Presence.OFFLINE), now=START) == ""
    assert watch.note("a", state(START + 7200 * SECOND, Presence.OFFLINE), now=START) == ""


def test_the_log_has_it_as_an_event_of_its_device() -> None:
    fleet = MemoryFleet()
    device = Device(fleet, "ahead", terms(1), length=2, ahead=False)
    device.publish(Topic.STATE, encode_json(state(START + timedelta(days=3))))
    fleet.settle()
    events = [(each.device, each.kind, each.code) for each in fleet.sink.of(EventLogged)]
    assert ("ahead", "device", "clock-wrong") in events
