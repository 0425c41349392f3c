"""Client of attacks, which sends prebuilt packets, and the attacker's knowledge of the fleet."""

import contextlib
import json
import random
import secrets
import select
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from typing import Any, Final, Self

from benchmarks.hostile.messages import DEFAULT_POLICY, close_of, open_of
from schemas.codec import decode_reply
from schemas.errors import CodecError, FleetError
from schemas.fields import SESSION_BYTES
from schemas.messages import Opened, Refused
from schemas.policy import Grammar
from schemas.topics import Topic, build
from schemas.vocabulary import Vocabulary
from tests.support.mqtt_packets import (
    PING,
    IncomingPacket,
    PacketType,
    WillMessage,
    puback_packet,
    publish_packet,
    split_packets,
    subscribe_packet,
)
from tests.support.processes import BrokerClient
from tests.support.raw_client import RawClient, tls_context

_CHUNK: Final = 1 << 16
_CONNECT_S: Final = 10.0
_PING_S: Final = 20.0
_BACKLOG: Final = 1 << 18


class ConnectRefused(FleetError):  # noqa: N818 - reads as what it says
    """The broker has not let the client in."""


class HostileClient:
    """One client, connected when it is first pumped and again when the broker closes the connection."""

    def __init__(
        self,
        identity: BrokerClient,
        *,
        on_publish: Callable[[bytes, bytes], None] = lambda _topic, _payload: None,
        clock: Callable[[], float] = time.monotonic,
        retry_s: float = 0.5,
    ) -> None:
        self.identity = identity
        self.on_publish = on_publish
        self.on_connect: Callable[[], None] = lambda: None
        self.connects = 0
        self.reads = True
        assert identity.tls is not None
        self._context = tls_context(identity.tls)
        self._clock = clock
        self._retry_s = retry_s
        self._not_before = 0.0
        self._pinged = 0.0
        self._socket: ssl.SSLSocket | None = None
        self._out = bytearray()
        self._in = bytearray()

    @property
    def connected(self) -> bool:
        """Return whether there is a connection, as far as is known."""
        return self._socket is not None

    @property
    def full(self) -> bool:
        """Return whether the broker takes less than it is given: nothing more should be sent for now."""
        return len(self._out) > _BACKLOG

    def connect(self, will: WillMessage | None = None) -> None:
        self.abort()
        self._not_before = self._clock() + self._retry_s
        try:
            sock = self._open(will)
        except OSError as error:
            raise ConnectRefused(f"The broker does not take {self.identity.name}: {error}.") from error
        sock.setblocking(False)  # noqa: FBT003 - the standard library's
        self._socket = sock
        self._pinged = self._clock()
        self.connects += 1
        self.on_connect()

    def _open(self, will: WillMessage | None) -> ssl.SSLSocket:
        mine = self.identity
        raw = RawClient(mine.port, self._context, mine.name, host=mine.host, will=will, receive_buffer=None)
        assert isinstance(raw.socket, ssl.SSLSocket)
        return raw.socket

    def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe at QoS 1, all filters in one packet."""
        self.send(subscribe_packet(filters))

    def send(self, packets: bytes) -> None:
        """Send as soon as the socket takes it; lost if there is no connection."""
        if self._socket is not None:
            self._out += packets

    def pump(self, wait_s: float) -> None:
        """Write and read what is possible; wait at most `wait_s` for either."""
        if self._socket is None:
            self._reconnect(wait_s)
            return
        sock = self._socket
        if self._clock() - self._pinged > _PING_S:
            self._pinged = self._clock()
            self._out += PING
        try:
            self._write(sock)
            pending = self.reads and sock.pending() > 0
            readers = [sock] if self.reads else []
            readable, writable, _ = select.select(readers, [sock] if self._out else [], [], 0.0 if pending else wait_s)
            if writable:
                self._write(sock)
            if readable or pending:
                self._read(sock)
        except OSError:
            self._lost()

    def abort(self) -> None:
        """Close the connection without a goodbye, as a power failure would."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
        self._socket = None
        self._out.clear()
        self._in.clear()

    def _reconnect(self, wait_s: float) -> None:
        delay = self._not_before - self._clock()
        if delay > 0:
            time.sleep(min(delay, max(wait_s, 0.001)))
            return
        with contextlib.suppress(ConnectRefused):
            self.connect()

    def _write(self, sock: ssl.SSLSocket) -> None:
        while self._out:
            try:
                sent = sock.send(bytes(self._out[:_CHUNK]))
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            del self._out[:sent]

    def _read(self, sock: ssl.SSLSocket) -> None:
        try:
            received = sock.recv(_CHUNK)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        if not received:
            self._lost()
            return
        self._in += received
        for packet in split_packets(self._in):
            self._take(packet)

    def _take(self, packet: IncomingPacket) -> None:
        if packet.kind == PacketType.PUBLISH:
            topic, identifier, payload = packet.publish()
            if identifier is not None:
                self._out += puback_packet(identifier)
            self.on_publish(topic, payload)
        elif packet.kind == PacketType.DISCONNECT:
            self._lost()

    def _lost(self) -> None:
        if self._socket is not None:
            self._not_before = self._clock() + self._retry_s
            self.abort()


