"""Outgoing message: what is published, until the broker has answered."""

import math
from dataclasses import dataclass, field
from typing import Final

from fleet_common.mqtt.errors import PacketTooLarge
from fleet_common.mqtt.link import OutcomeHandler
from fleet_common.mqtt.outbox.packets import publish_packet_bytes
from fleet_common.mqtt.routing import check_topic

FLOW_LEVELS: Final = 4  # dssd/v1/<fleet>/<client>


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
        priority: Whether it goes before messages that have none.
        packet_bytes: Bytes of the packet at its largest: with the topic written out.
        flow: What takes turns with others: the topics of one client, which share their first levels.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    deadline: float | None = None
    content_type: str | None = None
    alias: bool = False
    on_outcome: OutcomeHandler | None = None
    priority: bool = False
    packet_bytes: int = field(init=False)
    flow: str = field(init=False)

    def __post_init__(self) -> None:
        size = publish_packet_bytes(
            self.topic,
            self.payload,
            qos=self.qos,
            expiry=self.deadline is not None,
            content_type=self.content_type,
            alias=self.alias,
        )
        object.__setattr__(self, "packet_bytes", size)
        object.__setattr__(self, "flow", "/".join(self.topic.split("/", FLOW_LEVELS)[:FLOW_LEVELS]))

    @property
    def indispensable(self) -> bool:
        """Whether it may not be dropped to make room: what the broker is to keep, where the last word counts."""
        return self.retain and self.qos > 0

    def expired(self, now: float) -> bool:
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
