import queue
import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from broker_config.broker import Broker
from broker_config.monitoring import MOST_SHARED, LimitReached, LimitWatch
from broker_config.processes import MosquittoProcess
from fleet_cli.broker import watch
from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.link import Handler, PublishOutcome
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from schemas.topics import Topic, build
from tests.support.brokers import StartBroker
from tests.support.links import START_S, Inbox
from tests.support.raw_client import RawClient
from tests.support.waiting import until

pytestmark = pytest.mark.broker

FLEET = "home"
PACKET_BYTES, QUEUED, UNANSWERED, CONNECTIONS = 4096, 10, 4, 5


class Watched:
    def __init__(self, broker: MosquittoProcess, stack: ExitStack) -> None:
        self.broker = broker
        self._stack = stack
        self.events: queue.SimpleQueue[LimitReached | None] = queue.SimpleQueue()
        monitor = self._make("monitor")
        watch(monitor, LimitWatch(), self.events)
        monitor.start(timeout_s=START_S)

    def _make(self, name: str, packet_bytes: int = PACKET_BYTES) -> PahoLink:
        link = PahoLink(
            LinkSettings(client_id=name, username=name, port=self.broker.port, packet_bytes=packet_bytes, flush_s=0.1)
        )
        self._stack.callback(link.stop)
        return link

    def link(self, name: str, *subscriptions: tuple[str, Handler], packet_bytes: int = PACKET_BYTES) -> PahoLink:
        link = self._make(name, packet_bytes)
        for topic, handler in subscriptions:
            link.subscribe(topic, handler)
        link.start(timeout_s=START_S)
        return link

    def next(self) -> LimitReached:
        event = self.events.get(timeout=START_S)
        assert event is not None
        return event


@pytest.fixture
def watched(start_mosquitto: StartBroker) -> Iterator[Watched]:
    description = Broker(
        max_queued=QUEUED,
        max_unanswered=UNANSWERED,
        max_connections=CONNECTIONS,
        max_packet_bytes=PACKET_BYTES,
        sys_interval_s=1,
    )
    with ExitStack() as stack:
        yield Watched(start_mosquitto(description), stack)


def test_a_full_queue_is_told_with_the_clients_name_and_then_counted(watched: Watched) -> None:
    verdicts = build(Topic.VERDICT, fleet=FLEET, device="device-a")
    edge = watched.link("edge-1")
    outcomes: list[PublishOutcome] = []
    with RawClient(watched.broker.port, None, "device-a") as slow:  # it acknowledges nothing
        slow.subscribe(verdicts)
        for _ in range(30):
            edge.publish(verdicts, b"verdict", on_outcome=outcomes.append)
        told = watched.next()
        counted = watched.next()
        until(lambda: len(outcomes) == 30)
    assert (told.limit, told.who) == ("queue", "device-a")
    assert counted.limit == "queue"
    assert re.match(r"The broker has dropped [1-9]\d* messages", counted.sentence)
    assert all(outcome.delivered for outcome in outcomes), "the publisher cannot know"


def test_a_message_too_large_for_its_receiver_is_told(watched: Watched) -> None:
    verdicts = build(Topic.VERDICT, fleet=FLEET, device="device-a")
    inbox = Inbox()
    watched.link("device-a", (verdicts, inbox), packet_bytes=300)
    edge = watched.link("edge-1")
    edge.publish(verdicts, bytes(1000))
    event = watched.next()
    assert (event.limit, event.who) == ("packet", "device-a")
    assert inbox == []


def test_a_client_too_many_is_told_to_the_watcher_and_fails_with_a_sentence(watched: Watched) -> None:
    for number in range(CONNECTIONS - 1):
        watched.link(f"device-{number}")
    late = PahoLink(LinkSettings(client_id="late", username="late", port=watched.broker.port))
    with pytest.raises(ConnectFailed, match="connection"):
        late.start(timeout_s=0.5)
    event = watched.next()
    assert (event.limit, event.who) == ("connections", "127.0.0.1")


def test_shared_subscriptions_without_end_are_told(start_mosquitto: StartBroker) -> None:
    with ExitStack() as stack:
        watched = Watched(start_mosquitto(Broker(max_packet_bytes=1 << 20, sys_interval_s=1)), stack)
        watched.link("device-a", *((f"$share/group-{number}/#", Inbox()) for number in range(MOST_SHARED + 1)))
        assert watched.next().limit == "subscriptions"