@dataclass(frozen=True, slots=True)
class KnownFleet:
    """What an attacker knows of the fleet, like any honest device.

    Attributes:
        sink: Name of an edge that reads its drafts and ignores them.
        fingerprint: Of the target's vocabulary, in hexadecimal.
        context: Most tokens in one sequence of the target.
        json_begin: Tokens that begin a JSON object, with a string as the value of "a".
        json_filler: The longest token that this string may have.
        identities: The attacker's own, one for each device that it plays.
        control: Whether messages for the edge go to the sink instead.
    """

    fleet: str
    edge: str
    sink: str
    vocabulary_size: int
    fingerprint: str
    context: int
    max_packet_bytes: int
    identities: tuple[BrokerClient, ...]
    json_begin: tuple[int, ...] = ()
    json_filler: int = 0
    control: bool = False

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields: Mapping[str, Any] = json.loads(text)
        identities = tuple(BrokerClient(**each) for each in fields["identities"])
        return cls(**{**fields, "identities": identities, "json_begin": tuple(fields["json_begin"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(size=self.vocabulary_size, fingerprint=bytes.fromhex(self.fingerprint))

    def as_control(self) -> Self:
        """Return the same place for a control: nothing reaches the edge."""
        return replace(self, control=True)

    def topic(self, topic: Topic, identity: BrokerClient) -> str:
        """Return a topic of a device; in a control, one that costs the broker the same and the edge nothing."""
        if topic is Topic.STATE and self.control:
            return build(Topic.CONFIG_REPORTED, fleet=self.fleet, device=identity.name)
        if topic is Topic.DRAFT or (self.control and topic in (Topic.OPEN, Topic.CLOSE)):
            edge = self.sink if self.control else self.edge
            return build(Topic.DRAFT, fleet=self.fleet, device=identity.name, edge=edge)
        return build(topic, fleet=self.fleet, device=identity.name)


_TURN_S: Final = 0.005  # between two writes
_POOL: Final = 512


@dataclass(slots=True)
class Attacker:
    place: KnownFleet
    rng: random.Random
    running: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic
    sent: int = 0
    verdicts: int = 0
    clients: list[HostileClient] = field(default_factory=list)

    def client(
        self,
        identity: BrokerClient | None = None,
        on_publish: Callable[[bytes, bytes], None] = lambda _topic, _payload: None,
    ) -> HostileClient:
        """Return a new client without subscriptions; verdicts for it are counted."""

        def take(topic: bytes, payload: bytes) -> None:
            self.verdicts += topic.endswith(b"/verdict")
            on_publish(topic, payload)

        made = HostileClient(identity or self.place.identities[0], on_publish=take, clock=self.clock)
        made.on_connect = lambda: self.listen(made)
        self.clients.append(made)
        return made

    def listen(self, client: HostileClient) -> None:
        """Subscribe a client to its device's answers, as every device does."""
        client.subscribe(
            [
                self.place.topic(Topic.SESSION, client.identity),
                self.place.topic(Topic.VERDICT, client.identity),
            ]
        )

    def publish(
        self, client: HostileClient, topic: Topic, payload: bytes, *, qos: int = 1, retain: bool = False
    ) -> bytes:
        """Return a PUBLISH packet in the name of a client's device."""
        return publish_packet(self.place.topic(topic, client.identity), payload, qos=qos, retain=retain)

    def send(self, client: HostileClient, topic: Topic, payload: bytes) -> None:
        """Publish at QoS 1 at once."""
        client.send(self.publish(client, topic, payload))
        self.sent += 1


@dataclass(slots=True)
class Source:
    """Packets to send through one client at a rate."""

    client: HostileClient
    packets: Iterator[bytes]
    rate: float
    due: int = 0


def flood(attacker: Attacker, sources: Sequence[Source]) -> None:
    """Send from all sources at their rates until the attack is over.

    What is due while the broker is away or takes nothing is left out: the rate is never exceeded.
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
    return cycle([make() for _ in range(size)])


PATIENCE_S: Final = 30.0
_ASK_AGAIN_S: Final = 2.0
_RETRY_S: Final = 0.2


def wait_for_answer(
    place: KnownFleet,
    identity: BrokerClient,
    *,
    grammar: Grammar | None = None,
    patience_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Connect, open a session, close it, and return the seconds from the first try to the edge's answer.

    The Open is repeated as a device repeats it. A refusal is an answer too.
    """
    session = secrets.token_bytes(SESSION_BYTES)
    answers: list[Opened | Refused] = []

    def take(_topic: bytes, payload: bytes) -> None:
        try:
            reply = decode_reply(payload)
        except CodecError:
            return
        if isinstance(reply, Opened | Refused) and reply.session == session:
            answers.append(reply)

    client = HostileClient(identity, on_publish=take, clock=clock, retry_s=_RETRY_S)
    policy = DEFAULT_POLICY.model_copy(update={"grammar": grammar})
    opening = publish_packet(
        place.topic(Topic.OPEN, identity), open_of(place.vocabulary, session=session, policy=policy)
    )
    client.on_connect = lambda: client.subscribe([place.topic(Topic.SESSION, identity)])
    began, asked = clock(), 0.0
    try:
        while not answers and clock() - began < patience_s:
            if not client.connected:
                asked = 0.0
                try:
                    client.connect()
                except ConnectRefused:
                    time.sleep(_RETRY_S)
                    continue
            if clock() - asked > _ASK_AGAIN_S:
                client.send(opening)
                asked = clock()
            client.pump(0.01)
        waited_s = min(clock() - began, patience_s)
        for answer in answers[:1]:
            if isinstance(answer, Opened):
                closing = close_of(session=session, handle=answer.handle, edge=answer.edge)
                client.send(publish_packet(place.topic(Topic.CLOSE, identity), closing))
                client.pump(0.1)
    finally:
        client.abort()
    return waited_s
