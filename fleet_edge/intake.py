"""Intake: check size and format of arriving messages on the link's thread, and queue them for the orchestrator.

Everything from a device is hostile until checked. The sender comes from the topic, which the broker has checked against
the sender's identity, and from nowhere else.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fleet_common.limits import FairQueue
from fleet_common.mqtt.link import Link, Message
from schemas.codec import decode_close, decode_draft, decode_open
from schemas.control import DeviceState, Telemetry, decode_json
from schemas.errors import CodecError, TopicError
from schemas.messages import Close, Draft, Open
from schemas.topics import Topic, parse, wildcard

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Malformed:
    """A payload that could not be decoded, and why."""

    topic: Topic
    sentence: str


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """A device's message: the device of its topic, payload bytes, arrival in monotonic seconds."""

    device: str
    message: Open | Draft | Close | DeviceState | Telemetry | Malformed
    size: int
    at: float


_COST_BASE: Final = 256
"""Cost of a message in bytes in addition to its size, for handling it."""

_QUANTUM: Final = 4096.0


class IntakeQueue:
    """Bounded queue from the link's thread and the jobs to the orchestrator; devices take turns.

    If it is full, the device with most waiting messages loses its newest: devices repeat what was not answered. Calls
    always fit, and come first.
    """

    def __init__(self, bound: int = 10_000) -> None:
        self.dropped = 0
        self._bound = bound
        self._calls: deque[Callable[[], None]] = deque()
        self._messages = FairQueue[str, ReceivedMessage](bound=bound, quantum=_QUANTUM)
        self._changed = threading.Condition()
        self._woken = False

    def wake(self) -> None:
        """End a wait in `take`. Call it from any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def put(self, entry: ReceivedMessage | Callable[[], None]) -> bool:
        """Queue a message, or a call for the orchestrator's thread; return False if a message was dropped."""
        with self._changed:
            lost: ReceivedMessage | None = None
            if isinstance(entry, ReceivedMessage):
                lost = self._messages.put(entry.device, entry, cost=_COST_BASE + entry.size)
            else:
                self._calls.append(entry)
            self._changed.notify()
        if lost is None:
            return True
        self.dropped += 1
        if self.dropped == 1 or self.dropped % 1000 == 0:
            sentence = "The inbox is full (%d messages); %d dropped so far, the last of %s."
            _log.warning(sentence, self._bound, self.dropped, lost.device)
        return False

    def take(self, *, timeout_s: float, most: int = 256) -> list[ReceivedMessage | Callable[[], None]]:
        """Return queued entries, fairly by device; wait at most `timeout_s` for the first, or until `wake`.

        `most` bounds the messages, so that a flood does not keep steps from being computed.
        """
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(lambda: self._woken or self._calls or len(self._messages), timeout_s)
                self._woken = False
            entries: list[ReceivedMessage | Callable[[], None]] = [*self._calls]
            self._calls.clear()
            for _ in range(most):
                message = self._messages.pop()
                if message is None:
                    break
                entries.append(message)
            return entries


_DECODERS: dict[Topic, Callable[[bytes], Open | Draft | Close | DeviceState | Telemetry]] = {
    Topic.OPEN: decode_open,
    Topic.DRAFT: decode_draft,
    Topic.CLOSE: decode_close,
    Topic.STATE: lambda payload: decode_json(DeviceState, payload),
    Topic.TELEMETRY: lambda payload: decode_json(Telemetry, payload),
}


def leave_opens(link: Link, *, fleet: str) -> None:
    """Stop receiving Opens; the broker then sends them to the fleet's other edges."""
    link.unsubscribe(_shared(Topic.OPEN, fleet))


@dataclass(frozen=True, slots=True)
class Intake:
    """Subscribes to the devices' topics and fills the inbox."""

    inbox: IntakeQueue
    clock: Callable[[], float]

    def subscribe(self, link: Link, *, fleet: str, edge: str) -> None:
        """Subscribe. Opens and telemetry go to one edge of the fleet, drafts to the edge they name, the rest to all.

        Only states are meant to be retained; retained messages on other topics are ignored.
        """
        self.take_opens(link, fleet=fleet)
        link.subscribe(wildcard(Topic.DRAFT, fleet=fleet, edge=edge), self.on_message, retained=False)
        link.subscribe(wildcard(Topic.CLOSE, fleet=fleet), self.on_message, retained=False)
        link.subscribe(wildcard(Topic.STATE, fleet=fleet), self.on_message)
        link.subscribe(_shared(Topic.TELEMETRY, fleet), self.on_message, retained=False)

    def take_opens(self, link: Link, *, fleet: str) -> None:
        """Receive Opens, for the first time or again after `leave_opens`."""
        link.subscribe(_shared(Topic.OPEN, fleet), self.on_message, retained=False)

    def on_message(self, message: Message) -> None:
        """Decode and queue one message; empty ones, sent when a retained message is cleared, are ignored."""
        if not message.payload:
            return
        at = self.clock()
        try:
            address = parse(message.topic)
        except TopicError as error:
            _log.warning("%s", error)
            return
        if address.device is None or address.topic not in _DECODERS:
            return
        decoded: Open | Draft | Close | DeviceState | Telemetry | Malformed
        try:
            decoded = _DECODERS[address.topic](message.payload)
        except CodecError as error:
            decoded = Malformed(address.topic, str(error))
        self.inbox.put(ReceivedMessage(address.device, decoded, len(message.payload), at))


def _shared(topic: Topic, fleet: str) -> str:
    return f"$share/edges/{wildcard(topic, fleet=fleet)}"
