"""Announced abilities and limits of a broker, as its CONNACK says (MQTT 5, 3.2.2.3)."""

from dataclasses import dataclass
from typing import Final, Self

from paho.mqtt.properties import Properties

DEFAULT_RECEIVE_MAXIMUM = 65_535
LEAST_PACKET_BYTES = 4096
"""Smallest useful packet limit of a broker: states, verdicts and short prompts fit."""


@dataclass(frozen=True, slots=True)
class Announced:
    """What the broker said of itself in its CONNACK.

    Attributes:
        max_packet_bytes: Largest packet that it takes and we send.
        receive_maximum: Most QoS 1 messages that it lets us leave unacknowledged.
        alias_maximum: Number of topic aliases; 0 forbids them.
        missing: What the fleet needs and the broker does not offer, as the middle of a sentence; empty for nothing.
    """

    max_packet_bytes: int
    receive_maximum: int = DEFAULT_RECEIVE_MAXIMUM
    alias_maximum: int = 0
    missing: str = ""

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
            missing=_missing(properties),
        )


# Properties that are 0 where the broker lacks what the fleet needs; each is 1 or more if it is left out.
_NEEDED: Final = {
    "SharedSubscriptionAvailable": "does not offer shared subscriptions",
    "WildcardSubscriptionAvailable": "does not offer wildcard subscriptions",
    "RetainAvailable": "does not retain messages",
    "MaximumQoS": "does not offer QoS 1",
}


def _missing(properties: Properties | None) -> str:
    for name, lack in _NEEDED.items():
        if not getattr(properties, name, 1):
            return lack
    limit = getattr(properties, "MaximumPacketSize", LEAST_PACKET_BYTES)
    if limit < LEAST_PACKET_BYTES:
        return f"takes packets of at most {limit} bytes, not the {LEAST_PACKET_BYTES} bytes"
    return ""
