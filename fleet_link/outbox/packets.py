"""Packet sizes and topic aliases of MQTT publishes.

The size is computed before the packet is built, because a broker answers one that is too large by closing the
connection, and a client that then sends it again does so for ever.
"""

from collections import OrderedDict

__all__ = ["AliasTable", "publish_packet_bytes"]

TWO_BYTE_LENGTH = 2
PACKET_IDENTIFIER = 2
EXPIRY_PROPERTY = 5
ALIAS_PROPERTY = 3
STRING_PROPERTY = 3


def publish_packet_bytes(
    topic: str,
    payload: bytes,
    *,
    qos: int = 1,
    expiry: bool = False,
    content_type: str | None = None,
    alias: bool = False,
    topic_known: bool = False,
) -> int:
    """Return the bytes of a PUBLISH packet (MQTT 5, 3.3).

    Args:
        topic: Full topic.
        payload: Bytes.
        qos: 0 or 1.
        expiry: Whether it has a message expiry interval.
        content_type: As published.
        alias: Whether it has a topic alias.
        topic_known: Whether the alias stands for the topic, which is then left out.
    """
    properties = EXPIRY_PROPERTY * expiry + ALIAS_PROPERTY * alias
    if content_type is not None:
        properties += STRING_PROPERTY + len(content_type.encode())
    remaining = TWO_BYTE_LENGTH + (0 if topic_known else len(topic.encode()))
    remaining += PACKET_IDENTIFIER * (qos > 0)
    remaining += _varint_bytes(properties) + properties + len(payload)
    return 1 + _varint_bytes(remaining) + remaining


def _varint_bytes(value: int) -> int:
    """Return the bytes of a variable byte integer."""
    return max(1, -(-value.bit_length() // 7))


class AliasTable:
    """The topic aliases of one connection; they die with it.

    When all are taken the one used longest ago is given to the new topic, so that devices which left do
    not hold them for ever.
    """

    def __init__(self, *, maximum: int) -> None:
        self._maximum = maximum
        self._aliases: OrderedDict[str, int] = OrderedDict()

    def assign(self, topic: str) -> tuple[int, bool] | None:
        """Return the topic's alias and whether the broker knows it already; None if it allows no aliases."""
        alias = self._aliases.get(topic)
        if alias is not None:
            self._aliases.move_to_end(topic)
            return alias, True
        if self._maximum == 0:
            return None
        if len(self._aliases) < self._maximum:
            alias = len(self._aliases) + 1
        else:
            _, alias = self._aliases.popitem(last=False)
        self._aliases[topic] = alias
        return alias, False
