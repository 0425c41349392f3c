"""Messages between a device and its edges: what arrives for each request, what is sent, and which edges are online."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from fleet_common.mqtt.errors import NOT_AUTHORIZED, LinkError, LinkFault, PublishRejected
from fleet_common.mqtt.link import NO_MATCHING_SUBSCRIBERS, Link, Message, OutcomeHandler, PublishOutcome
from fleet_device.errors import EdgeUnavailable
from schemas.codec import decode_reply, decode_verdict, encode_close, encode_draft, encode_open
from schemas.control import EdgeState, Presence, decode_json
from schemas.errors import CodecError, TopicError
from schemas.messages import Close, Closed, Draft, Fault, Open, Opened, Progress, Refused, Verdict
from schemas.topics import TREE, Topic, build, parse, wildcard

# A fleet has a handful of edges; a client that may publish as one must not fill a device's memory.
_MAX_EDGES: Final = 1000


class EdgePresences:
    """The states of all edges. Written on the link's thread, read on any."""

    def __init__(self) -> None:
        self.on_state: Callable[[str, EdgeState], None] = lambda _edge, _state: None
        self._states: dict[str, EdgeState] = {}
        self._changed = threading.Condition()

    def note_state(self, edge: str, state: EdgeState) -> Presence | None:
        """Record an edge's state (named by the topic, which the broker checks); return its presence before."""
        with self._changed:
            before = self._states.get(edge)
            if before is not None or len(self._states) < _MAX_EDGES:
                self._states[edge] = state
                self._changed.notify_all()
        self.on_state(edge, state)
        return None if before is None else before.presence

    def known(self) -> tuple[EdgeState, ...]:
        with self._changed:
            return tuple(state for _, state in sorted(self._states.items()))

    def online(self) -> tuple[EdgeState, ...]:
        return tuple(state for state in self.known() if state.presence is Presence.ONLINE)

    def loading(self) -> tuple[EdgeState, ...]:
        """Return the edges that load their target model and will be online soon."""
        return tuple(state for state in self.known() if state.loading is not None)

    def targets(self, *, online: bool = False) -> tuple[str, ...]:
        """Return the names of the target models of all edges, or of those that are online."""
        return tuple(dict.fromkeys(state.target for state in (self.online() if online else self.known())))

    def serving(self, target_id: bytes | None) -> tuple[EdgeState, ...]:
        """Return the edges that are online with a target model; None for any."""
        return tuple(state for state in self.online() if target_id is None or state.target_id == target_id.hex())

    def absence(self, fleet: str, target_id: bytes | None = None) -> str:
        """Return why no edge of the fleet can be used, and what to do; `target_id` names the one target that can be."""
        if target_id is not None and (others := self.online()):
            serve = ", ".join(f"{state.edge} has {state.target} ({state.target_id})" for state in others)
            return (
                f"The request is for target model {target_id.hex()}, and no edge of fleet {fleet!r} that is online "
                f"has it ({serve}); start one with it, or allow another target model by offline = 'other-target'."
            )
        if loading := self.loading():
            first = max(loading, key=lambda state: state.loading or 0)
            return (
                f"Edge {first.edge!r} of fleet {fleet!r} loads its target model ({first.loading} % so far); wait until "
                "it is online."
            )
        known = [f"{state.edge} is {state.presence.value}" for state in self.known()]
        heard = f"edge {', '.join(known)}" if known else "none has sent a message"
        return (
            f"No edge of fleet {fleet!r} is online ({heard}); start one with `fleet edge run`, or check that it uses "
            "the same broker and fleet name."
        )

    def wait_known(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for the state of any edge."""
        with self._changed:
            self._changed.wait_for(lambda: self._states, timeout_s)

    def wait_online(self, timeout_s: float, *, edge: str | None = None) -> bool:
        """Wait at most `timeout_s` for an edge, or the named one, to be online."""

        def there() -> bool:
            states = self._states.values() if edge is None else filter(None, (self._states.get(edge),))
            return any(state.presence is Presence.ONLINE for state in states)

        with self._changed:
            return self._changed.wait_for(there, timeout_s)


_log = logging.getLogger(__name__)

_MAX_BYTES: Final = 4 << 20
_EVENT_BYTES: Final = 512
"""Size of a message in addition to its payload, roughly."""


@dataclass(frozen=True, slots=True)
class ReceivedVerdict:
    verdict: Verdict
    size: int


@dataclass(frozen=True, slots=True)
class EdgeStateChanged:
    """An edge has published its state; `before` is None if it was unknown."""

    edge: str
    presence: Presence
    before: Presence | None = None


@dataclass(frozen=True, slots=True)
class ConnectionChanged:
    up: bool


@dataclass(frozen=True, slots=True)
class Undelivered:
    """The broker took a message without a subscriber: no edge listens."""

    topic: Topic


@dataclass(frozen=True, slots=True)
class Wake:
    """Wake the driver so that it checks for cancellation."""


Event = (
    ReceivedVerdict
    | Opened
    | Refused
    | Closed
    | Fault
    | Progress
    | EdgeStateChanged
    | ConnectionChanged
    | Undelivered
    | Wake
)


@dataclass(slots=True)
class Inbox:
    """The agent's events, in order of arrival.

    Concurrent requests have an inbox each, made by `another` from the one that the link fills. Each receives all events
    and ignores those of other requests.

    Attributes:
        rejected: Why the broker rejected the last message, if this device has no permission.
        listener: Receives each event before it is queued, on the thread that it comes on; also between two requests.
    """

    edges: EdgePresences = field(default_factory=EdgePresences)
    malformed: int = 0
    dropped: int = 0
    rejected: PublishRejected | None = None
    listener: Callable[[Event], None] = lambda _event: None
    _queue: "queue.SimpleQueue[tuple[Event, int]]" = field(default_factory=queue.SimpleQueue)
    _waiting_bytes: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _first: "Inbox | None" = None  # the one that the link fills, if this is not it
    _open: "tuple[Inbox, ...]" = ()  # further ones that are read

    def another(self) -> "Inbox":
        """Return a further inbox, for another request; it receives nothing until it is `reading`."""
        return Inbox(edges=self.edges, _first=self)

    @contextmanager
    def reading(self) -> Iterator[None]:
        while self.get() is not None:
            pass
        if (first := self._first) is None:
            yield
            return
        first.pass_on(self)
        try:
            yield
        finally:
            first.pass_on(self, ends=True)

    def pass_on(self, inbox: "Inbox", *, ends: bool = False) -> None:
        with self._counting:
            others = tuple(each for each in self._open if each is not inbox)
            self._open = others if ends else (*others, inbox)

    def subscribe(self, link: Link, *, fleet: str, device: str) -> None:
        link.subscribe(build(Topic.SESSION, fleet=fleet, device=device), self._on_message)
        link.subscribe(build(Topic.VERDICT, fleet=fleet, device=device), self._on_message)
        link.subscribe(wildcard(Topic.EDGE_STATE, fleet=fleet), self._on_message)
        link.on_connection(lambda up: self.put(ConnectionChanged(up)))

    def put(self, event: Event, *, size: int = 0) -> None:
        """Add an event; never blocks.

        If there is no room for the `size` bytes of its message, it is dropped as if it were lost: between two requests
        nobody reads, and an edge may send without end.
        """
        self.listener(event)
        for each in self._open:
            each.put(event, size=size)
        if size:
            with self._counting:
                if self._waiting_bytes and self._waiting_bytes + size > _MAX_BYTES:
                    self.dropped += 1
                    return
                self._waiting_bytes += size
        self._queue.put((event, size))

    def get(self, *, timeout_s: float = 0.0) -> Event | None:
        try:
            event, size = self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if size:
            with self._counting:
                self._waiting_bytes -= size
        return event

    def on_undelivered(self, topic: Topic) -> OutcomeHandler:
        def listen(outcome: PublishOutcome) -> None:
            self.note(outcome)
            if outcome.reason == NO_MATCHING_SUBSCRIBERS:
                self.put(Undelivered(topic))

        return listen

    def note(self, outcome: PublishOutcome) -> None:
        rejected = outcome.reason == NOT_AUTHORIZED
        self.rejected = PublishRejected(topic=outcome.topic, reason=outcome.reason) if rejected else None
        if self._first is not None:
            self._first.rejected = self.rejected

    def _on_message(self, message: Message) -> None:
        size = len(message.payload) + _EVENT_BYTES
        try:
            address = parse(message.topic)
            match address.topic:
                case Topic.VERDICT:
                    self.put(ReceivedVerdict(decode_verdict(message.payload), len(message.payload)), size=size)
                case Topic.SESSION:
                    self.put(decode_reply(message.payload), size=size)
                case Topic.EDGE_STATE if address.edge is not None:
                    state = decode_json(EdgeState, message.payload)
                    before = self.edges.note_state(address.edge, state)
                    self.put(EdgeStateChanged(address.edge, state.presence, before), size=size)
        except (CodecError, TopicError) as error:
            self.malformed += 1
            _log.warning("A message on %s is ignored: %s", message.topic, error)


_RULES = {rule.topic: rule for rule in TREE}


@dataclass(frozen=True, slots=True)
class Outbound:
    """Send messages; drafts are padded to a multiple of `padding` bytes, 0 for none."""

    link: Link
    fleet: str
    device: str
    inbox: Inbox
    padding: int = 0

    @property
    def connected(self) -> bool:
        return self.link.connected

    def silence(self, waited_s: float, *, edge: str | None = None, target_id: bytes | None = None) -> EdgeUnavailable:
        """Return why nobody has answered for `waited_s` and what to do.

        `edge` has the session, if any has; an edge must have the target model `target_id` to continue it, if given.
        """
        if not self.connected:
            failure = self.link.failure
            if failure is not None and failure.refused:
                return EdgeUnavailable(str(failure), code=failure.fault)
            return EdgeUnavailable(
                f"The broker has not been reachable for {waited_s:.0f} s; check that it runs and try again.",
                code=LinkFault.UNREACHABLE,
            )
        if edge is not None:
            return EdgeUnavailable(
                f"Edge {edge!r} has the session and has not answered for {waited_s:.0f} s; see whether it hangs, and "
                "end it if it does."
            )
        if self.inbox.rejected is not None:
            return EdgeUnavailable(str(self.inbox.rejected), code=LinkFault.NOT_AUTHORIZED)
        edges = self.inbox.edges
        if online := [state.edge for state in edges.serving(target_id)]:
            return EdgeUnavailable(
                f"Edge {online[0]!r} is online and has not answered within {waited_s:.0f} s: it has too much to do, or "
                "prepares the request's grammar; try again."
            )
        code = "other_target" if edges.online() else "edge_unavailable"
        return EdgeUnavailable(f"No answer within {waited_s:.0f} s. {edges.absence(self.fleet, target_id)}", code=code)

    def publish_open(self, message: Open) -> None:
        self._publish(Topic.OPEN, encode_open(message))

    def publish_draft(self, message: Draft, *, edge: str) -> int:
        payload = encode_draft(message, padding=self.padding)
        self._publish(Topic.DRAFT, payload, edge=edge)
        return len(payload)

    def publish_close(self, message: Close) -> None:
        self._publish(Topic.CLOSE, encode_close(message))

    def _publish(self, topic: Topic, payload: bytes, *, edge: str | None = None) -> None:
        """Send a message. What the link cannot take is logged: it is repeated when no answer comes."""
        rule = _RULES[topic]
        try:
            self.link.publish(
                build(topic, fleet=self.fleet, device=self.device, edge=edge),
                payload,
                qos=rule.qos,
                expiry_s=rule.expiry_s,
                content_type=None if rule.hot else rule.content_type,
                alias=rule.hot,
                on_outcome=self.inbox.on_undelivered(topic),
            )
        except LinkError as error:
            _log.warning("Not sent: %s", error)
