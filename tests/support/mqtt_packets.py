"""MQTT 5 packets, built once and sent many times, so that a flood costs its sender little."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fleet_common.mqtt import packets


class PacketType:
    """The control packet types used here (MQTT 5, 2.1.2)."""

    CONNECT: Final = 1
    CONNACK: Final = 2
    PUBLISH: Final = 3
    PUBACK: Final = 4
    SUBSCRIBE: Final = 8
    SUBACK: Final = 9
    PINGREQ: Final = 12
    DISCONNECT: Final = 14


PING: Final = bytes((PacketType.PINGREQ << 4, 0))
DISCONNECT: Final = bytes((PacketType.DISCONNECT << 4, 0))

_USER_NAME: Final = 0x80
_CLEAN_START: Final = 0x02
_WILL: Final = 0x04
_WILL_QOS_1: Final = 0x08
_WILL_RETAIN: Final = 0x20
_NO_PROPERTIES: Final = b"\x00"
_MORE: Final = 0x80  # of a variable byte integer: another byte follows
_LONGEST_LENGTH: Final = 4


@dataclass(frozen=True, slots=True)
class WillMessage:
    topic: str
    payload: bytes
    retain: bool = False


@dataclass(frozen=True, slots=True)
class IncomingPacket:
    """A packet from the broker, not decoded further than its fixed header."""

    kind: int
    flags: int
    body: bytes

    def publish(self) -> tuple[bytes, int | None, bytes]:
        """Return topic, packet identifier (None at QoS 0) and payload of a PUBLISH."""
        body = self.body
        place = 2 + int.from_bytes(body[:2], "big")
        topic, identifier = body[2:place], None
        if self.flags & 0x06:
            identifier = int.from_bytes(body[place : place + 2], "big")
            place += 2
        length, place = _read_varint(body, place)
        return topic, identifier, body[place + length :]

    @property
    def reason(self) -> int:
        place = {PacketType.CONNACK: 1, PacketType.PUBACK: 2}.get(self.kind, 0)
        return self.body[place] if len(self.body) > place else 0


def connect_packet(
    client_id: str, *, keepalive_s: int = 60, will: WillMessage | None = None, username: str | None = None
) -> bytes:
    """Return a CONNECT; without a user name the broker takes it from the certificate."""
    flags = _CLEAN_START | _USER_NAME * (username is not None)
    payload = _string(client_id.encode())
    if will is not None:
        flags |= _WILL | _WILL_QOS_1 | _WILL_RETAIN * will.retain
        payload += _NO_PROPERTIES + _string(will.topic.encode()) + _string(will.payload)
    if username is not None:
        payload += _string(username.encode())
    head = _string(b"MQTT") + bytes((5, flags)) + keepalive_s.to_bytes(2, "big") + _NO_PROPERTIES
    return packet(PacketType.CONNECT << 4, head + payload)


def publish_packet(topic: str, payload: bytes, *, qos: int = 1, **properties: Any) -> bytes:
    """Return a PUBLISH. An alias is set for its topic; without a topic the alias stands for it.

    At QoS 1 its packet identifier is always 1: the broker answers at once and remembers none, so that the same bytes
    can be sent repeatedly.
    """
    return packets.publish_packet(topic, payload, identifier=int(qos > 0), **properties)


def subscribe_packet(filters: Sequence[str], *, identifier: int = 1, qos: int = 1) -> bytes:
    body = identifier.to_bytes(2, "big") + _NO_PROPERTIES
    body += b"".join(_string(each.encode()) + bytes((qos,)) for each in filters)
    return packet(PacketType.SUBSCRIBE << 4 | 0x02, body)


def puback_packet(identifier: int) -> bytes:
    return packet(PacketType.PUBACK << 4, identifier.to_bytes(2, "big"))


def split_packets(received: bytearray) -> Iterator[IncomingPacket]:
    """Yield the complete packets at the front of what was received, and remove them."""
    place = 0
    try:
        while len(received) - place >= 2:
            try:
                length, body = _read_varint(received, place + 1)
            except IndexError:
                return
            if len(received) < body + length:
                return
            first, place = received[place], body + length
            yield IncomingPacket(first >> 4, first & 0x0F, bytes(received[body:place]))
    finally:
        del received[:place]


def packet(first: int, body: bytes) -> bytes:
    return bytes((first,)) + _varint(len(body)) + body


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while True:
        value, low = divmod(value, _MORE)
        encoded.append(low | _MORE * (value > 0))
        if not value:
            return bytes(encoded)


def _read_varint(data: bytes | bytearray, place: int) -> tuple[int, int]:
    """Return a variable byte integer and the index after it; raise IndexError if it is incomplete."""
    value = 0
    for count in range(_LONGEST_LENGTH):
        byte = data[place + count]
        value |= (byte & ~_MORE) << 7 * count
        if byte < _MORE:
            return value, place + count + 1
    raise ValueError("The broker sent a length of more than four bytes.")


@dataclass(frozen=True, slots=True)
class Publish:
    topic: bytes
    payload: bytes = b""
    identifier: int | None = None
    retain: bool = False

    @property
    def raw(self) -> bytes:
        identifier = b"" if self.identifier is None else self.identifier.to_bytes(2, "big")
        kind = PacketType.PUBLISH << 4 | (0x02 if identifier else 0) | self.retain
        return packet(kind, _string(self.topic) + identifier + _NO_PROPERTIES + self.payload)
