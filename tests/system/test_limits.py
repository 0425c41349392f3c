from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_common.mqtt.link import Handler, PublishOutcome
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from schemas.topics import Topic, build
from tests.support.brokers import StartBroker
from tests.support.links import START_S, Inbox, connect_failure
from tests.support.raw_client import RawClient
from tests.support.waiting import until

pytestmark = pytest.mark.broker

FLEET = "home"
PACKET_BYTES, QUEUED, UNANSWERED, CONNECTIONS = 4096, 10, 4, 5


class Watched:
    """A broker, and its log as a monitor reads it."""

    def __init__(self, broker: MosquittoProcess, stack: ExitStack) -> None:
        self.broker = broker
        self._stack = stack
        self._log = Inbox()
        self.link("monitor", ("$SYS/broker/log/#", self._log))

    def link(self, name: str, *subscriptions: tuple[str, Handler], packet_bytes: int = PACKET_BYTES) -> PahoLink:
        link = PahoLink(
            LinkSettings(client_id=name, username=name, port=self.broker.port, packet_bytes=packet_bytes, flush_s=0.1)
        )
        self._stack.callback(link.stop)
        for topic, handler in subscriptions:
            link.subscribe(topic, handler)
        link.start(timeout_s=START_S)
        return link

    def wait_for_line(self, *words: bytes) -> None:
        """Wait until one line of the log has all of these words."""
        until(lambda: any(all(word in line for word in words) for line in self._log.payloads), patience_s=START_S)


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


def test_a_full_queue_is_logged_with_the_clients_name(watched: Watched) -> None:
    verdicts = build(Topic.VERDICT, fleet=FLEET, device="device-a")
    edge = watched.link("edge-1")
    outcomes: list[PublishOutcome] = []
    with RawClient(watched.broker.port, None, "device-a") as slow:  # it acknowledges nothing
        slow.subscribe(verdicts)
        for _ in range(30):
            edge.publish(verdicts, b"verdict", on_outcome=outcomes.append)
        watched.wait_for_line(b"dropped", b"device-a")
        until(lambda: len(outcomes) == 30)
    assert not any(outcome.reason for outcome in outcomes), "the publisher cannot know"


def test_a_message_too_large_for_its_receiver_is_logged(watched: Watched) -> None:
    verdicts = build(Topic.VERDICT, fleet=FLEET, device="device-a")
    inbox = Inbox()
    watched.link("device-a", (verdicts, inbox), packet_bytes=300)
    watched.link("edge-1").publish(verdicts, bytes(1000))
    watched.wait_for_line(b"too large", b"device-a")
    assert inbox == []


def test_a_client_too_many_is_logged_and_fails_with_a_sentence(watched: Watched) -> None:
    for number in range(CONNECTIONS - 1):
        watched.link(f"device-{number}")
    late = PahoLink(LinkSettings(client_id="late", username="late", port=watched.broker.port))
    assert "connection" in str(connect_failure(late))
    watched.wait_for_line(b"max_connections exceeded", b"127.0.0.1")
