"""MQTT PUBLISH and DISCONNECT packets, and topic aliases."""

from collections import OrderedDict

PUBLISH, DISCONNECT = 0x30, 0xE0
EXPIRY, CONTENT_TYPE, SESSION_EXPIRY, ALIAS = 0x02, 0x03, 0x11, 0x23


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


def disconnect_packet(*, session_expiry_s: int | None = None) -> bytes:
    """Return a DISCONNECT packet (MQTT 5, 3.14); `session_expiry_s` replaces what CONNECT said."""
    if session_expiry_s is None:
        return b"%c\x00" % DISCONNECT
    return b"%c\x07\x00\x05%c%b" % (DISCONNECT, SESSION_EXPIRY, session_expiry_s.to_bytes(4, "big"))


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
