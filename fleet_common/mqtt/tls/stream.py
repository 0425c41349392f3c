"""TLS stream over a socket: reads the network in large pieces and decrypts all records that have come in one pass.

A broker writes one record for each message. The standard library's TLS socket asks the system twice for each record,
for its head and for its body; here OpenSSL reads from and writes to memory, and the system is asked once for all.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final

from fleet_common.mqtt.tls.context import LinkContext

CHUNK: Final = 1 << 16  # of one reading from the network
RECORD: Final = 1 << 14  # most bytes in a record (RFC 8446, 5.1)


class TlsStream:
    """Our end of a TLS connection. Once hands are shaken it never blocks. Belongs to one thread.

    Where there is nothing to read, or no room to write, it raises what `ssl.SSLSocket` does.

    Args:
        sock: A connected socket.
        context: With the files of ours; remembers the alert with which the other end ends the connection.
        host: Name or address that must be in the other end's certificate.
        clock: Monotonic seconds.
    """

    def __init__(
        self, sock: socket.socket, context: LinkContext, host: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sock = sock
        self._context = context
        self._clock = clock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._unsent = b""  # encrypted
        self._taken = 0  # bytes of the attempt before, which are encrypted and not yet sent
        self._ended: ssl.SSLError | bool = False

    def shake_hands(self, *, timeout_s: float) -> None:
        """Wait for the handshake; from then on the socket does not block. If it fails, the socket is closed.

        Raises:
            TimeoutError: The other end has not answered in time.
            ssl.SSLError: It does not speak TLS, or its certificate is not acceptable.
            OSError: The connection broke.
        """
        try:
            self._shake_hands(self._clock() + timeout_s)
            self._sock.setblocking(False)  # noqa: FBT003 - the standard library's
        except BaseException:
            self.close()
            raise

    @property
    def pending(self) -> bool:
        """Whether `recv` has something to say although the descriptor may not say so."""
        return bool(self._incoming.pending or self._tls.pending() or self._ended)

    @property
    def wants_write(self) -> bool:
        """Whether something encrypted waits until the socket can be written to."""
        return bool(self._unsent or self._outgoing.pending)

    def recv(self, size: int) -> bytes:
        """Return up to `size` bytes of what has come, of as many records as that takes; nothing at the end.

        Raises:
            ssl.SSLWantReadError: There is nothing for now.
            ssl.SSLError: The stream is broken, or was ended with an alert, which the context remembers.
            OSError: The connection broke.
        """
        data = self._read(size)
        if self.wants_write:  # TLS has answered something by itself
            with contextlib.suppress(OSError):  # whoever writes next hears of it
                self.flush()
        if data:
            return data
        if isinstance(self._ended, ssl.SSLError):
            raise self._ended
        if not self._ended:
            raise ssl.SSLWantReadError
        return b""

    def send(self, data: bytes | bytearray) -> int:
        """Write some of the data; return how many bytes.

        Raises:
            ssl.SSLWantWriteError: There is no room for now. The bytes may have been taken all the same: the next
                attempt must begin with them.
            OSError: The connection broke.
        """
        if not self._taken:
            self.flush()
            self._taken = self._tls.write(data)  # a record at most
        self.flush()
        taken, self._taken = self._taken, 0
        return taken

    def flush(self) -> None:
        """Write what is encrypted.

        Raises:
            ssl.SSLWantWriteError: There is no room for all of it.
            OSError: The connection broke.
        """
        try:
            while self.wants_write:
                self._unsent = self._unsent or self._outgoing.read()
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            raise ssl.SSLWantWriteError from None
        except OSError:
            # The other end may have hung up before we wrote: its reason is there to read.
            with contextlib.suppress(OSError):
                while not self._ended:
                    self._read(CHUNK)
            self._ended = self._ended or True
            raise

    def close(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        """Set whether the socket blocks; this object needs one that does not."""
        self._sock.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """Set an option of the socket."""
        self._sock.setsockopt(level, option, value)

    def _shake_hands(self, deadline: float) -> None:
        while True:
            left_s = deadline - self._clock()
            if left_s <= 0.0:
                raise TimeoutError
            self._sock.settimeout(left_s)
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._sock.sendall(self._outgoing.read())  # the alert that says why
                raise
            self._sock.sendall(self._outgoing.read())
            if done:
                return
            self._take(self._sock.recv(CHUNK))

    def _read(self, size: int) -> bytes:
        if not self.pending:
            try:
                self._take(self._sock.recv(CHUNK))
            except BlockingIOError:
                raise ssl.SSLWantReadError from None
        return self._decrypt(size)

    def _take(self, data: bytes) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _decrypt(self, size: int) -> bytes:
        """Return what is there, up to `size` bytes; note how the stream has ended, if it has."""
        pieces = []
        while size and not self._ended:
            try:
                piece = self._tls.read(min(size, RECORD))
            except ssl.SSLWantReadError:
                break
            except ssl.SSLEOFError:
                self._ended = True  # without a goodbye of TLS: MQTT has its own
                break
            except ssl.SSLError as error:
                self._ended = self._context.alert = error
                break
            if not piece:
                self._ended = True
                break
            pieces.append(piece)
            size -= len(piece)
            if not self._incoming.pending:
                break
        return b"".join(pieces)
