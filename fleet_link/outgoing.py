"""A message on its way to the broker."""

import math
from dataclasses import dataclass

from fleet_link.errors import PacketTooLarge
from fleet_link.filters import check_topic
from fleet_link.link import OutcomeHandler
from fleet_link.packets import publish_packet_bytes

__all__ = ["Outgoing"]


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """A message on its way to the broker.

    Attributes:
        topic: Full topic; an alias is chosen when it is sent, never kept.
        payload: Bytes.
        qos: 0 or 1.
        retain: Whether the broker keeps it.
        deadline: Clock reading after which it is worthless, or None.
        content_type: MQTT 5 content type.
        alias: Whether the topic may be sent as an alias.
        on_outcome: Called with the broker's answer.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    deadline: float | None = None
    content_type: str | None = None
    alias: bool = False
    on_outcome: OutcomeHandler | None = None

    @property
    def packet_bytes(self) -> int:
        """Bytes of the packet at its largest: with the topic written out."""
        return publish_packet_bytes(
            self.topic,
            self.payload,
            qos=self.qos,
            expiry=self.deadline is not None,
            content_type=self.content_type,
            alias=self.alias,
        )

    def expired(self, now: float) -> bool:
        """Whether its time has passed."""
        return self.deadline is not None and now >= self.deadline

    def expiry_s(self, now: float) -> int | None:
        """Whole seconds left to live, at least 1."""
        return None if self.deadline is None else max(1, math.ceil(self.deadline - now))

    def check(self, *, limit: int) -> None:
        """Refuse what no broker, or not this one, would take.

        Args:
            limit: Largest packet in bytes.

        Raises:
            ValueError: The topic cannot be published to, or the QoS is neither 0 nor 1.
            PacketTooLarge: The packet exceeds `limit`.
        """
        check_topic(self.topic)
        if self.qos not in {0, 1}:
            raise ValueError(f"QoS {self.qos} is not supported: use 0 or 1.")
        if self.packet_bytes > limit:
            raise PacketTooLarge(size=self.packet_bytes, limit=limit)
