"""The two kinds of link under one harness, so that one contract can be held against both."""

import random
import time
from collections.abc import Callable

from broker_config.processes import EmbeddedBroker, MosquittoProcess
from fleet_common.mqtt.link import Message, Will
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.relay import Relay
from tests.support.waiting import PATIENCE_S, until

START_S = PATIENCE_S


class Clock:
    def __init__(self) -> None:
        self._ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._ahead

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


class Inbox(list[Message]):
    def __call__(self, message: Message) -> None:
        self.append(message)

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self]


class MemoryHarness:
    """Links in memory; things happen when the test waits for them."""

    def __init__(self, max_packet_bytes: int = 1 << 20) -> None:
        self.clock = Clock()
        self.broker = MemoryBroker(rng=random.Random(1), max_packet_bytes=max_packet_bytes, clock=self.clock)
        self._links: list[MemoryLink] = []

    def link(self, name: str, *, will: Will | None = None, queue_messages: int = 1000) -> MemoryLink:
        link = MemoryLink(self.broker, name, will=will, queue_messages=queue_messages)
        self._links.append(link)
        return link

    def until(self, condition: Callable[[], bool]) -> None:
        self.broker.pump()
        assert condition(), "did not happen"

    def isolate(self, name: str) -> None:
        self.broker.kill(name)

    def reunite(self, name: str) -> None:
        self.broker.revive(name)

    def broker_down(self) -> None:
        self.broker.go_down()

    def broker_up(self) -> None:
        self.broker.come_up()

    def close(self) -> None:
        for link in self._links:
            link.stop()


class PahoHarness:
    """Links to a real broker, each through a relay that can be cut."""

    def __init__(self, broker: MosquittoProcess | EmbeddedBroker, *, packet_bytes: int = 1 << 20) -> None:
        self.clock = Clock()
        self.packet_bytes = packet_bytes
        self.broker = broker
        self._links: list[PahoLink] = []
        self._relays: dict[str, Relay] = {}

    def link(self, name: str, *, will: Will | None = None, queue_messages: int = 1000) -> PahoLink:
        relay = self._relays.setdefault(name, Relay(self.broker.port))
        settings = LinkSettings(
            client_id=name,
            username=name,
            port=relay.port,
            will=will,
            queue_messages=queue_messages,
            packet_bytes=self.packet_bytes,
            min_backoff_s=0.02,
            max_backoff_s=0.2,
        )
        link = PahoLink(settings, rng=random.Random(1), clock=self.clock)
        self._links.append(link)
        return link

    def until(self, condition: Callable[[], bool]) -> None:
        until(condition)

    def isolate(self, name: str) -> None:
        self._relays[name].isolate()

    def reunite(self, name: str) -> None:
        self._relays[name].reunite()

    def broker_down(self) -> None:
        self.broker.stop()

    def broker_up(self) -> None:
        self.broker.start()

    def close(self) -> None:
        for link in self._links:
            link.stop()
        for relay in self._relays.values():
            relay.close()


Harness = MemoryHarness | PahoHarness
