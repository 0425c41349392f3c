"""Announced limits of a broker: what it takes from us, as its CONNACK says."""

from dataclasses import dataclass
from typing import Self

from paho.mqtt.properties import Properties

__all__ = ["DEFAULT_RECEIVE_MAXIMUM", "Announced"]

DEFAULT_RECEIVE_MAXIMUM = 65_535


@dataclass(frozen=True, slots=True)
class Announced:
    """What the broker said of itself in its CONNACK.

    Attributes:
        max_packet_bytes: Largest packet that it takes and we send.
        receive_maximum: Most QoS 1 messages that it lets us leave unacknowledged.
        alias_maximum: Number of topic aliases; 0 forbids them.
    """

    max_packet_bytes: int
    receive_maximum: int = DEFAULT_RECEIVE_MAXIMUM
    alias_maximum: int = 0

    @classmethod
    def of(cls, properties: Properties | None, *, packet_bytes: int) -> Self:
        """Read the properties of a CONNACK; what is absent has the protocol's default.

        Args:
            properties: As received.
            packet_bytes: Our own limit, which the broker's can only lower.
        """
        return cls(
            max_packet_bytes=min(packet_bytes, getattr(properties, "MaximumPacketSize", packet_bytes)),
            receive_maximum=getattr(properties, "ReceiveMaximum", DEFAULT_RECEIVE_MAXIMUM),
            alias_maximum=getattr(properties, "TopicAliasMaximum", 0),
        )
