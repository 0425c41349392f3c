from datetime import datetime, timedelta
from itertools import product

import pytest

from fleet_edge.metrics.figures import Figures
from fleet_edge.store import housekeeping, quarantines, queries
from fleet_edge.store.steering import add_labels, retire
from fleet_edge.store.views import LATE_AFTER, SILENT_AFTER, EdgeView, MachineState, device_state, edge_state
from schemas.control import Presence
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.conftest import Store
from tests.fleet_edge.store.samples import START, after
from tests.support.memory_fleet import Clock

SECOND = timedelta(seconds=1)
ONLINE, DRAINING, OFFLINE = Presence


@pytest.mark.parametrize(
    ("presence", "age", "expected"),
    [
        (ONLINE, LATE_AFTER, MachineState.ONLINE),
        (ONLINE, LATE_AFTER + SECOND, MachineState.LATE),
        (ONLINE, SILENT_AFTER, MachineState.LATE),
        (ONLINE, SILENT_AFTER + SECOND, MachineState.SILENT),
        (DRAINING, SECOND, MachineState.DRAINING),
        (DRAINING, SILENT_AFTER + SECOND, MachineState.SILENT),
        (OFFLINE, SECOND, MachineState.OFFLINE),
        (OFFLINE, SILENT_AFTER + SECOND, MachineState.OFFLINE),
        (None, SILENT_AFTER + SECOND, MachineState.UNKNOWN),
    ],
)
def test_states_follow_presence_and_signs(presence: Presence | None, age: timedelta, expected: MachineState) -> None:
    assert device_state(presence, since_last_sign=age) is expected
    assert device_state(presence, since_last_sign=age, retired=True) is MachineState.RETIRED
    assert device_state(presence, since_last_sign=age, retired=True, quarantined=True) is MachineState.QUARANTINED


@pytest.mark.parametrize(
    ("presence", "age", "expected"),
    [
        (ONLINE, None, MachineState.ONLINE),
        (ONLINE, 60 * SECOND, MachineState.ONLINE),
        (DRAINING, 61 * SECOND, MachineState.SILENT),
        (OFFLINE, 61 * SECOND, MachineState.OFFLINE),
        (None, None, MachineState.UNKNOWN),
    ],
)
def test_states_of_edges_follow_load(presence: Presence | None, age: timedelta | None, expected: MachineState) -> None:
    assert edge_state(presence, since_load=age) is expected


def test_the_job_marks_those_devices_as_silent_that_the_log_shows_as_silent(store: Store) -> None:
    """Each combination of a presence with the times of the last three signs."""
    now = after(3600)
    ages = (None, 60, 1200)
    devices = []
    for number, (presence, reported, drafted) in enumerate(product(Presence, ages, reversed(ages))):
        for state_age in (60, 1200):
            device = f"d-{number}-{state_age}"
            devices.append(device)
            records = [samples.device_seen(device=device, presence=presence, at=after(3600 - state_age))]
            if reported is not None:
                records.append(samples.device_told(device=device, at=after(3600 - reported)))
            if drafted is not None:
                key = {"session": f"{len(devices):016x}", "device": device}
                records += [samples.opened(**key), samples.progress(**key, at=after(3600 - drafted))]
            store.apply(records)
    with store.engine.begin() as connection:
        assert retire(connection, devices[0], START)
        quarantines.quarantine_device(connection, devices[-1], until=None, reason="It floods.", now=START)
        found = queries.devices(connection, now=now, counted=False)
    silent = [view.device for view in found if view.state is MachineState.SILENT]
    assert 0 < len(silent) < len(devices)
    assert housekeeping.mark_silent(store.engine, now=now) == sorted(silent)


def test_metrics_count_devices_by_the_same_states() -> None:
    clock = Clock()
    figures = Figures(clock)
    for device, presence in {"on": ONLINE, "off": OFFLINE, "quiet": ONLINE, "shut-out": ONLINE}.items():
        figures.heard(device, presence)
    clock.seconds += (SILENT_AFTER + SECOND).total_seconds()
    figures.heard("on")
    figures.heard("unknown")
    found = figures.device_states({"shut-out", "nobody"})
    assert found == dict.fromkeys(("online", "offline", "silent", "quarantined"), 1)


def test_a_view_has_the_state_and_since_when(store: Store) -> None:
    store.apply(
        [samples.device_seen(), samples.device_seen(device="shut-out"), samples.edge_seen(), samples.edge_load()]
    )
    with store.engine.begin() as connection:
        quarantines.quarantine_device(connection, "shut-out", until=None, reason="It floods.", now=after(30))
        add_labels(connection, {"sensor-1": ["hall_a"]}, who="ada", now=START)
        late = {view.device: view for view in queries.devices(connection, now=after(301))}
        [edge] = queries.edges(connection, now=after(301))
    assert (late["sensor-1"].state, late["sensor-1"].state_since) == (MachineState.LATE, START)
    assert late["sensor-1"].labels == ("hall_a",)
    assert (late["shut-out"].state, late["shut-out"].state_since) == (MachineState.QUARANTINED, after(30))
    assert edge.state is MachineState.SILENT


@pytest.mark.parametrize(("state", "since"), [(MachineState.SILENT, after(60)), (MachineState.ONLINE, START)])
def test_a_silent_edge_is_silent_since_its_latest_load(state: MachineState, since: datetime) -> None:
    edge = samples.view(EdgeView, edge="edge-1", state=state, presence_since=START, load_at=after(60))
    assert edge.state_since == since
