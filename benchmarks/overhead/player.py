"""Player: devices that send played sessions over plain sockets, and time the answers; many of them on one thread.

Each has one draft under way. It checks no more of a verdict than that it answers the draft and accepts what was
accepted when the session was recorded.
"""

import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from benchmarks.overhead.played import PlayedSession
from benchmarks.processes import BenchError
from schemas.codec import decode_reply
from schemas.messages import Closed, Opened
from schemas.topics import Topic, build
from tests.support.mqtt_packets import (
    IncomingPacket,
    PacketType,
    connect_packet,
    puback_packet,
    publish_packet,
    split_packets,
    subscribe_packet,
)

_CHUNK: Final = 1 << 16
_CONNECT_S: Final = 10.0
_EXPIRY_S: Final = 30
_SILENCE_S: Final = 10.0
_ECHO_BYTES: Final = 29
"""Of a draft of four tokens in coupled mode."""


@dataclass(slots=True)
class Tally:
    """What was answered.

    Attributes:
        times_s: From sending a draft to its answer, in order.
        wrong: Verdicts that were not the recorded ones.
    """

    times_s: list[float] = field(default_factory=list)
    wrong: int = 0


class Connection:
    """A device's connection."""

    def __init__(self, port: int, fleet: str, name: str, edge: str, tally: Tally) -> None:
        self.tally = tally
        self._edge = edge
        self._draft_topic = build(Topic.DRAFT, fleet=fleet, device=name, edge=edge)
        self._topics = {topic: build(topic, fleet=fleet, device=name) for topic in (Topic.OPEN, Topic.CLOSE)}
        self._aliased = False
        self._in = bytearray()
        self._sent_at = 0.0
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(connect_packet(name, username=name))
        self._await(PacketType.CONNACK)
        answers = [build(topic, fleet=fleet, device=name) for topic in (Topic.SESSION, Topic.VERDICT)]
        self.socket.sendall(subscribe_packet(answers))
        self._await(PacketType.SUBACK)

    def begin(self) -> None:
        raise NotImplementedError

    def answered(self, topic: bytes, payload: bytes) -> None:
        raise NotImplementedError

    def read(self) -> None:
        self._in += self.socket.recv(_CHUNK)
        for packet in split_packets(self._in):
            if packet.kind == PacketType.PUBLISH:
                topic, identifier, payload = packet.publish()
                if identifier is not None:
                    self.socket.sendall(puback_packet(identifier))
                self.answered(topic, payload)

    def send_draft(self, payload: bytes) -> None:
        """Send a draft as the link does: with an alias for its topic."""
        topic = "" if self._aliased else self._draft_topic
        self._aliased = True
        self._sent_at = time.perf_counter()
        self.socket.sendall(publish_packet(topic, payload, alias=1, expiry_s=_EXPIRY_S))

    def send(self, topic: Topic, payload: bytes) -> None:
        self.socket.sendall(publish_packet(self._topics[topic], payload))

    def note(self) -> None:
        self.tally.times_s.append(time.perf_counter() - self._sent_at)

    def _await(self, kind: int) -> IncomingPacket:
        while True:
            for packet in split_packets(self._in):
                if packet.kind == kind:
                    return packet
            chunk = self.socket.recv(_CHUNK)
            if not chunk:
                raise BenchError("The broker has hung up on a device of the benchmark.")
            self._in += chunk


class Echoed(Connection):
    """Sends anything, to an edge that sends it back."""

    def begin(self) -> None:
        self.send_draft(bytes(_ECHO_BYTES))

    def answered(self, topic: bytes, payload: bytes) -> None:
        del topic
        self.note()
        self.tally.wrong += payload != bytes(_ECHO_BYTES)
        self.send_draft(bytes(_ECHO_BYTES))


class Played(Connection):
    """Plays sessions, one after another, for ever."""

    def __init__(
        self,
        port: int,
        fleet: str,
        name: str,
        edge: str,
        tally: Tally,
        *,
        sessions: Sequence[PlayedSession],
        first: int,
    ) -> None:
        super().__init__(port, fleet, name, edge, tally)
        self._sessions = sessions
        self._next = first
        self._session = sessions[0]
        self._name = b""
        self._handle = 0
        self._number = 0

    def begin(self) -> None:
        self._session = self._sessions[self._next % len(self._sessions)]
        self._next += 1
        self._name = os.urandom(8)
        self._number = 0
        self.send(Topic.OPEN, self._session.opening(self._name))

    def answered(self, topic: bytes, payload: bytes) -> None:
        """Send the next draft; behind the last one close the session, and then open another."""
        if topic.endswith(b"/session"):
            reply = decode_reply(payload)
            if isinstance(reply, Opened):
                self._handle = reply.handle
                self.send_draft(self._session.draft(0, self._handle))
            elif isinstance(reply, Closed):
                self.begin()
            else:
                raise BenchError(f"The edge does not verify: {reply.sentence}")
            return
        self.note()
        self.tally.wrong += not payload[1:].startswith(self._session.verdict(self._number, self._handle))
        self._number += 1
        if self._number < len(self._session.drafts):
            self.send_draft(self._session.draft(self._number, self._handle))
        else:
            self.send(Topic.CLOSE, self._session.closing(self._name, self._handle, self._edge))


class Player(AbstractContextManager["Player"]):
    """Connections that are served together."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections
        self._selector = selectors.DefaultSelector()
        for connection in connections:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        for connection in self._connections:
            connection.socket.close()

    def until(self, done: Callable[[], bool]) -> None:
        """Serve them until something is so.

        Raises:
            BenchError: Nothing has come for long.
        """
        while not done():
            ready = self._selector.select(_SILENCE_S)
            if not ready:
                raise BenchError(f"Nothing has been answered for {_SILENCE_S:.0f} s; see whether the edge hangs.")
            for key, _ in ready:
                key.data.read()

    def serve(self, seconds: float) -> float:
        """Serve them for a while; return how long it was (seconds)."""
        began = time.perf_counter()
        self.until(lambda: time.perf_counter() >= began + seconds)
        return time.perf_counter() - began
