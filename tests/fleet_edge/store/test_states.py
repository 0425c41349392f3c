from datetime import datetime, timedelta

import pytest

from fleet_edge.metrics import Figures
from fleet_edge.session_log import quarantines, queries
from fleet_edge.session_log.records import loading_record
from fleet_edge.session_log.steering import add_labels
from fleet_edge.session_log.views import ACTIVE_WITHIN, EdgeView, MachineState, device_state, edge_state
from schemas.control import Presence
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.conftest import Store
from tests.fleet_edge.store.samples import START, after
from tests.support.memory_fleet import Clock

SECOND = timedelta(seconds=1)
ONLINE, DRAINING, OFFLINE, CLOSED = Presence


@pytest.mark.parametrize(
    ("presence", "expected", "unobserved"),
    [
        (ONLINE, MachineState.ONLINE, MachineState.UNKNOWN),
        (DRAINING, MachineState.DRAINING, MachineState.UNKNOWN),
        (OFFLINE, MachineState.OFFLINE, MachineState.OFFLINE),
        (CLOSED, MachineState.OFFLINE, MachineState.OFFLINE),
        (None, MachineState.UNKNOWN, MachineState.UNKNOWN),
    ],
)
def test_states_of_devices_follow_their_connection(
    presence: Presence | None, expected: MachineState, unobserved: MachineState
) -> None:
    assert device_state(presence) is expected
    assert device_state(presence, observed=False) is unobserved
    assert device_state(presence, retired=True) is MachineState.RETIRED
    assert device_state(presence, retired=True, quarantined=True) is MachineState.QUARANTINED


@pytest.mark.parametrize(
    ("presence", "age", "expected"),
    [
        (ONLINE, 60 * SECOND, MachineState.ONLINE),
        (DRAINING, 61 * SECOND, MachineState.SILENT),
        (OFFLINE, 61 * SECOND, MachineState.OFFLINE),
        (None, SECOND, MachineState.UNKNOWN),
    ],
)
def test_states_of_edges_follow_their_last_sign(
    presence: Presence | None, age: timedelta, expected: MachineState
) -> None:
    assert edge_state(presence, since_last_sign=age) is expected


def test_an_edge_that_dies_before_its_first_load_is_silent(store: Store) -> None:
    store.apply([samples.edge_seen(presence_since=START)])
    with store.engine.connect() as connection:
        (starting,) = queries.read_edges(connection, now=after(60))
        (dead,) = queries.read_edges(connection, now=after(61))
    assert starting.state is MachineState.ONLINE
    assert (dead.state, dead.state_since) == (MachineState.SILENT, START)


def test_an_edge_that_loads_says_so_until_it_is_online_and_keeps_how_its_last_run_ended(store: Store) -> None:
    store.apply([samples.edge_seen(), loading_record("edge-1", 40, after(3600))])
    with store.engine.connect() as connection:
        (loading,) = queries.read_edges(connection, now=after(3660))
        (dead,) = queries.read_edges(connection, now=after(3661))
    assert (loading.state, loading.loading, loading.presence) == (MachineState.LOADING, 40, "online")
    assert dead.state is MachineState.SILENT
    late = loading_record("edge-1", 90, after(3604))
    store.apply([samples.edge_seen(loading_at=after(3605), at=after(3605))])
    store.apply([late])
    with store.engine.connect() as connection:
        (online,) = queries.read_edges(connection, now=after(3606))
    assert (online.state, online.loading) == (MachineState.ONLINE, None)


def test_an_edge_that_loads_for_the_first_time_is_known(store: Store) -> None:
    store.apply([loading_record("edge-1", 0, START)])
    with store.engine.connect() as connection:
        (found,) = queries.read_edges(connection, now=after(1))
    assert (found.state, found.presence) == (MachineState.LOADING, None)


def test_an_edge_that_starts_again_is_not_silent(store: Store) -> None:
    store.apply([samples.edge_seen(), samples.edge_load(), samples.edge_seen(at=after(3600))])
    with store.engine.connect() as connection:
        (found,) = queries.read_edges(connection, now=after(3605))
    assert found.state is MachineState.ONLINE


