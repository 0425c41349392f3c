"""The API's socket and server: on an address and port, or on a Unix socket."""

import socket
from pathlib import Path
from typing import Final

from starlette.types import ASGIApp

from fleet_common import http_server
from fleet_common.http_server import HttpServer, unusable
from fleet_common.metrics import ListenAddress
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
    """Listen on an address or a Unix socket; raise HttpServerError if it is in use or not permitted.

    `keys`: applications need keys.
    """
    if isinstance(address, ListenAddress):
        return http_server.listen(address.host, address.port, setting="api_listen")
    try:
        return _listen_unix(address, _EVERYBODY if keys else _OWNER)
    except OSError as error:
        raise unusable(address, error, setting="api_listen") from error


def listen_as(settings: DeviceSettings) -> socket.socket:
    """Listen where settings with an API say; raise HttpServerError as `listen`."""
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

    A `certificate` turns TLS on, except for a Unix socket.
    """

    def __init__(self, app: ASGIApp, sock: socket.socket, *, certificate: Path | None = None) -> None:
        name = sock.getsockname()
        self._file = Path(name) if isinstance(name, str) else None
        certificate = certificate if self._file is None else None
        super().__init__(app, sock, name="api", grace_s=_GRACE_S, certificate=certificate, setting="api_certificate")

    def stop(self) -> None:
        if self._file is not None:  # first, since a device that starts meanwhile makes a new one
            self._file.unlink(missing_ok=True)
            self._file = None
        super().stop()
