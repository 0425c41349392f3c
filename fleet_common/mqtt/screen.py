"""Screen of incoming MQTT packets, and the socket that it is built into.

A message costs the MQTT library 30 to 60 µs before it reaches the first line of ours, and an acknowledgement nearly as
much. A screen walks the packets in the bytes as they arrive and asks about every PUBLISH. Refused messages are
acknowledged here and dropped. Accepted messages that are complete and well formed are dispatched from here, and so are
acknowledgements. Everything else goes to the library unchanged, together with the messages after it, so that the order
is kept. `Screen` has no socket and no clock: bytes in, bytes out.

Acknowledgements leave in the order in which the messages came (MQTT 5, 4.6): some brokers close a connection over one
that is out of order. So the acknowledgement of a refused message waits for those of the accepted messages before it,
which the library writes once it has dispatched them.

The library asks for a packet byte by byte and writes each packet on its own. `ScreenedSocket` reads the network in
large pieces and writes our messages together with acknowledgements, the library's as well. It has the interface of
paho's own wrapper for WebSockets, and never blocks.
"""

import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from fleet_common.mqtt.link import Accepts, CallbackGuard, Message
from fleet_common.mqtt.tls import TlsStream

PUBLISH: Final = 0x30
PUBACK: Final = 0x40
TYPE: Final = 0xF0
RETAIN: Final = 0x01
QOS_1: Final = 0x02
QOS_2: Final = 0x04
TOPIC_LENGTH: Final = 2  # bytes
IDENTIFIER: Final = 2
MORE: Final = 0x80  # of a variable byte integer
MAX_LENGTH_BYTES: Final = 4
MAX_OWED_BYTES: Final = 4 * 65_535  # a PUBACK for every packet identifier
_PUBACK_HEAD: Final = b"\x40\x02"


class BrokenStream(Exception):  # noqa: N818 - reads as what it says
    """The bytes are no MQTT, or exceed an agreed limit. The message says how."""


