"""Screen of MQTT packets, and the socket with a screen in it, before hostile bytes in pieces of any size.

What passes is what a plain parser of the whole stream lets pass, however it was cut; acknowledgements leave whole, and
in the order of their messages.
"""

import contextlib
import random
import struct
from collections.abc import Iterator
from typing import Final

from fleet_common.mqtt.link import CallbackGuard
from fleet_common.mqtt.screen import PUBACK, BrokenStream, Screen, ScreenedSocket
from tests.fuzz.harness import Finding
from tests.fuzz.mutation import Bytes
from tests.support.mqtt_packets import Publish, packet, puback_packet

LIMIT: Final = 512
OWN_PACKETS: Final = 0.1  # of the library, by turn
FLUSHES: Final = 0.5  # likewise
_MAX_TURNS: Final = 20_000


def accepts(topic: bytes, _size: int, retained: bool) -> bool:
    return not retained and sum(topic) % 2 == 0


class ScreenTarget:
    """An input is a byte, which seeds the cuts, and a stream."""

    max_bytes = 1 << 11

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        rng, stream = random.Random(data[0]), data[1:]
        kept, rest, refused, broken = _plain(stream)
        for most in (len(stream) or 1, 1 + data[0] % 9, 200):
            _fed(stream, most, rng, kept, rest, refused, broken=broken)
        _through_socket(stream, rng, kept, broken=broken)

    def close(self) -> None:
        """Hold nothing."""

    def mutate(self, data: bytes, rng: random.Random, plain: Bytes) -> bytes:
        if not data or rng.random() < 0.3:
            return plain(data)
        packets = _split(data[1:])
        match rng.randrange(6):
            case 0 if packets:
                del packets[rng.randrange(len(packets))]
            case 1:
                packets.insert(rng.randint(0, len(packets)), _random_packet(rng))
            case 2 if packets:
                packets.append(rng.choice(packets))
            case 3:
                return bytes([rng.randrange(256)]) + data[1:]
            case _ if packets:
                place = rng.randrange(len(packets))
                packets[place] = plain(packets[place]) or b"\x30"
        return data[:1] + b"".join(packets)

    def cross(self, data: bytes, other: bytes, rng: random.Random) -> bytes:
        head, tail = _split(data[1:]), _split(other[1:])
        return data[:1] + b"".join([*head[: rng.randint(0, len(head))], *tail[rng.randint(0, len(tail)) :]])

    def seeds(self) -> Iterator[bytes]:
        for number in range(12):
            rng = random.Random(number)
            yield bytes([number]) + b"".join(_random_packet(rng) for _ in range(number))


def _fed(stream: bytes, most: int, rng: random.Random, kept: bytes, rest: bytes, refused: int, *, broken: bool) -> None:
    guard = CallbackGuard()
    screen = Screen(max_packet_bytes=LIMIT, accepts=accepts, guard=guard)
    got, at, ended = b"", 0, False
    while at < len(stream) and not ended:
        size = rng.randint(1, most) if most < len(stream) else most
        try:
            got += screen.feed(stream[at : at + size])
        except BrokenStream:
            ended = True
        at += size
    if ended != broken:
        raise Finding(f"the stream is {'broken' if broken else 'sound'}, the screen says otherwise")
    if broken:
        if not kept.startswith(got[: len(kept)]):
            raise Finding("before a broken packet another stream passes")
        return
    if not got.startswith(kept) or not rest.startswith(got[len(kept) :]):
        raise Finding("what passes is not what is accepted")
    if guard.counters.screened < refused or guard.counters.screened > refused + 1:
        raise Finding(f"{guard.counters.screened} dropped, {refused} were refused")


class _Network:
    def __init__(self, stream: bytes, rng: random.Random) -> None:
        self.written = bytearray()
        self._stream, self._rng, self._at = stream, rng, 0

    def recv(self, size: int) -> bytes:
        if self._rng.random() < 0.3:
            raise BlockingIOError
        piece = self._stream[self._at : self._at + min(size, self._rng.choice((1, 3, 50, 5000)))]
        self._at += len(piece)
        return piece

    def send(self, data: bytes) -> int:
        if self._rng.random() < 0.2:
            raise BlockingIOError
        size = self._rng.randint(1, len(data))
        self.written += data[:size]
        return size

    def close(self) -> None:
        pass


