from datetime import timedelta

from fleet_edge.answers.device_log import DeviceStates
from fleet_edge.store.records import DeviceSeen
from schemas.control import Presence
from tests.fleet_edge.store.samples import after, device_seen


def test_a_state_is_written_at_once_and_of_a_flood_the_last() -> None:
    written: list[DeviceSeen] = []
    states = DeviceStates(written.append)
    flood = [device_seen(software=f"{number}", at=after(number / 1000)) for number in range(4000)]
    for seen in flood:
        states.note(seen)
    assert written == flood[:1]
    states.flush(after(4))
    states.flush(after(4))
    assert written == [flood[0], flood[-1]]


def test_a_state_after_a_flood_is_held_back_no_longer_than_the_next_flush() -> None:
    written: list[DeviceSeen] = []
    states = DeviceStates(written.append, every=timedelta(seconds=5))
    states.note(device_seen(at=after(0)))
    states.note(device_seen(presence=Presence.OFFLINE, at=after(1)))
    states.flush(after(2))
    assert [seen.presence for seen in written] == [Presence.ONLINE, Presence.OFFLINE]
    states.note(device_seen(at=after(3)))
    states.note(device_seen(at=after(8)))  # written at once, in place of the one that waits
    states.flush(after(9))
    assert [seen.at for seen in written[2:]] == [after(8)]


def test_what_is_remembered_is_bounded_and_forgotten_in_time() -> None:
    written: list[DeviceSeen] = []
    states = DeviceStates(written.append, most=3)
    for number in range(10):
        states.note(device_seen(device=f"sensor-{number}", at=after(0)))
    assert len(written) == 3
    states.flush(after(10))
    states.note(device_seen(device="sensor-9", at=after(11)))
    assert written[-1].device == "sensor-9"


def test_a_clock_that_is_set_back_holds_nothing_back() -> None:
    written: list[DeviceSeen] = []
    states = DeviceStates(written.append)
    for seconds in (3600, 0, 1):
        states.note(device_seen(at=after(seconds)))
    assert [seen.at for seen in written] == [after(3600), after(0)]
