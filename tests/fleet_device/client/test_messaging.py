import logging
import re

import pytest

from fleet_common.mqtt.link import NO_MATCHING_SUBSCRIBERS, PublishOutcome
from fleet_device.client.messaging import (
    ConnectionChanged,
    EdgePresences,
    Inbox,
    Outbound,
    ReceivedVerdict,
    Undelivered,
    Wake,
)
from schemas.codec import encode_verdict
from schemas.control import EdgeState, Presence
from schemas.messages import Verdict
from schemas.topics import Topic, build
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_fleet import EDGE, FLEET, edge_state
from tests.support.memory_link import MemoryLink

VERDICT = Verdict(handle=1, round=2, accepted=3, next=4)


class Scene:
    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.inbox = Inbox()
        self.link = MemoryLink(self.broker, "device-1")
        self.inbox.subscribe(self.link, fleet="fleet", device="device-1")
        self.link.start(timeout_s=1.0)
        self.edge = MemoryLink(self.broker, "edge-1")
        self.edge.start(timeout_s=1.0)
        self.broker.pump()
        assert self.inbox.get() == ConnectionChanged(up=True)

    def says(self, topic: Topic, payload: bytes, *, device: str | None = "device-1", edge: str | None = None) -> None:
        self.edge.publish(build(topic, fleet="fleet", device=device, edge=edge), payload)
        self.broker.pump()


def test_another_devices_messages_do_not_arrive() -> None:
    scene = Scene()
    scene.says(Topic.VERDICT, encode_verdict(VERDICT), device="device-2")
    assert scene.inbox.get() is None


@pytest.mark.parametrize(
    ("topic", "device", "edge"),
    [(Topic.VERDICT, "device-1", None), (Topic.SESSION, "device-1", None), (Topic.EDGE_STATE, None, "edge-1")],
)
def test_what_is_no_message_is_counted_logged_and_dropped(
    topic: Topic, device: str | None, edge: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene()
    with caplog.at_level(logging.WARNING):
        scene.says(topic, b"\xff", device=device, edge=edge)
    assert scene.inbox.get() is None
    assert scene.inbox.malformed == 1
    assert len(caplog.records) == 1
    assert scene.link.counters.handler_errors == 0


@pytest.mark.parametrize(("reason", "told"), [(NO_MATCHING_SUBSCRIBERS, True), (0, False), (0x87, False)])
def test_a_message_that_nobody_listens_for_is_told(reason: int, told: bool) -> None:
    inbox = Inbox()
    inbox.on_undelivered(Topic.OPEN)(PublishOutcome("topic", reason))
    assert inbox.get() == (Undelivered(Topic.OPEN) if told else None)


def test_an_edge_that_sends_without_end_between_two_texts_fills_no_memory() -> None:
    scene = Scene()
    payload = encode_verdict(VERDICT)
    for _ in range(20_000):
        scene.says(Topic.VERDICT, payload)
    scene.inbox.put(Wake())
    taken = list(iter(scene.inbox.get, None))
    assert taken[-1] == Wake()
    assert len(taken) - 1 + scene.inbox.dropped == 20_000
    assert len(taken) < 10_000
    scene.says(Topic.VERDICT, payload)
    assert scene.inbox.get() == ReceivedVerdict(VERDICT, len(payload))


def test_only_edges_that_take_new_sessions_are_online() -> None:
    edges = EdgePresences()
    for name, presence in (("b", Presence.ONLINE), ("a", Presence.DRAINING), ("c", Presence.OFFLINE)):
        edges.note_state(name, edge_state(presence))
    assert len(edges.known()) == 3
    assert [state.presence for state in edges.online()] == [Presence.ONLINE]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "fleet edge run"),
        (edge_state(Presence.DRAINING), "edge edge-1 is draining"),
        (edge_state(Presence.OFFLINE, loading=0), r"'edge-1' .* loads its target model \(0 %"),
        (edge_state(Presence.OFFLINE, loading=70), r"'edge-1' .* loads its target model \(70 %"),
        (edge_state(Presence.ONLINE), "'edge-1' is online and has not answered within 10 s"),
    ],
)
def test_who_gets_no_answer_hears_what_is_known_of_the_edges(state: EdgeState | None, said: str) -> None:
    scene = Scene()
    if state is not None:
        scene.inbox.edges.note_state(EDGE, state)
    outbound = Outbound(scene.link, FLEET, "device-1", scene.inbox)
    assert re.search(said, str(outbound.silence(10.0)))


def test_the_last_state_of_an_edge_counts() -> None:
    edges = EdgePresences()
    edges.note_state("a", edge_state())
    assert edges.wait_online(0.0)
    edges.note_state("a", edge_state(Presence.OFFLINE))
    assert not edges.wait_online(0.0)
    assert len(edges.known()) == 1


def test_a_flood_of_names_does_not_fill_the_memory() -> None:
    edges = EdgePresences()
    for number in range(1100):
        edges.note_state(f"edge-{number}", edge_state())
    assert len(edges.known()) == 1000