class Screen:
    """The screen of one connection. Belongs to the link's thread.

    Args:
        accepts: Called for every PUBLISH; None accepts all.
        on_message: Called with accepted messages, QoS 0 and 1; MUST NOT raise. None leaves them to the library.
        on_answer: Called with packet identifier and reason code of QoS 1 acknowledgements; MUST NOT raise. None leaves
            them to the library.

    Attributes:
        owed: Acknowledgements to write: whole packets.
        within: Whether all bytes received last belong to one unfinished packet: a large one on a slow line.
    """

    def __init__(
        self,
        *,
        max_packet_bytes: int,
        accepts: Accepts | None = None,
        guard: CallbackGuard | None = None,
        on_message: Callable[[Message], None] | None = None,
        on_answer: Callable[[int, int], None] | None = None,
    ) -> None:
        self._accepts = accepts
        self._on_message = on_message
        self._on_answer = on_answer
        self._guard = guard if guard is not None else CallbackGuard()
        self.owed = bytearray()
        self._max_packet_bytes = max_packet_bytes
        self._head = b""  # of a packet that is too incomplete to judge
        self._rest = 0  # missing bytes of a packet that was judged
        self.within = False
        self._dropping = False  # whether those are to be dropped
        self._behind: deque[tuple[int, bytearray]] = deque()  # acknowledgements due after that number of the library's
        self._handed_on = 0  # QoS 1 messages that the library acknowledges
        self._answered = 0  # those that it has acknowledged

    def feed(self, data: bytes) -> bytes:
        """Take received bytes and return those for the library; BrokenStream ends the connection."""
        data = self._head + data
        end = len(data)
        at = self._rest  # where the next packet begins
        self.within = at > end
        start = at if self._dropping else 0  # start of the bytes to keep
        self._head = b""
        kept: list[bytes] = []
        while at < end:
            after, taken = self._judge(data, at, end, first=start == at and not kept)
            if not after:
                self._head = data[at:]
                break
            if taken:
                if start < at:
                    kept.append(data[start:at])
                start = after
            at = after
        self._rest = max(0, at - end)
        self._dropping = start > end
        if start < min(at, end):
            kept.append(data[start:at])
        if len(self.owed) > MAX_OWED_BYTES:
            raise BrokenStream("the broker sends messages without waiting for their acknowledgements")
        return kept[0] if len(kept) == 1 else b"".join(kept)

    def answered(self, puback: bytes) -> None:
        """Insert an acknowledgement of the library among ours, in order."""
        self.owed += puback
        self._answered += 1
        while self._behind and self._behind[0][0] <= self._answered:
            self.owed += self._behind.popleft()[1]

    def _judge(self, data: bytes, at: int, end: int, *, first: bool) -> tuple[int, bool]:
        """Return where the packet at `at` ends, 0 if it is incomplete, and whether it is done.

        `first`: nothing before it waits for the library.
        """
        if at + 1 >= end:
            return 0, False
        length, body = data[at + 1], at + 2
        if length & MORE:
            length, body = _length(data, at + 1)
            if not body:
                return 0, False
        after = body + length
        if after - at > self._max_packet_bytes:
            raise BrokenStream(f"the broker sent a packet of {after - at} bytes, more than agreed")
        taken = False
        kind = data[at] & TYPE
        # We subscribe at QoS 1 at most; the library judges everything else.
        if kind == PUBLISH and not data[at] & QOS_2 and length >= TOPIC_LENGTH:
            judged = self._judge_message(data, at, body, after, first=first)
            if judged is None:
                return 0, False
            taken = judged
        elif kind == PUBACK and self._on_answer is not None and length >= IDENTIFIER:
            if after > end:
                return 0, False
            reason = data[body + IDENTIFIER] if length > IDENTIFIER else 0
            self._on_answer(data[body] << 8 | data[body + 1], reason)
            taken = True
        return after, taken

    def _judge_message(self, data: bytes, at: int, body: int, after: int, *, first: bool) -> bool | None:
        """Take a PUBLISH; True once it is done, None if too little of it has arrived. Record its acknowledgement."""
        name = body + TOPIC_LENGTH
        if name > len(data):
            return None
        name_end = name + (data[body] << 8 | data[body + 1])
        identifier_end = name_end + (data[at] & QOS_1)  # its bit has the value of the identifier's bytes
        if identifier_end > after:
            return False  # malformed: the library says so
        if identifier_end > len(data):
            return None
        retained = bool(data[at] & RETAIN)
        accepts = self._accepts
        if accepts is None or self._guard.ask(accepts, data[name:name_end], after - at, retained=retained):
            message = self._message(data, name, name_end, identifier_end, after, retained) if first else None
            if message is None:
                if identifier_end > name_end:
                    self._handed_on += 1
                return False
            assert self._on_message is not None
            self._on_message(message)
        else:
            self._guard.counters.screened += 1
        if identifier_end > name_end:
            self._owe(_PUBACK_HEAD + data[name_end:identifier_end])
        return True

    def _message(
        self, data: bytes, name: int, name_end: int, properties: int, after: int, retained: bool
    ) -> Message | None:
        """Return the message of a PUBLISH, or None to leave it to the library."""
        if self._on_message is None or after > len(data) or name == name_end:
            return None
        if properties >= after:
            return None
        length, begins = data[properties], properties + 1
        if length & MORE:
            length, begins = _length(data[:after], properties)
            if not begins:
                return None
        payload = begins + length
        if payload > after:
            return None
        try:
            topic = data[name:name_end].decode()
        except UnicodeDecodeError:
            return None
        return Message(topic, data[payload:after], retained)

    def _owe(self, puback: bytes) -> None:
        if self._handed_on == self._answered:
            self.owed += puback
        elif self._behind and self._behind[-1][0] == self._handed_on:
            self._behind[-1][1].extend(puback)
        else:
            self._behind.append((self._handed_on, bytearray(puback)))


def _length(data: bytes, at: int) -> tuple[int, int]:
    """Return the variable byte integer at `at` and its end; zeros if it is incomplete."""
    length = 0
    for place, byte in enumerate(data[at : at + MAX_LENGTH_BYTES]):
        length |= (byte & ~MORE) << 7 * place
        if not byte & MORE:
            return length, at + place + 1
    if len(data) - at >= MAX_LENGTH_BYTES:
        raise BrokenStream("the broker sent a packet whose length is not MQTT")
    return 0, 0


PINGREQ: Final = b"\xc0\x00"
CHUNK: Final = 1 << 16
MAX_OUTGOING_BYTES: Final = 1 << 18

