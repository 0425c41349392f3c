"""MQTT PUBLISH packets: their bytes, their sizes, topic aliases.

The size is computed before the packet is built: a broker closes the connection over a packet that is too large, and a
client that sends it again repeats that for ever.
"""

from collections import OrderedDict

PUBLISH = 0x30
EXPIRY, CONTENT_TYPE, ALIAS = 0x02, 0x03, 0x23
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
    """Return the size of a PUBLISH packet (MQTT 5, 3.3).

    `expiry` and `alias` say whether it has these properties, `topic_known` whether the alias replaces the topic.
    """
    properties = EXPIRY_PROPERTY * expiry + ALIAS_PROPERTY * alias
    if content_type is not None:
        properties += STRING_PROPERTY + len(content_type.encode())
    remaining = TWO_BYTE_LENGTH + (0 if topic_known else len(topic.encode()))
    remaining += PACKET_IDENTIFIER * (qos > 0)
    remaining += _varint_bytes(properties) + properties + len(payload)
    return 1 + _varint_bytes(remaining) + remaining


def publish_packet(
    topic: str,
    payload: bytes,
    *,
    identifier: int = 0,
    retain: bool = False,
    expiry_s: int | None = None,
    content_type: str | None = None,
    alias: int | None = None,
) -> bytes:
    """Return a PUBLISH packet (MQTT 5, 3.3).

    `topic` is empty if an alias replaces it; `identifier` is 0 for QoS 0; `expiry_s` is in whole seconds.
    """
    properties = b""
    if expiry_s is not None:
        properties += b"%c%b" % (EXPIRY, expiry_s.to_bytes(4, "big"))
    if content_type is not None:
        properties += b"%c%b" % (CONTENT_TYPE, _string(content_type))
    if alias is not None:
        properties += b"%c%b" % (ALIAS, alias.to_bytes(2, "big"))
    name = _string(topic)
    number = identifier.to_bytes(2, "big") if identifier else b""
    before = _varint(len(properties))
    remaining = _varint(len(name) + len(number) + len(before) + len(properties) + len(payload))
    kind = PUBLISH | (2 if identifier else 0) | retain
    return b"".join((kind.to_bytes(1, "big"), remaining, name, number, before, properties, payload))


def _string(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(2, "big") + raw


def _varint(value: int) -> bytes:
    if value < 1 << 7:
        return value.to_bytes(1, "big")
    digits = bytearray()
    while True:
        value, digit = value >> 7, value & 0x7F
        digits.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(digits)


def _varint_bytes(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


class AliasTable:
    """Topic aliases of one connection.

    When all are in use, a new topic gets the alias that was used longest ago, so that devices which left do not keep
    theirs for ever.
    """

    def __init__(self, *, maximum: int) -> None:
        self._maximum = maximum
        self._aliases: OrderedDict[str, int] = OrderedDict()

    def assign(self, topic: str) -> tuple[int, bool] | None:
        """Return the topic's alias and whether the broker knows it; None if it allows no aliases."""
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