class _Library:
    """Reads a socket as the MQTT library does: packet by packet, with an acknowledgement for each message of QoS 1."""

    def __init__(self, sock: ScreenedSocket, rng: random.Random) -> None:
        self.got = b""
        self._sock, self._rng = sock, rng
        self._done = 0  # where the next packet to dispatch begins
        self._sending = b""  # what is left of a packet of its own
        self._ended = False

    def turn(self) -> bool:
        """Read, dispatch and write some; return whether all is done."""
        sock, rng = self._sock, self._rng
        if not sock.ready:
            sock.fill()
        try:
            piece = sock.recv(rng.choice((1, 2, 100)))
            self._ended = self._ended or not piece
            self.got += piece
        except ConnectionError:
            self._ended = True
        except BlockingIOError:
            pass
        if not self._sending:
            self._dispatch()
            if rng.random() < OWN_PACKETS:
                self._sending = packet(0x30, b"\x00\x01x" + b"y" * 100)
        if self._sending:
            with contextlib.suppress(BlockingIOError):
                self._sending = self._sending[sock.send(self._sending) :]
        if self._ended or rng.random() < FLUSHES:
            sock.flush()
        return self._ended and not self._sending and not sock.wants_write and not _end(self.got, self._done)

    def _dispatch(self) -> None:
        while end := _end(self.got, self._done):
            for identifier in _identifiers(self.got[self._done : end]):
                self._sock.send(puback_packet(int.from_bytes(identifier, "big")))
            self._done = end


def _through_socket(stream: bytes, rng: random.Random, kept: bytes, *, broken: bool) -> None:
    network = _Network(stream, rng)
    library = _Library(ScreenedSocket(network, Screen(max_packet_bytes=LIMIT, accepts=accepts)), rng)
    if not any(library.turn() for _ in range(_MAX_TURNS)):
        raise Finding("the socket does not come to an end")
    if broken:
        return
    if not library.got.startswith(kept):
        raise Finding("what the socket lets pass is not what is accepted")
    acknowledged = [raw[2:4] for raw in _split(bytes(network.written)) if raw[0] == PUBACK]
    came = list(_identifiers(stream))
    if acknowledged[: len(came)] != came or len(acknowledged) > len(came) + 1:  # one may be refused by its head
        raise Finding(f"acknowledged {acknowledged}, came {came}")


def _plain(stream: bytes) -> tuple[bytes, bytes, int, bool]:
    """Return the accepted bytes, the incomplete rest, the number of refused packets, and whether it is broken."""
    kept, at, refused = b"", 0, 0
    while True:
        try:
            end = _checked_end(stream, at)
        except BrokenStream:
            return kept, stream[at:], refused, True
        if not end or end > len(stream):
            return kept, stream[at:], refused, False
        if _refused(stream[at:end]):
            refused += 1
        else:
            kept += stream[at:end]
        at = end


def _refused(raw: bytes) -> bool:
    if raw[0] & 0xF4 != 0x30:
        return False
    body = _body(raw, 0)
    if len(raw) - body < 2:
        return False
    topic = struct.unpack_from("!H", raw, body)[0]
    if body + 2 + topic + (2 if raw[0] & 2 else 0) > len(raw):
        return False
    return not accepts(raw[body + 2 : body + 2 + topic], len(raw), bool(raw[0] & 1))


def _identifiers(stream: bytes) -> Iterator[bytes]:
    for raw in _split(stream):
        if raw[0] & 0xF6 == 0x32 and _end(raw, 0):
            at = _body(raw, 0)
            if len(raw) - at >= 2:
                at += 2 + struct.unpack_from("!H", raw, at)[0]
                if at + 2 <= len(raw):
                    yield raw[at : at + 2]


def _split(stream: bytes) -> list[bytes]:
    """Split a stream into packets; the incomplete rest comes last."""
    packets, at = [], 0
    while at < len(stream):
        end = _end(stream, at) or len(stream)
        packets.append(stream[at:end])
        at = end
    return packets


def _end(stream: bytes, at: int) -> int:
    """Return the end of the packet at `at`; 0 if it is incomplete."""
    try:
        end = _checked_end(stream, at)
    except BrokenStream:
        return 0
    return end if end <= len(stream) else 0


def _checked_end(stream: bytes, at: int) -> int:
    """Return the announced end of the packet at `at`; 0 if unknown yet."""
    body = _body(stream, at)
    if not body:
        return 0
    length = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(stream[at + 1 : body]))
    if body + length - at > LIMIT:
        raise BrokenStream
    return body + length


def _body(stream: bytes, at: int) -> int:
    """Return the begin of the packet's body; 0 if unknown yet."""
    for place in range(4):
        if at + 1 + place >= len(stream):
            return 0
        if not stream[at + 1 + place] & 0x80:
            return at + 2 + place
    raise BrokenStream


def _random_packet(rng: random.Random) -> bytes:
    kind = rng.randrange(8)
    if kind < 6:
        topic = rng.choice((b"", b"a", b"b", b"dssd/v1/f/d/up/open", b"c" * 200))
        identifier = rng.choice((None, 1, 2, 513, 65_535))
        return Publish(topic, rng.randbytes(rng.choice((0, 1, 30, 130))), identifier, rng.random() < 0.2).raw
    return packet(rng.choice((0x20, 0x40, 0x90, 0xD0, 0xE0, 0x34, 0x36, 0x00)), rng.randbytes(rng.choice((0, 2, 5))))