_WAIT: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ScreenedSocket:
    """Socket with a screen, for the MQTT library. Belongs to the link's thread.

    `sock` is a connected, non-blocking socket, or a TLS stream over one.
    """

    def __init__(self, sock: Any, screen: Screen) -> None:  # noqa: ANN401 - plain or TLS
        self._sock = sock
        self._tls = sock if isinstance(sock, TlsStream) else None
        self._screen = screen
        self._ready = b""
        self._at = 0
        self._ended: BaseException | bool = False
        self._midway = False  # the reader's last packet was not written whole
        self._more = self._tls is not None and self._tls.pending  # the last `fill` left something
        self._outgoing = bytearray()  # whole packets, but for what is written of the first
        self._finished = False  # our direction has ended
        self.received = 0

    # Called by paho.

    def recv(self, size: int) -> bytes:
        """Return up to `size` bytes of what `fill` has let pass; nothing at the connection's end.

        Raise BlockingIOError if there is nothing for now, OSError if the connection broke.
        """
        if self._at < len(self._ready):
            piece = self._ready[self._at : self._at + size]
            self._at += len(piece)
            return piece
        if isinstance(self._ended, BaseException):
            raise ConnectionError(str(self._ended)) from self._ended
        if self._ended:
            return b""
        raise BlockingIOError

    def send(self, data: bytes | bytearray) -> int:
        """Write some of a packet; return the number of bytes. Acknowledgements are kept until the next `flush`."""
        if not self._midway:
            if data[0] == PUBACK:
                self._screen.answered(bytes(data))
                return len(data)
            self.flush()
            if self._screen.owed or self._outgoing:
                raise BlockingIOError
        # TLS may have taken the bytes of an attempt that would block: the next attempt must be the same packet's.
        self._midway = True
        sent: int = self._sock.send(data)
        self._midway = sent < len(data)
        return sent

    def close(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return int(self._sock.fileno())

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._sock.setsockopt(level, option, value)

    # Called by the connection.

    @property
    def ready(self) -> bool:
        """`recv` would return or raise something."""
        return self._at < len(self._ready) or bool(self._ended)

    @property
    def pending(self) -> bool:
        """There is more to read although the descriptor may not say so."""
        return self._more or self.ready

    @property
    def receiving(self) -> bool:
        """A large packet is being received, behind which others may wait at the sender."""
        return self._screen.within

    @property
    def wants_write(self) -> bool:
        """Packets of ours, or TLS records, wait until the socket is writable."""
        if self._outgoing or self._screen.owed:
            return True
        return self._tls is not None and self._tls.wants_write

    @property
    def clogged(self) -> bool:
        """So much waits to be written that nothing should be added."""
        return len(self._outgoing) >= MAX_OUTGOING_BYTES

    @property
    def ending(self) -> str:
        """Why the screen has ended the connection; empty if it has not."""
        return str(self._ended) if isinstance(self._ended, BrokenStream) else ""

    def fill(self) -> None:
        """Read from the network, unless something is left for the library."""
        if self._at == len(self._ready) and not self._ended:
            self._ready, self._at = self._read(), 0

    def put(self, packet: bytes) -> None:
        self._outgoing += packet

    def ask(self) -> None:
        """Write a ping, after the due acknowledgements."""
        self._screen.owed += PINGREQ
        self.flush()

    def flush(self) -> None:
        """Write due packets, unless the library is in the middle of one."""
        owed, outgoing = self._screen.owed, self._outgoing
        try:
            if self._tls is not None:
                self._tls.flush()
            if self._midway:
                return
            if owed and not self.clogged:
                outgoing += owed
                owed.clear()
            while outgoing:
                del outgoing[: self._sock.send(outgoing)]
        except _WAIT:
            pass
        except OSError as error:
            self._ended = self._ended or error

    def say_last(self, packet: bytes) -> None:
        """Put the last packet, after the acknowledgements that are due. Only `finish` may follow."""
        self._outgoing += self._screen.owed + packet
        self._screen.owed.clear()
        self._ready = b""

    def finish(self) -> bool:
        """Write the rest, end our direction, and drop what still arrives; True once the other end has hung up."""
        self.flush()
        try:
            if not self.wants_write and not self._finished:
                self._finished = True
                self._sock.shutdown(socket.SHUT_WR)
            self._ended = self._ended or not self._receive()
        except _WAIT:
            return False
        except OSError as error:
            self._ended = error
        return bool(self._ended)

    def _receive(self) -> bytes:
        self._more = False
        data: bytes = self._sock.recv(CHUNK)
        self._more = self._tls.pending if self._tls is not None else len(data) == CHUNK
        return data

    def _read(self) -> bytes:
        try:
            data = self._receive()
            self._ended = not data
            self.received += len(data)
            return self._screen.feed(data)
        except _WAIT:
            pass
        except (OSError, BrokenStream) as error:
            self._ended = error
        return b""
