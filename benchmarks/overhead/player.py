"""Player: devices that replay sessions over plain sockets, many of them on one thread, and time the answers.

Each has one draft in flight. Of a verdict it checks only that it answers the draft and accepts what was accepted when
the session was recorded.
"""

import os
import selectors
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

import cbor2

from benchmarks.processes import BenchError
from fleet_common.mqtt.link import Message
from fleet_device.client.agent import Agent
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.generate import GenerateRequest
from fleet_edge.settings import EdgeSettings
from schemas.codec import decode_close, decode_open, decode_reply, decode_verdict, encode_close, encode_open
from schemas.messages import Closed, Opened, Progress
from schemas.policy import Mode, SamplingPolicy
from schemas.topics import Topic, build, wildcard
from tests.support.edge_thread import NO_QUOTAS, edge_thread
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.mqtt_packets import PacketType, publish_packet
from tests.support.raw_client import RawClient
from tests.support.scripted_language import CONTEXT, LANGUAGE, draft_language
from tests.support.scripted_verifier import ScriptedVerifier

DRAFT: Final = 4
"""Tokens of a draft."""

_FLEET, _EDGE, _DEVICE = "played", "edge-1", "device-1"
_HANDLE: Final = 40_000  # three bytes of CBOR behind the array's head
_BEHIND_HANDLE: Final = 4
_PROMPT_TOKENS: Final = 24
_START_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class PlayedSession:
    open: bytes
    drafts: tuple[bytes, ...]
    verdicts: tuple[tuple[int, int], ...]
    close: bytes

    def draft(self, number: int, handle: int) -> bytes:
        """Return a draft with the handle that an edge has given."""
        payload = self.drafts[number]
        return payload[:1] + cbor2.dumps(handle) + payload[1:]

    def verdict(self, number: int, handle: int) -> bytes:
        """Return the expected begin of the verdict on a draft, after the head of its array."""
        round_, accepted = self.verdicts[number]
        return cbor2.dumps(handle) + cbor2.dumps(round_) + cbor2.dumps(accepted)

    def opening(self, session: bytes) -> bytes:
        """Return the session's Open under another name."""
        return encode_open(decode_open(self.open).model_copy(update={"session": session}))

    def closing(self, session: bytes, handle: int, edge: str) -> bytes:
        update = {"session": session, "handle": handle, "edge": edge}
        return encode_close(decode_close(self.close).model_copy(update=update))


def play(count: int, *, mode: Mode, tokens: int, first_seed: int = 0) -> list[PlayedSession]:
    """Let a real device run some sessions of the scripted language; return what it has sent."""
    broker = MemoryBroker()
    sent: list[tuple[str, bytes]] = []
    listener = MemoryLink(broker, "listener")

    def keep(message: Message) -> None:
        sent.append((message.topic, message.payload))

    for topic in (Topic.OPEN, Topic.DRAFT, Topic.CLOSE, Topic.VERDICT):
        listener.subscribe(wildcard(topic, fleet=_FLEET), keep)
    verifier = ScriptedVerifier(LANGUAGE, LANGUAGE.words, context=CONTEXT)
    settings = EdgeSettings(fleet=_FLEET, edge=_EDGE, quotas=NO_QUOTAS)
    link: Any = MemoryLink(broker, _DEVICE)
    agent = Agent(
        link, _FLEET, _DEVICE, ScriptedDrafter(draft_language(), LANGUAGE.words), FixedPacing(DRAFT), time.monotonic
    )
    agent.attach()
    sessions = []
    with (
        broker.running(),
        edge_thread(settings, verifier, link=MemoryLink(broker, _EDGE), first_handle=_HANDLE),
    ):
        listener.start(timeout_s=_START_S)
        link.start(timeout_s=_START_S)
        for seed in range(first_seed, first_seed + count):
            sent.clear()
            policy = SamplingPolicy(mode=mode, temperature=0.7, top_k=50, top_p=0.95, seed=seed)
            prompt = tuple((seed * 31 + place) % LANGUAGE.size for place in range(_PROMPT_TOKENS))
            agent.generate(GenerateRequest(prompt, policy=policy, max_new_tokens=tokens))
            sessions.append(_session(sent))
    return sessions


