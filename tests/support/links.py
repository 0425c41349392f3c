"""The two kinds of link under one harness, so that one contract can be held against both."""

import random
import threading
import time
from collections.abc import Callable

import pytest

from broker_config.processes import EmbeddedBroker, MosquittoProcess
from fleet_common.mqtt.errors import ConnectFailed
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
        self.ahead = 0.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return time.monotonic() + self.ahead

    def advance(self, seconds: float) -> None:
        with self._lock:
            self.ahead += seconds


def connect_failure(link: PahoLink, *, enough: Callable[[ConnectFailed], bool] = lambda _: True) -> ConnectFailed:
    """Start a link that cannot connect, and return why; one that tries again is stopped when a failure is `enough`."""
    ended = threading.Event()

    def stop() -> None:
        until(lambda: ended.is_set() or (link.failure is not None and enough(link.failure)))
        link.stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(ConnectFailed) as caught:
        link.start(timeout_s=START_S)
    ended.set()
    stopper.join()
    assert not link.connected
    return caught.value


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