def test_metrics_count_connected_and_active_devices() -> None:
    clock = Clock()
    figures = Figures(clock)
    for device, presence in {"on": ONLINE, "off": OFFLINE, "idle": ONLINE, "shut-out": ONLINE}.items():
        figures.heard(device, presence)
    clock.seconds += (ACTIVE_WITHIN + SECOND).total_seconds()
    for device in ("on", "off", "shut-out", "unknown"):
        figures.heard(device)
    quarantined = {"shut-out", "nobody"}
    assert figures.device_states(quarantined) == {"online": 2, "offline": 1, "quarantined": 1}
    assert figures.active_devices(quarantined) == 1


def test_an_idle_device_is_online_for_as_long_as_it_is_connected(store: Store) -> None:
    days = 3 * 86_400.0
    store.apply(
        [
            samples.device_seen(presence_since=START),
            samples.device_seen(device="shut-out"),
            samples.edge_seen(at=after(days)),
            samples.edge_load(at=after(days)),
        ]
    )
    with store.engine.begin() as connection:
        quarantines.quarantine_device(connection, "shut-out", until=None, reason="It floods.", now=after(30))
        add_labels(connection, {"sensor-1": ["hall_a"]}, who="ada", now=START)
        found = {view.device: view for view in queries.read_devices(connection, now=after(days))}
    idle, shut_out = found["sensor-1"], found["shut-out"]
    assert (idle.state, idle.state_since, idle.last_sign_at, idle.connected) == (ONLINE, START, START, True)
    assert idle.labels == ("hall_a",)
    assert (shut_out.state, shut_out.state_since) == (MachineState.QUARANTINED, after(30))


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ([], MachineState.ONLINE),
        ([("one", ONLINE, 590), ("two", OFFLINE, 500)], MachineState.ONLINE),
        ([("one", ONLINE, 500), ("two", OFFLINE, 590)], MachineState.UNKNOWN),
    ],
    ids=["no edge is known", "one observes", "one is dead and one has stopped"],
)
def test_a_device_that_no_edge_observes_is_unknown(
    store: Store, edges: list[tuple[str, Presence, float]], expected: MachineState
) -> None:
    store.apply([samples.device_seen(), samples.device_seen(device="gone", presence=OFFLINE)])
    for name, presence, seconds in edges:
        store.apply([samples.edge_seen(edge=name, presence=presence, at=after(seconds))])
        store.apply([samples.edge_load(edge=name, at=after(seconds))])
    with store.engine.connect() as connection:
        found = {view.device: view for view in queries.read_devices(connection, now=after(600))}
    assert (found["sensor-1"].state, found["gone"].state) == (expected, MachineState.OFFLINE)
    if expected is MachineState.UNKNOWN:
        assert found["sensor-1"].state_since == after(590)


def test_an_edge_that_starts_does_not_make_an_offline_device_look_active(store: Store) -> None:
    """The broker retains the state of a device: every edge that starts receives it again."""
    store.apply([samples.device_seen(), samples.device_told(at=after(50))])
    gone = {"presence": OFFLINE, "presence_since": after(60)}
    store.apply([samples.device_seen(at=after(60), **gone)])
    store.apply([samples.device_seen(at=after(7200), presence=OFFLINE)])
    with store.engine.connect() as connection:
        (found,) = queries.read_devices(connection, now=after(7300))
    assert (found.state, found.state_since, found.last_sign_at) == (OFFLINE, after(60), after(60))


@pytest.mark.parametrize(("state", "since"), [(MachineState.SILENT, after(60)), (MachineState.ONLINE, START)])
def test_a_silent_edge_is_silent_since_its_last_sign(state: MachineState, since: datetime) -> None:
    edge = samples.view(EdgeView, edge="edge-1", state=state, presence_since=START, seen_at=after(60))
    assert edge.state_since == since
