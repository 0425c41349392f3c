"""Attack contract: what an attack is given, what it must do, and the sending at a rate that most of them are."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Final

from benchmarks.client_process import Identity
from benchmarks.hostile.mqtt_client import RawClient
from benchmarks.hostile.place import Place
from schemas.policy import Grammar
from schemas.topics import Topic
from tests.support.mqtt_packets import publish_packet

_TURN_S: Final = 0.005  # between two writes
_POOL: Final = 512
_CODE: Final = b"code"
_SHORT: Final = 0x17  # longest text whose length is in the first byte of its CBOR


@dataclass(slots=True)
class Attacker:
    """What an attack works with.

    Attributes:
        place: What it knows.
        rng: Draws whatever is random.
        running: Whether to go on.
        clock: Monotonic seconds.
        sent: Packets handed to a socket.
        answers: Answers that came back, by the code of the refusal or the fault; and as `verdict` and `other`.
        failed: Connections that were not to be had.
        clients: All that were made.
    """

    place: Place
    rng: random.Random
    running: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic
    sent: int = 0
    failed: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    clients: list[RawClient] = field(default_factory=list)

    def client(
        self,
        identity: Identity | None = None,
        on_publish: Callable[[bytes, bytes], None] = lambda _topic, _payload: None,
    ) -> RawClient:
        """Return a new client, which subscribes nothing on its own: answers to it are counted."""

        def take(topic: bytes, payload: bytes) -> None:
            self.answers[_code_of(topic, payload)] += 1
            on_publish(topic, payload)

        made = RawClient(identity or self.place.identities[0], on_publish=take, clock=self.clock)
        made.on_connect = lambda: self.listen(made)
        self.clients.append(made)
        return made

    def listen(self, client: RawClient) -> None:
        """Subscribe a client to its device's answers, as every device does."""
        client.subscribe(
            [
                self.place.topic(Topic.SESSION, client.identity),
                self.place.topic(Topic.VERDICT, client.identity),
            ]
        )

    def publish(self, client: RawClient, topic: Topic, payload: bytes, *, qos: int = 1, retain: bool = False) -> bytes:
        """Return the packet of a publish in the name of a client's device."""
        return publish_packet(self.place.topic(topic, client.identity), payload, qos=qos, retain=retain)

    def send(self, client: RawClient, topic: Topic, payload: bytes) -> None:
        """Publish at QoS 1 at once."""
        client.send(self.publish(client, topic, payload))
        self.sent += 1


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        name: For the command line and the report.
        summary: One line for people, with its rate.
        run: Attacks until `Attacker.running` says no.
        control: Whether the same can be sent to a place where no edge reads it.
        devices: Identities that it needs.
        plain: An equally large load of requests without a grammar. It is the control, at the edge itself.
        newcomer: Grammar of the requests of devices that come while the attack lasts.
    """

    name: str
    summary: str
    run: Callable[[Attacker], None]
    control: bool = True
    devices: int = 1
    plain: Callable[[Attacker], None] | None = None
    newcomer: Grammar | None = None


@dataclass(slots=True)
class Source:
    """Packets to send through one client at a rate.

    Attributes:
        client: Whose connection.
        packets: Without end.
        rate: Packets a second.
        due: How many were due so far, sent or not.
    """

    client: RawClient
    packets: Iterator[bytes]
    rate: float
    due: int = 0


def flood(attacker: Attacker, sources: Sequence[Source]) -> None:
    """Send from all sources at their rates until the attack is over.

    What falls due while a broker takes nothing, or is not there, is left out: the rate is never exceeded.
    """
    began = attacker.clock()
    alone = len(sources) == 1
    while attacker.running():
        for source in sources:
            due = int((attacker.clock() - began) * source.rate) - source.due
            source.due += due
            if due > 0 and source.client.connected and not source.client.full:
                source.client.send(b"".join(islice(source.packets, due)))
                attacker.sent += due
            source.client.pump(_TURN_S if alone else 0.0)
        if not alone:
            time.sleep(_TURN_S)


def pool(make: Callable[[], bytes], *, size: int = _POOL) -> Iterator[bytes]:
    """Return packets made once, over and over."""
    return cycle([make() for _ in range(size)])


def _code_of(topic: bytes, payload: bytes) -> str:
    """Return the code in a Refused or a Fault, found without decoding: thousands may come in a second."""
    if topic.endswith(b"/verdict"):
        return "verdict"
    place = payload.find(_CODE)
    if place < 0:
        return "other"
    place += len(_CODE)
    length = payload[place] & 0x1F if len(payload) > place else 0
    return payload[place + 1 : place + 1 + length].decode("ascii", "replace") if 0 < length <= _SHORT else "other"
