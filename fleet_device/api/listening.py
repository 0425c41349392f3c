"""The API's socket and server: on an address and port, or on a Unix socket."""

import errno
import socket
from pathlib import Path
from typing import Final

from starlette.types import ASGIApp

from fleet_common.http_server import HttpServer
from fleet_common.metrics import ListenAddress
from fleet_device.errors import ConfigurationError
from fleet_device.settings import DeviceSettings

# For running answers when the device stops.
_GRACE_S: Final = 3
_BACKLOG: Final = 128

FREE_PORT: Final = ListenAddress("127.0.0.1", 0)
"""Any free port of loopback."""

_OWNER: Final = 0o600
_EVERYBODY: Final = 0o666
"""Permissions of a Unix socket. With keys every user may connect, since a container has users of its own."""


def listen(address: ListenAddress | Path = FREE_PORT, *, keys: bool = False) -> socket.socket:
    """Listen on an address or a Unix socket; raise ConfigurationError if it is in use or not permitted.

    `keys`: applications need keys.
    """
    try:
        if isinstance(address, Path):
            return _listen_unix(address, _EVERYBODY if keys else _OWNER)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listener = socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        where = address if isinstance(address, Path) else f"{address.host}:{address.port}"
        if error.errno == errno.EADDRINUSE:
            what = "is in use: stop what listens there (maybe a device that runs already)"
        else:
            what = f"cannot be used ({error.strerror or error})"
        raise ConfigurationError(
            f"The API's address {where} {what}, or set api_listen to another; an empty one turns the API off."
        ) from error
    # Accepted connections inherit it. asyncio sets it only on sockets that name their protocol, unlike this one: an
    # answer's second packet would wait for the client's delayed acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def listen_as(settings: DeviceSettings) -> socket.socket:
    """Listen where settings with an API say; raise ConfigurationError as `listen`."""
    address = settings.api_address
    assert address is not None
    return listen(address, keys=settings.applications is not None)


def release(listener: socket.socket) -> None:
    """Close a socket of `listen`, and remove its file."""
    name = listener.getsockname()
    if isinstance(name, str):
        Path(name).unlink(missing_ok=True)
    listener.close()


def _listen_unix(path: Path, mode: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        _remove_abandoned(path)
        listener.bind(str(path))
        path.chmod(mode)  # before anybody can connect
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_abandoned(path: Path) -> None:
    """Remove the socket of a program that has ended without doing so; leave any other file."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


class ApiServer(HttpServer):
    """Serve an application on a socket of `listen`, which is released at the end; `address` is its URL.

    A `certificate` turns TLS on, except for a Unix socket; raise ConfigurationError if it cannot be used.
    """

    def __init__(self, app: ASGIApp, sock: socket.socket, *, certificate: Path | None = None) -> None:
        name = sock.getsockname()
        self._file = Path(name) if isinstance(name, str) else None
        if self._file is not None:
            self.address, certificate = f"unix:{name}", None
        else:
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            self.address = f"{'http' if certificate is None else 'https'}://{host}:{name[1]}"
        try:
            super().__init__(app, sock, name="api", grace_s=_GRACE_S, certificate=certificate)
        except (OSError, ValueError) as error:
            release(sock)
            raise ConfigurationError(
                f"The certificate {certificate} of the API cannot be used ({error}): put certificate, chain and key "
                "into that file, and correct api_certificate."
            ) from error

    def stop(self) -> None:
        if self._file is not None:  # first, since a device that starts meanwhile makes a new one
            self._file.unlink(missing_ok=True)
            self._file = None
        super().stop()
