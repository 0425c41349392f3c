"""Link: what both ends need of a message broker, as one small interface.

A link delivers at least once and, for one publisher and topic, in order while the connection lasts. Handlers
run on the link's own thread and MUST NOT block: they hand over and return.

After a lost connection the link sends again what the broker had not yet acknowledged (QoS 1, within its
expiry), so a receiver may see a message twice. What others published in between is lost to this client,
retained messages excepted: a broker keeps no session for a link. The protocol above is idempotent and asks
again.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fleet_common.mqtt.counters import Accepts, LinkCounters
from fleet_common.mqtt.errors import ConnectFailed, PublishRejected

__all__ = [
    "NO_MATCHING_SUBSCRIBERS",
    "PACKET_TOO_LARGE",
    "Accepts",
    "Handler",
    "Link",
    "Listener",
    "Message",
    "Outcome",
    "OutcomeHandler",
    "Will",
    "publish_confirmed",
]

NO_MATCHING_SUBSCRIBERS = 0x10
PACKET_TOO_LARGE = 0x95
FIRST_ERROR = 0x80


@dataclass(frozen=True, slots=True)
class Message:
    """A received message.

    Attributes:
        topic: Full topic.
        payload: Bytes.
        retained: Whether it is the broker's kept copy rather than a fresh one.
    """

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained, when this client vanishes without saying goodbye."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """The broker's answer to a QoS 1 publish.

    Attributes:
        topic: Where to.
        reason: MQTT 5 reason code; below 0x80 is success, `NO_MATCHING_SUBSCRIBERS` included.
    """

    topic: str
    reason: int

    @property
    def accepted(self) -> bool:
        """Whether the broker took it, with or without someone to pass it on to."""
        return self.reason < FIRST_ERROR

    @property
    def delivered(self) -> bool:
        """Whether the broker took it and had someone to pass it on to."""
        return self.accepted and self.reason != NO_MATCHING_SUBSCRIBERS


Handler = Callable[[Message], None]
Listener = Callable[[bool], None]
OutcomeHandler = Callable[[Outcome], None]


class Link(Protocol):
    """One client of the broker."""

    def start(self, *, timeout_s: float) -> None:
        """Connect and begin to deliver; subscriptions made before are in force on return.

        A broker that does not answer is tried again until `timeout_s` is over; one that turns us away is
        not. Does nothing if already started. After a failure, or after `stop`, it may be called again.

        Raises:
            ConnectFailed: The broker was not reached within `timeout_s`, or refused us.
        """

    def stop(self) -> None:
        """Say goodbye (no last will), flush what can be flushed shortly, end the thread. Idempotent."""

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 1, retained: bool = True) -> None:
        """Route messages that match `topic_filter` to `handler`; may be called before or after `start`.

        MUST be renewed by the link itself after every reconnect. A handler's exception MUST NOT reach the
        link's thread; it is logged and counted. A second handler for the same filter replaces the first. A
        message that matches several filters reaches the handler of each, and may do so more than once.

        Args:
            topic_filter: Topics, with wildcards or a shared subscription's prefix.
            handler: Gets the messages, on the link's thread.
            qos: 0 or 1.
            retained: Whether the broker sends what it keeps for these topics, now and after every reconnect. Where
                nothing is meant to be kept, False spares the subscriber what somebody has left there all the same.

        Raises:
            ValueError: The filter is not a valid one, or `qos` is neither 0 nor 1.
        """

    def unsubscribe(self, topic_filter: str) -> None:
        """End a subscription; unknown filters are ignored."""

    def screen(self, accepts: Accepts) -> None:
        """Ask `accepts(topic, packet_bytes, retained)` about every message before anything of it is decoded.

        What it refuses is acknowledged and dropped at the cost of a few microseconds, so that a flood costs little.
        It runs on the link's thread, for every message of every subscription, and MUST be quick. If it raises, the
        message is accepted. A second one replaces the first; it holds across reconnects.

        Args:
            accepts: Gets the topic as UTF-8, the bytes of the whole packet, and whether it is the broker's kept copy.
        """

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: int | None = None,
        content_type: str | None = None,
        alias: bool = False,
        priority: bool = False,
        on_outcome: OutcomeHandler | None = None,
    ) -> None:
        """Send a message. Never blocks; callable from any thread.

        While disconnected, QoS 1 is queued and QoS 0 is dropped. Messages of one flow and priority stay in order, and
        flows take turns; a flow is all topics with the same first four levels: `dssd/v1/<fleet>/<client>`. Where the
        queue is full, the newest messages of the flow that has most waiting are dropped for those of one that has
        less; what is retained at QoS 1 never is.

        Args:
            topic: Full topic.
            payload: Bytes.
            qos: 0 or 1.
            retain: Whether the broker keeps it.
            expiry_s: Seconds after which an undelivered message is dropped, here and at the broker.
            content_type: MQTT 5 content type; costs its length in every packet.
            alias: Whether to send the topic once and a two-byte alias from then on.
            priority: Whether it goes before messages without; these are not held up for good.
            on_outcome: Called on the link's thread with the broker's answer (QoS 1). Not called for a message
                that expired here, made room, or was still unanswered at `stop`.

        Raises:
            PacketTooLarge: The broker announced a smaller limit.
            NotConnected: The bounded queue is full, and no other flow has more of it.
            ValueError: The topic has wildcards or is empty, or `qos` is neither 0 nor 1.
        """

    def on_connection(self, listener: Listener) -> None:
        """Call `listener(True)` after every connect and `listener(False)` after every loss.

        It runs on the link's thread; at `listener(True)` the subscriptions are in force. A broker that
        restarted may have forgotten what was retained: this is the place to publish it again.
        """

    @property
    def connected(self) -> bool: ...

    @property
    def failure(self) -> ConnectFailed | None:
        """Why the link is not connected, as far as is known; None while it is."""

    @property
    def max_packet_bytes(self) -> int:
        """Largest packet that can be published."""

    @property
    def counters(self) -> LinkCounters:
        """What this link has counted since it was made."""


def publish_confirmed(
    link: Link,
    topic: str,
    payload: bytes,
    *,
    timeout_s: float,
    retain: bool = False,
    expiry_s: int | None = None,
    content_type: str | None = None,
) -> Outcome:
    """Publish at QoS 1 and return the broker's answer, which may be that nobody listens.

    Blocks, so it MUST NOT be called from a handler.

    Raises:
        PublishRejected: The broker says no, or nothing within `timeout_s`.
        PacketTooLarge: As `Link.publish`.
        NotConnected: Likewise.
    """
    answered = threading.Event()
    answers: list[Outcome] = []

    def remember(outcome: Outcome) -> None:
        answers.append(outcome)
        answered.set()

    link.publish(
        topic,
        payload,
        retain=retain,
        expiry_s=expiry_s,
        content_type=content_type,
        on_outcome=remember,
    )
    if not answered.wait(timeout_s):
        raise PublishRejected(topic=topic, reason=None)
    if not answers[0].accepted:
        raise PublishRejected(topic=topic, reason=answers[0].reason)
    return answers[0]
