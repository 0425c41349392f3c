"""MQTT 5 packets as a broker writes them, for tests of what reads them."""

import struct
from dataclasses import dataclass


def packet(kind: int, body: bytes) -> bytes:
    """Return a packet with its length."""
    length, left = b"", len(body)
    while True:
        left, digit = divmod(left, 128)
        length += bytes([digit | (0x80 if left else 0)])
        if not left:
            return bytes([kind]) + length + body


@dataclass(frozen=True, slots=True)
class Publish:
    """A PUBLISH to a subscriber; QoS 1 has an identifier."""

    topic: bytes
    payload: bytes = b""
    identifier: int | None = None
    retain: bool = False

    @property
    def raw(self) -> bytes:
        """Its bytes."""
        identifier = b"" if self.identifier is None else struct.pack("!H", self.identifier)
        kind = 0x30 | (0x02 if identifier else 0) | self.retain
        return packet(kind, struct.pack("!H", len(self.topic)) + self.topic + identifier + b"\0" + self.payload)


def acknowledgement(identifier: int) -> bytes:
    """Return a PUBACK as a subscriber writes it."""
    return struct.pack("!BBH", 0x40, 2, identifier)
