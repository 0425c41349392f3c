"""Socket between the network and the MQTT library, with a screen in it.

The library asks for a packet byte by byte and writes each packet by itself. Here the network is read in large pieces,
what the screen refuses or takes never reaches the library, and messages of ours are written together with
acknowledgements, the library's as well. It has the interface that paho's own wrapper for WebSockets has, and never
blocks.
"""

import ssl
from typing import Any, Final

from fleet_common.mqtt.connection.screen import PUBACK, BrokenStream, Screen
from fleet_common.mqtt.tls.stream import TlsStream

PINGREQ: Final = b"\xc0\x00"
CHUNK: Final = 1 << 16
LONGEST_PAUSE_S: Final = 0.008
SHORTEST_PAUSE_S: Final = 0.001
# Messages dropped by one `fill` from which on the next pause is shorter. Some brokers have no more than 20 under way to
# a client: with longer pauses, what they keep for us would grow. One that has shown that it has more is allowed more.
CROWD: Final = 20
MOST_CROWD: Final = 128  # half of what the brokers have that we set up
PUBACK_BYTES: Final = 4
MOSTLY: Final = 4  # times as many dropped as handed on
MOST_OUTGOING_BYTES: Final = 1 << 18

_WAIT: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ScreenedSocket:
    """Belongs to the link's thread.

    Args:
        sock: A connected socket, or a TLS stream over one. Neither blocks.
        screen: Decides what the reader gets.

    Attributes:
        received: Bytes that have come.
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
        self._pause_s = LONGEST_PAUSE_S
        self._crowd = CROWD
        self._held = False  # acknowledgements wait for the next `settle`
        self._outgoing = bytearray()  # whole packets, but for what is written of the first
        self.received = 0

    # What paho calls.

    def recv(self, size: int) -> bytes:
        """Return up to `size` bytes of what `fill` has let pass; nothing at the connection's end.

        Raises:
            BlockingIOError: There is nothing for now.
            OSError: The connection broke.
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
        """Write some of a packet; return how many bytes. An acknowledgement is kept until the next `flush`."""
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
        """Set whether the socket blocks; this object needs one that does not."""
        self._sock.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """Set an option of the socket."""
        self._sock.setsockopt(level, option, value)

    # What the connection calls.

    @property
    def ready(self) -> bool:
        """Whether `recv` has something to say."""
        return self._at < len(self._ready) or bool(self._ended)

    @property
    def pending(self) -> bool:
        """Whether there is more to read although the descriptor may not say so."""
        return self._more or self.ready

    @property
    def receiving(self) -> bool:
        """Whether a large packet is being received, behind which others may wait at the sender."""
        return self._screen.within

    @property
    def wants_write(self) -> bool:
        """Whether packets of ours, or what TLS says by itself, wait until the socket can be written to."""
        if self._outgoing or (self._screen.owed and not self._held):
            return True
        return self._tls is not None and self._tls.wants_write

    @property
    def clogged(self) -> bool:
        """Whether so much waits to be written that nothing should be added."""
        return len(self._outgoing) >= MOST_OUTGOING_BYTES

    @property
    def ending(self) -> str:
        """Why the screen has ended the connection; empty if it has not."""
        return str(self._ended) if isinstance(self._ended, BrokenStream) else ""

    def fill(self) -> float:
        """Read what the network has for now, unless something is left for the reader.

        Returns:
            Seconds for which reading may rest. Each wake-up costs as much as 20 dropped messages, so where most of
            what comes is dropped it is better read a few at a time. Zero otherwise.
        """
        if self._at < len(self._ready) or self._ended:
            return 0.0
        passed, dropped = self._screen.passed, self._screen.dropped
        self._ready, self._at = self._read(), 0
        passed, dropped = self._screen.passed - passed, self._screen.dropped - dropped
        under_way = min(len(self._screen.owed) // PUBACK_BYTES, MOST_CROWD)
        if under_way > self._crowd:
            self._crowd = under_way
        elif dropped >= self._crowd:
            self._pause_s = max(self._pause_s / 2, SHORTEST_PAUSE_S)
        elif dropped < self._crowd / 2:
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        return 0.0 if self._more or dropped <= MOSTLY * passed else self._pause_s

    def put(self, packet: bytes) -> None:
        """Take a packet, which the next `flush` writes."""
        self._outgoing += packet

    def ask(self) -> None:
        """Write a ping, behind the acknowledgements that are due."""
        self._screen.owed += PINGREQ
        self.flush()

    def settle(self) -> None:
        """Write the acknowledgements that are due, few of them every other time: writing costs what waking does."""
        few = len(self._screen.owed) < PUBACK_BYTES * self._crowd / 2
        if few and not self._held and not self._outgoing:
            self._held = True
        else:
            self.flush()

    def flush(self) -> None:
        """Write the packets of ours that are due, if the library is not in the midst of one."""
        owed, outgoing = self._screen.owed, self._outgoing
        self._held = False
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

    def _read(self) -> bytes:
        """Return what of it the screen lets pass."""
        self._more = False
        try:
            data = self._sock.recv(CHUNK)
            self._ended = not data
            self.received += len(data)
            self._more = self._tls.pending if self._tls is not None else len(data) == CHUNK
            return self._screen.feed(data)
        except _WAIT:
            pass
        except (OSError, BrokenStream) as error:
            self._ended = error
        return b""
