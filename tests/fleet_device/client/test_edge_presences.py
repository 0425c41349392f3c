from fleet_device.client.messaging import EdgePresences
from schemas.control import Presence
from tests.support.memory_device import edge_state


def test_only_edges_that_take_new_sessions_are_online() -> None:
    edges = EdgePresences()
    for name, presence in (("b", Presence.ONLINE), ("a", Presence.DRAINING), ("c", Presence.OFFLINE)):
        edges.note(name, edge_state(presence))
    assert len(edges.known()) == 3
    assert [state.presence for state in edges.online()] == [Presence.ONLINE]


def test_the_last_state_of_an_edge_counts() -> None:
    edges = EdgePresences()
    edges.note("a", edge_state())
    assert edges.wait_online(0.0)
    edges.note("a", edge_state(Presence.OFFLINE))
    assert not edges.wait_online(0.0)
    assert len(edges.known()) == 1


def test_a_flood_of_names_does_not_fill_the_memory() -> None:
    edges = EdgePresences()
    for number in range(1100):
        edges.note(f"edge-{number}", edge_state())
    assert len(edges.known()) == 1000
