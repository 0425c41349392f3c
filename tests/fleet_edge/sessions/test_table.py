import pytest

from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.table import SessionTable
from schemas.reasons import Action, FaultCode, RefusalCode
from tests.support.drafts import LIMITS, open_message


def added(
    table: SessionTable, *, device: str = "device-1", session: bytes = b"session1", now: float = 0.0
) -> EdgeSession:
    return table.add(open_message(session=session), device=device, limits=LIMITS, now=now)


def name(number: int) -> bytes:
    return number.to_bytes(8, "big")


def test_a_session_is_found_by_its_handle_and_by_its_name() -> None:
    table = SessionTable(60.0)
    session = added(table)
    assert table.find(device="device-1", handle=session.handle, now=1.0) is session
    assert table.by_name("device-1", b"session1") is session
    assert list(table) == [session]
    table.remove(session)
    table.remove(session)
    assert len(table) == 0
    assert table.by_name("device-1", b"session1") is None


def test_another_devices_session_is_not_told_from_one_that_is_not_open() -> None:
    table = SessionTable(60.0)
    session = added(table)
    faults = []
    for device, handle in (("device-2", session.handle), ("device-1", session.handle + 1)):
        with pytest.raises(DraftFault) as caught:
            table.find(device=device, handle=handle, now=0.0)
        faults.append((caught.value.code, caught.value.action, str(caught.value)))
    assert faults[0] == faults[1]
    assert faults[0][:2] == (FaultCode.UNKNOWN_SESSION, Action.RESUME)
    assert table.by_name("device-2", b"session1") is None


def test_another_devices_messages_do_not_renew_a_lease() -> None:
    table = SessionTable(60.0)
    session = added(table)
    with pytest.raises(DraftFault):
        table.find(device="device-2", handle=session.handle, now=50.0)
    assert table.expired(60.0) == [session]


def test_two_devices_may_choose_the_same_name() -> None:
    table = SessionTable(60.0)
    one, two = added(table), added(table, device="device-2")
    assert one.handle != two.handle
    table.remove(one)
    assert table.by_name("device-2", b"session1") is two


def test_a_session_opened_again_replaces_the_old_one_under_a_new_handle() -> None:
    table = SessionTable(60.0, max_per_device=1)
    old, new = added(table), added(table)
    assert new.handle != old.handle
    assert list(table) == [new]


def test_messages_renew_the_lease_and_silence_ends_it() -> None:
    table = SessionTable(60.0)
    session = added(table, now=0.0)
    assert table.expired(59.9) == []
    table.find(device="device-1", handle=session.handle, now=59.9)
    assert table.expired(119.8) == []
    assert table.expired(119.9) == [session]


def test_a_device_that_is_gone_has_a_shorter_lease_unless_it_comes_back() -> None:
    table = SessionTable(60.0)
    session, other = added(table), added(table, device="device-2")
    table.shorten("device-1", expires=15.0)
    assert table.expired(15.0) == [session]
    table.find(device="device-1", handle=session.handle, now=10.0)
    assert table.expired(60.0) == [other]
    table.shorten("device-1", expires=1000.0)
    assert table.expired(70.0) == [session, other]


def test_a_device_has_no_more_sessions_than_its_share() -> None:
    table = SessionTable(60.0, max_per_device=2)
    sessions = [added(table, session=name(number)) for number in range(2)]
    with pytest.raises(OpenRefused) as caught:
        added(table, session=name(2))
    assert caught.value.code is RefusalCode.BUSY
    assert list(table) == sessions
    added(table, device="device-2")
    table.remove(sessions[0])
    added(table, session=name(2))


def test_a_full_table_refuses() -> None:
    table = SessionTable(60.0, most=2)
    added(table, session=name(0))
    added(table, session=name(1), device="device-2")
    with pytest.raises(OpenRefused) as caught:
        added(table, session=name(2), device="device-3")
    assert caught.value.code is RefusalCode.BUSY


def test_handles_rise_and_skip_those_in_use_when_they_come_round() -> None:
    table = SessionTable(60.0)
    first = added(table)
    assert added(table, device="device-2").handle == first.handle + 1
    table._next = (1 << 16) - 1
    last = added(table, device="device-3")
    assert last.handle == (1 << 16) - 1
    assert added(table, device="device-4").handle == 2
