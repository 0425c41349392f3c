"""TLS of a link: its files, the requirements on the broker, certificate renewal, and the stream over a socket.

A renewed certificate is used without a restart. The link never uses a pair of which only one file has been replaced, an
unusable renewal never ends a working connection, and a renewal that the broker refuses does not lock the link out.
"""

import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from fleet_common.mqtt.errors import ConnectFailed, LinkFault
from fleet_common.mqtt.failures import reason_of
from fleet_common.mqtt.settings import TlsSettings

_log = logging.getLogger(__name__)


def certificate_in(path: Path | None) -> x509.Certificate | None:
    """Return the first certificate of a PEM file; None if there is none that can be read."""
    try:
        return None if path is None else x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return None


def certificate_end(path: Path | None) -> datetime | None:
    found = certificate_in(path)
    return None if found is None else found.not_valid_after_utc


def certificate_name(path: Path | None) -> str | None:
    """Return the common name in a certificate, our client id at the broker; None if none can be read."""
    found = certificate_in(path)
    names = [] if found is None else found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else None


# For TLS 1.2: ephemeral keys and authenticated encryption only. TLS 1.3 has nothing else.
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL:!eNULL"


class LinkContext(ssl.SSLContext):
    """TLS context that remembers the alert with which the broker refused us.

    Under TLS 1.3 the alert arrives after the handshake, while the MQTT library reads, and would be lost.
    """

    alert: ssl.SSLError | None = None


def tls_context(tls: TlsSettings, *, now: datetime | None = None) -> LinkContext:
    """Return the context for connections; raise ConnectFailed if a file is unusable, or not valid at `now`."""
    context = LinkContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the broker's certificate and host name
    context.options |= ssl.OP_NO_RENEGOTIATION  # of TLS 1.2: reading never waits for writing, nor the reverse
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False  # only names that the authority entered as host names
    context.set_ciphers(CIPHERS)
    _load_authority(context, tls.ca)
    if tls.certificate is not None:
        key = tls.key if tls.key is not None else tls.certificate
        _check_certificate(tls.certificate, now if now is not None else datetime.now(UTC))
        _load_pair(context, tls.certificate, key)
    return context


def _load_authority(context: ssl.SSLContext, path: Path) -> None:
    _read_file(path)
    try:
        context.load_verify_locations(str(path))
    except (OSError, ValueError) as error:
        raise _unusable(path, "it holds no certificate in PEM; take the fleet authority's ca.pem") from error


def _check_certificate(path: Path, now: datetime) -> None:
    try:
        found = x509.load_pem_x509_certificate(_read_file(path))
    except ValueError as error:
        raise _unusable(path, "it holds no certificate in PEM; take the one that the authority signed") from error
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    clock = f"this machine's clock says {now:%Y-%m-%d %H:%M} (UTC)"
    if now < begins:
        raise _unusable(path, f"it is valid from {begins:%Y-%m-%d %H:%M} and {clock}; set the clock")
    if now >= ends:
        raise _unusable(path, f"it ended at {ends:%Y-%m-%d %H:%M} and {clock}; have it renewed, or set the clock")


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _read_file(key)
    try:
        context.load_cert_chain(str(certificate), str(key), password=_nobody_to_ask)
    except _Encrypted as error:
        raise _unusable(key, "it has a passphrase; store it without one") from error
    except (OSError, ValueError) as error:
        mismatch = "KEY_VALUES_MISMATCH" in str(error) or "KEY_TYPE_MISMATCH" in str(error)
        why = f"it does not belong to the certificate {certificate}" if mismatch else "it holds no private key in PEM"
        raise _unusable(key, f"{why}; take the two that were made together") from error


class _Encrypted(Exception):  # noqa: N818 - reads as what it says
    """The key has a passphrase."""


def _nobody_to_ask() -> str:
    # Without this, the library would ask on the terminal, where a service would wait for ever.
    raise _Encrypted


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"{reason_of(error)}; check the path and who may read it") from error


def _unusable(path: Path, why: str) -> ConnectFailed:
    return ConnectFailed(f"The TLS files cannot be used: {path}: {why}.", fault=LinkFault.CERTIFICATE, final=True)


LOOK_S: Final = 1.0
RETRY_S: Final = 600.0  # before files that the broker refused are tried again


_Stamp = tuple[tuple[int, ...] | None, ...]


