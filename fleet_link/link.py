"""What both ends need of a message broker, as one small interface.

A link delivers at least once and, for one publisher and topic, in order while the connection lasts. Handlers
run on the link's own thread and MUST NOT block: they hand over and return.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["NO_MATCHING_SUBSCRIBERS", "Handler", "Link", "Message", "Outcome", "Will"]

NO_MATCHING_SUBSCRIBERS = 0x10


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
    def delivered(self) -> bool:
        """Whether the broker took it and had someone to pass it on to."""
        return self.reason < 0x80 and self.reason != NO_MATCHING_SUBSCRIBERS  # noqa: PLR2004


Handler = Callable[[Message], None]


class Link(Protocol):
    """One client of the broker."""

    def start(self, *, timeout_s: float) -> None:
        """Connect and begin to deliver; subscriptions made before are in force on return.

        Raises:
            ConnectFailed: The broker was not reached within `timeout_s`, or refused us.
        """

    def stop(self) -> None:
        """Say goodbye (no last will), flush what can be flushed shortly, end the thread. Idempotent."""

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 1) -> None:
        """Route messages that match `topic_filter` to `handler`; may be called before or after `start`.

        MUST be renewed by the link itself after every reconnect. A handler's exception MUST NOT reach the
        link's thread; it is logged and counted.
        """

    def unsubscribe(self, topic_filter: str) -> None:
        """End a subscription; unknown filters are ignored."""

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
        on_outcome: Callable[[Outcome], None] | None = None,
    ) -> None:
        """Send a message, or queue it while disconnected. Never blocks; callable from any thread.

        Args:
            topic: Full topic.
            payload: Bytes.
            qos: 0 or 1.
            retain: Whether the broker keeps it.
            expiry_s: Seconds after which an undelivered message is dropped, here and at the broker.
            content_type: MQTT 5 content type.
            alias: Whether to send the topic once and a two-byte alias from then on.
            on_outcome: Called on the link's thread with the broker's answer (QoS 1).

        Raises:
            PacketTooLarge: The broker announced a smaller limit.
            NotConnected: Disconnected, and the bounded queue is full.
        """

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        """Call `listener(True)` after every connect and `listener(False)` after every loss."""

    @property
    def connected(self) -> bool:
        """Whether the broker answers."""

    @property
    def max_packet_bytes(self) -> int:
        """Largest packet the broker takes."""
