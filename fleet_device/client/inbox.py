"""Inbox: what arrives from the edges, for the request that is running, and which edges are there."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from fleet_common.mqtt.errors import NOT_AUTHORIZED, PublishRejected
from fleet_common.mqtt.link import NO_MATCHING_SUBSCRIBERS, Link, Message, Outcome, OutcomeHandler
from schemas.codec import decode_reply, decode_verdict
from schemas.control import EdgeState, Presence, decode_json
from schemas.errors import CodecError, TopicError
from schemas.messages import Closed, Fault, Opened, Refused, Verdict
from schemas.topics import Topic, build, parse, wildcard

# A fleet has a handful of edges; whoever may publish as one must not fill a device's memory all the same.
_MOST_EDGES: Final = 1000


class EdgePresences:
    """The one store of edge states. Written on the link's thread, read on any."""

    def __init__(self) -> None:
        self._states: dict[str, EdgeState] = {}
        self._changed = threading.Condition()

    def note(self, edge: str, state: EdgeState) -> Presence | None:
        """Take an edge's new state; return its presence before, or None if nothing was known of it.

        Args:
            edge: Its name by the topic, which the broker has checked.
            state: As published.
        """
        with self._changed:
            before = self._states.get(edge)
            if before is not None or len(self._states) < _MOST_EDGES:
                self._states[edge] = state
                self._changed.notify_all()
            return None if before is None else before.presence

    def known(self) -> tuple[EdgeState, ...]:
        """Return all states, by name of the edge."""
        with self._changed:
            return tuple(state for _, state in sorted(self._states.items()))

    def online(self) -> tuple[EdgeState, ...]:
        """Return the states of those that take new sessions."""
        return tuple(state for state in self.known() if state.presence is Presence.ONLINE)

    def wait_online(self, timeout_s: float, *, edge: str | None = None) -> bool:
        """Return whether an edge is online, or one of that name; wait for it at most `timeout_s`."""

        def there() -> bool:
            states = self._states.values() if edge is None else filter(None, (self._states.get(edge),))
            return any(state.presence is Presence.ONLINE for state in states)

        with self._changed:
            return self._changed.wait_for(there, timeout_s)


_log = logging.getLogger(__name__)

_MOST_BYTES: Final = 4 << 20
_EVENT_BYTES: Final = 512
"""Of a message beside its payload, about."""


@dataclass(frozen=True, slots=True)
class ReceivedVerdict:
    """A verdict and its payload's size."""

    verdict: Verdict
    size: int


@dataclass(frozen=True, slots=True)
class EdgeStateChanged:
    """An edge has published its state.

    Attributes:
        edge: Its name.
        presence: As published.
        before: What was known of it until then; None for nothing.
    """

    edge: str
    presence: Presence
    before: Presence | None = None


@dataclass(frozen=True, slots=True)
class ConnectionChanged:
    """The link was made or lost."""

    up: bool


@dataclass(frozen=True, slots=True)
class Undelivered:
    """The broker took a message and had nobody to give it to: no edge listens."""

    topic: Topic


@dataclass(frozen=True, slots=True)
class Wake:
    """Look at the cancellation flag."""


Event = ReceivedVerdict | Opened | Refused | Closed | Fault | EdgeStateChanged | ConnectionChanged | Undelivered | Wake


@dataclass(slots=True)
class Inbox:
    """The agent's events, in order of arrival.

    Several texts at once have an inbox each, `beside` the one that the link fills: each gets all that arrives, and
    passes over what is another's.

    Attributes:
        edges: Where the edges' states are kept.
        malformed: Payloads that were no messages.
        dropped: Messages of edges for which there was no room.
        rejected: Why the broker did not take the last message, if it does not let this device speak.
        listener: Told of each event before it is queued, on the thread that it comes on; also between two texts.
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
    _open: "tuple[Inbox, ...]" = ()  # those beside it that are read

    def beside(self) -> "Inbox":
        """Return a further inbox, for another text; it gets nothing until it is `reading`."""
        return Inbox(edges=self.edges, _first=self)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Have what arrives from now on come here too. What has come before is passed over."""
        while self.take() is not None:
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
        """Give another inbox all that comes from now on, or nothing more."""
        with self._counting:
            others = tuple(each for each in self._open if each is not inbox)
            self._open = others if ends else (*others, inbox)

    def subscribe(self, link: Link, *, fleet: str, device: str) -> None:
        """Subscribe to what a device may hear."""
        link.subscribe(build(Topic.SESSION, fleet=fleet, device=device), self._on_message)
        link.subscribe(build(Topic.VERDICT, fleet=fleet, device=device), self._on_message)
        link.subscribe(wildcard(Topic.EDGE_STATE, fleet=fleet), self._on_message)
        link.on_connection(lambda up: self.put(ConnectionChanged(up)))

    def put(self, event: Event, *, size: int = 0) -> None:
        """Add an event. Never blocks.

        Args:
            event: What has happened.
            size: Bytes of the message that told it. One for which there is no room is dropped, as one that is lost on
                its way would be: between two texts nobody takes what an edge may send without end.
        """
        self.listener(event)
        for each in self._open:
            each.put(event, size=size)
        if size:
            with self._counting:
                if self._waiting_bytes and self._waiting_bytes + size > _MOST_BYTES:
                    self.dropped += 1
                    return
                self._waiting_bytes += size
        self._queue.put((event, size))

    def take(self, *, timeout_s: float = 0.0) -> Event | None:
        """Return the next event; wait for it at most `timeout_s`."""
        try:
            event, size = self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if size:
            with self._counting:
                self._waiting_bytes -= size
        return event

    def on_undelivered(self, topic: Topic) -> OutcomeHandler:
        """Return a listener for the outcome of a publish on `topic`."""

        def listen(outcome: Outcome) -> None:
            self.note(outcome)
            if outcome.reason == NO_MATCHING_SUBSCRIBERS:
                self.put(Undelivered(topic))

        return listen

    def note(self, outcome: Outcome) -> None:
        """Note whether the broker lets this device speak."""
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
                    before = self.edges.note(address.edge, state)
                    self.put(EdgeStateChanged(address.edge, state.presence, before), size=size)
        except (CodecError, TopicError) as error:
            self.malformed += 1
            _log.warning("A message on %s is ignored: %s", message.topic, error)
