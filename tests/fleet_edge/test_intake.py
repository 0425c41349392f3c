import logging
import threading
from typing import TYPE_CHECKING

import pytest

from fleet_common.mqtt.link import Message, PublishOutcome
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_edge.intake import Intake, IntakeQueue, ReceivedMessage
from schemas.codec import encode_draft, encode_open
from schemas.messages import Draft
from schemas.topics import Topic, build
from tests.support.drafts import draft, open_message
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.waiting import PATIENCE_S, until

if TYPE_CHECKING:
    from broker_config.processes import MosquittoProcess


def topic(kind: Topic, *, device: str = "device-1", edge: str | None = None) -> str:
    return build(kind, fleet="fleet", device=device, edge=edge)


@pytest.fixture
def inbox() -> IntakeQueue:
    return IntakeQueue()


@pytest.fixture
def intake(inbox: IntakeQueue) -> Intake:
    return Intake(inbox, clock=lambda: 12.5)


def arrivals(inbox: IntakeQueue) -> list[ReceivedMessage]:
    return [entry for entry in inbox.take(timeout_s=0.0) if isinstance(entry, ReceivedMessage)]


def test_whose_message_it_is_comes_from_the_topic_alone(intake: Intake, inbox: IntakeQueue) -> None:
    intake.on_message(Message(topic(Topic.OPEN, device="device-2"), encode_open(open_message(draft_model="device-1"))))
    assert [arrival.device for arrival in arrivals(inbox)] == ["device-2"]


@pytest.mark.parametrize(
    "name",
    [
        "dssd/v1/fleet/device-1/command/response",
        "dssd/v1/fleet/_edge/edge-1/state",
        "dssd/v1/fleet/device-1/down/verdict",
        "nonsense",
    ],
)
def test_other_topics_are_left_alone(intake: Intake, inbox: IntakeQueue, name: str) -> None:
    intake.on_message(Message(name, b"{}"))
    assert arrivals(inbox) == []


def received(device: str, number: int = 0) -> ReceivedMessage:
    return ReceivedMessage(device, draft(round=number), 40, 12.5)


def test_a_full_inbox_drops_from_the_device_that_fills_it(caplog: pytest.LogCaptureFixture) -> None:
    inbox = IntakeQueue(bound=3)
    with caplog.at_level(logging.WARNING):
        assert [inbox.put(received("hostile", number)) for number in range(5)] == [True, True, True, False, False]
        assert not inbox.put(received("honest"))
    assert inbox.dropped == 3
    assert len(caplog.records) == 1  # not one a message
    assert set(arrivals(inbox)) == {received("hostile"), received("hostile", 1), received("honest")}


def test_a_call_fits_into_a_full_inbox_and_comes_first() -> None:
    inbox, call = IntakeQueue(bound=1), lambda: None
    inbox.put(received("device-1"))
    assert inbox.put(call)
    assert inbox.take(timeout_s=0.0) == [call, received("device-1")]


def test_devices_take_turns_whatever_one_of_them_has_sent() -> None:
    inbox = IntakeQueue()
    for number in range(1000):
        inbox.put(received("hostile", number))
    inbox.put(received("honest"))
    assert received("honest") in inbox.take(timeout_s=0.0, most=20)


def test_whoever_waits_for_something_else_too_is_woken(inbox: IntakeQueue) -> None:
    inbox.wake()
    assert inbox.take(timeout_s=1e6) == []
    thread = threading.Thread(target=inbox.wake)
    thread.start()
    assert inbox.take(timeout_s=1e6) == []
    thread.join()


@pytest.mark.broker
def test_retained_messages_of_devices_are_not_delivered(own_mosquitto: "MosquittoProcess", intake: Intake) -> None:
    port = own_mosquitto.port
    device, edge = (PahoLink(LinkSettings(client_id=name, username=name, port=port)) for name in ("device-1", "edge-1"))
    sent: list[bytes] = []

    def accepts(name: bytes, _packet_bytes: int, _retained: bool) -> bool:
        sent.append(name)
        return True

    home = {kind: build(kind, fleet="home", device="device-1") for kind in (Topic.OPEN, Topic.CLOSE, Topic.STATE)}
    drafts = build(Topic.DRAFT, fleet="home", device="device-1", edge="edge-1")
    stored: list[PublishOutcome] = []
    try:
        device.start(timeout_s=PATIENCE_S)
        for name in (home[Topic.OPEN], home[Topic.CLOSE], drafts, home[Topic.STATE]):
            device.publish(name, b"left there", retain=True, on_outcome=stored.append)
        until(lambda: len(stored) == 4)
        assert all(outcome.accepted for outcome in stored)
        edge.screen(accepts)
        intake.subscribe(edge, fleet="home", edge="edge-1")
        edge.start(timeout_s=PATIENCE_S)
        device.publish(home[Topic.CLOSE], b"said now")
        until(lambda: home[Topic.CLOSE].encode() in sent)
    finally:
        device.stop()
        edge.stop()
    assert sorted(sent) == sorted([home[Topic.STATE].encode(), home[Topic.CLOSE].encode()])


def test_an_open_goes_to_one_edge_a_draft_to_the_one_it_names_and_a_close_to_all() -> None:
    broker = MemoryBroker()
    boxes = {"edge-1": IntakeQueue(), "edge-2": IntakeQueue()}
    for edge, box in boxes.items():
        link = MemoryLink(broker, edge)
        Intake(box, clock=lambda: 0.0).subscribe(link, fleet="fleet", edge=edge)
        link.start(timeout_s=1.0)
    device = MemoryLink(broker, "device-1")
    device.start(timeout_s=1.0)
    device.publish(topic(Topic.OPEN), encode_open(open_message()))
    device.publish(topic(Topic.DRAFT, edge="edge-2"), encode_draft(Draft(handle=0, round=0, epoch=0, base=0, digest=0)))
    device.publish(topic(Topic.CLOSE), b"\xff")
    broker.pump()
    heard = {edge: [type(arrival.message).__name__ for arrival in arrivals(box)] for edge, box in boxes.items()}
    assert sorted(heard["edge-1"] + heard["edge-2"]) == ["Draft", "Malformed", "Malformed", "Open"]
    assert [kind for kind in heard["edge-2"] if kind != "Open"] == ["Draft", "Malformed"]