def _session(sent: list[tuple[str, bytes]]) -> PlayedSession:
    by_topic: dict[str, list[bytes]] = {name: [] for name in ("open", "draft", "close", "verdict")}
    for topic, payload in sent:
        name = next(name for name in by_topic if f"/{name}" in topic)
        if payload not in by_topic[name]:
            by_topic[name].append(payload)
    verdicts = sorted((decode_verdict(payload) for payload in by_topic["verdict"]), key=lambda each: each.round)
    return PlayedSession(
        by_topic["open"][0],
        tuple(payload[:1] + payload[_BEHIND_HANDLE:] for payload in by_topic["draft"]),
        tuple((verdict.round, verdict.accepted) for verdict in verdicts),
        by_topic["close"][0],
    )


_EXPIRY_S: Final = 30
_SILENCE_S: Final = 10.0
_ECHO_BYTES: Final = 29
"""Size of a draft of four tokens in coupled mode."""


@dataclass(slots=True)
class ReplayTally:
    times_s: list[float] = field(default_factory=list)
    wrong: int = 0


class ReplayConnection:
    def __init__(self, port: int, fleet: str, name: str, edge: str, tally: ReplayTally) -> None:
        self.tally = tally
        self._edge = edge
        self._draft_topic = build(Topic.DRAFT, fleet=fleet, device=name, edge=edge)
        self._topics = {topic: build(topic, fleet=fleet, device=name) for topic in (Topic.OPEN, Topic.CLOSE)}
        self._aliased = False
        self._sent_at = 0.0
        self._client = RawClient(port, None, name, receive_buffer=None)
        self.socket = self._client.socket
        self._client.subscribe(*(build(topic, fleet=fleet, device=name) for topic in (Topic.SESSION, Topic.VERDICT)))

    def begin(self) -> None:
        raise NotImplementedError

    def answered(self, topic: bytes, payload: bytes) -> None:
        raise NotImplementedError

    def read(self) -> None:
        for packet in self._client.read():
            if packet.kind == PacketType.PUBLISH:
                topic, _, payload = packet.publish()
                self.answered(topic, payload)

    def send_draft(self, payload: bytes) -> None:
        """Send a draft as the link does: with an alias for its topic."""
        topic = "" if self._aliased else self._draft_topic
        self._aliased = True
        self._sent_at = time.perf_counter()
        self._client.send(publish_packet(topic, payload, alias=1, expiry_s=_EXPIRY_S))

    def send(self, topic: Topic, payload: bytes) -> None:
        self._client.send(publish_packet(self._topics[topic], payload))

    def note(self) -> None:
        self.tally.times_s.append(time.perf_counter() - self._sent_at)


class Echoed(ReplayConnection):
    """Sends anything, to an edge that sends it back."""

    def begin(self) -> None:
        self.send_draft(bytes(_ECHO_BYTES))

    def answered(self, topic: bytes, payload: bytes) -> None:
        del topic
        self.note()
        self.tally.wrong += payload != bytes(_ECHO_BYTES)
        self.send_draft(bytes(_ECHO_BYTES))


class Played(ReplayConnection):
    """Replays sessions, one after another, forever."""

    def __init__(
        self,
        port: int,
        fleet: str,
        name: str,
        edge: str,
        tally: ReplayTally,
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
        """Send the next draft; after the last one close the session and open another."""
        if topic.endswith(b"/session"):
            reply = decode_reply(payload)
            if isinstance(reply, Opened):
                self._handle = reply.handle
                self.send_draft(self._session.draft(0, self._handle))
            elif isinstance(reply, Closed):
                self.begin()
            elif not isinstance(reply, Progress):
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

    def __init__(self, connections: Sequence[ReplayConnection]) -> None:
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
        """Serve them until `done` returns true."""
        while not done():
            ready = self._selector.select(_SILENCE_S)
            if not ready:
                raise BenchError(f"Nothing has been answered for {_SILENCE_S:.0f} s; see whether the edge hangs.")
            for key, _ in ready:
                key.data.read()

    def serve(self, seconds: float) -> float:
        """Serve them for some time; return the seconds."""
        began = time.perf_counter()
        self.until(lambda: time.perf_counter() >= began + seconds)
        return time.perf_counter() - began