class Credentials:
    """Choose the context of each connection. Belongs to the link's thread."""

    def __init__(self, tls: TlsSettings | None, *, clock: Callable[[], float]) -> None:
        self._tls = tls
        self._clock = clock
        self._proven: LinkContext | None = None  # a connection was made with it
        self._proven_stamp: _Stamp = ()
        self._tried: LinkContext | None = None
        self._tried_stamp: _Stamp = ()
        self._unfit: _Stamp = ()  # files that do not match, or that the broker refused
        self._unfit_until = 0.0
        self._looked_at = -LOOK_S

    def current(self) -> LinkContext | None:
        """Return the context for a new connection, None for plain TCP; raise ConnectFailed without usable files."""
        if self._tls is None:
            return None
        stamp = _stamp(self._tls)
        self._tried, self._tried_stamp = self._proven, self._proven_stamp
        if self._tried is None or self._new(stamp):
            try:
                self._tried, self._tried_stamp = tls_context(self._tls), stamp
            except ConnectFailed as error:
                if self._tried is None:
                    raise
                self._reject(stamp, str(error))
        self._tried.alert = None
        return self._tried

    def accepted(self) -> None:
        self._proven, self._proven_stamp = self._tried, self._tried_stamp

    def refused(self, why: str) -> None:
        """Record that the connection failed; if the files were new, the previous ones are tried next."""
        if self._proven is not None and self._tried_stamp != self._proven_stamp:
            self._reject(self._tried_stamp, why)

    def renewed(self) -> bool:
        """There are usable files that this connection was not made with. Checks at most once a second."""
        if self._tls is None or self._clock() - self._looked_at < LOOK_S:
            return False
        self._looked_at = self._clock()
        stamp = _stamp(self._tls)
        if not self._new(stamp):
            return False
        try:
            tls_context(self._tls)
        except ConnectFailed as error:
            self._reject(stamp, str(error))
            return False
        return True

    def _new(self, stamp: _Stamp) -> bool:
        unfit = stamp == self._unfit and self._clock() < self._unfit_until
        return stamp != self._proven_stamp and not unfit

    def _reject(self, stamp: _Stamp, why: str) -> None:
        if stamp != self._unfit:
            _log.warning("The renewed TLS files are not used yet, but the previous ones: %s", why)
        self._unfit, self._unfit_until = stamp, self._clock() + RETRY_S


def _stamp(tls: TlsSettings) -> _Stamp:
    return tuple(_facts(path) for path in (tls.ca, tls.certificate, tls.key) if path is not None)


def _facts(path: Path) -> tuple[int, ...] | None:
    """Identify the content of a file by its inode, size and time; None if it is away for the moment."""
    try:
        found = os.stat(path)  # noqa: PTH116 - follows links, as configuration tools set them
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


CHUNK: Final = 1 << 16  # of one reading from the network
RECORD: Final = 1 << 14  # most bytes in a record (RFC 8446, 5.1)


class TlsStream:
    """Client side of a TLS connection. After the handshake it never blocks. Belongs to one thread.

    Where there is nothing to read, or no room to write, it raises the same exceptions as `ssl.SSLSocket`.
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
        self._taken = 0  # bytes of the previous attempt that are encrypted but not sent
        self._ended: ssl.SSLError | bool = False

    def shake_hands(self, *, timeout_s: float) -> None:
        """Wait for the handshake, after which the socket does not block; close it on failure."""
        try:
            self._shake_hands(self._clock() + timeout_s)
            self._sock.setblocking(False)  # noqa: FBT003 - the standard library's
        except BaseException:
            self.close()
            raise

    @property
    def pending(self) -> bool:
        """`recv` would return or raise something although the descriptor may not say so."""
        return bool(self._incoming.pending or self._tls.pending() or self._ended)

    @property
    def wants_write(self) -> bool:
        return bool(self._unsent or self._outgoing.pending)

    def recv(self, size: int) -> bytes:
        """Return up to `size` bytes of what has arrived, of any number of records; nothing at the end."""
        data = self._read(size)
        if self.wants_write:  # TLS has sent an answer
            with contextlib.suppress(OSError):  # the next write reports it
                self.flush()
        if data:
            return data
        if isinstance(self._ended, ssl.SSLError):
            raise self._ended
        if not self._ended:
            raise ssl.SSLWantReadError
        return b""

    def send(self, data: bytes | bytearray) -> int:
        """Write some of the data; return the number of bytes.

        After ssl.SSLWantWriteError some bytes may have been taken all the same: the next attempt must begin with them.
        """
        if not self._taken:
            self.flush()
            self._taken = self._tls.write(data)  # a record at most
        self.flush()
        taken, self._taken = self._taken, 0
        return taken

    def flush(self) -> None:
        """Write encrypted data; raise ssl.SSLWantWriteError if there is no room for all of it."""
        try:
            while self.wants_write:
                self._unsent = self._unsent or self._outgoing.read()
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            raise ssl.SSLWantWriteError from None
        except OSError:
            # The other end may have closed before we wrote: read its reason.
            with contextlib.suppress(OSError):
                while not self._ended:
                    self._read(CHUNK)
            self._ended = self._ended or True
            raise

    def shutdown(self, how: int) -> None:
        """End a direction of the connection without close_notify: MQTT has its own DISCONNECT."""
        self._sock.shutdown(how)

    def close(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
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
            self._feed(self._sock.recv(CHUNK))

    def _read(self, size: int) -> bytes:
        if not self.pending:
            try:
                self._feed(self._sock.recv(CHUNK))
            except BlockingIOError:
                raise ssl.SSLWantReadError from None
        return self._decrypt(size)

    def _feed(self, data: bytes) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _decrypt(self, size: int) -> bytes:
        """Return up to `size` decrypted bytes; record how the stream has ended, if it has."""
        pieces = []
        while size and not self._ended:
            try:
                piece = self._tls.read(min(size, RECORD))
            except ssl.SSLWantReadError:
                break
            except ssl.SSLEOFError:
                self._ended = True  # without close_notify: MQTT has its own DISCONNECT
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
