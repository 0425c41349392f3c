"""API's HTTP server, on loopback."""

import errno
import socket
from typing import Final

from starlette.types import ASGIApp

from fleet_common.http_server import HttpServer
from fleet_device.errors import ConfigurationError

HOST: Final = "127.0.0.1"

# For the answers that are under way when the device stops.
_GRACE_S: Final = 3


def listen(port: int) -> socket.socket:
    """Take the port; 0 takes any that is free.

    Raises:
        ConfigurationError: It is in use, or not for us to take.
    """
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = "is in use: stop what listens there (maybe a device that runs already)"
        else:
            what = f"cannot be used ({error.strerror})"
        raise ConfigurationError(
            f"The API's port {HOST}:{port} {what}, or set api_port to another; 0 turns the API off."
        ) from error
    # Accepted connections inherit it. asyncio sets it only where a socket names its protocol, which this one does not:
    # an answer's second packet would wait for the client's delayed acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class ApiServer(HttpServer):
    """Serves an application. Connections are accepted from the moment that the socket listens.

    Args:
        app: The application.
        sock: From `listen`; closed at the end.

    Attributes:
        address: Where it is, as a URL.
    """

    def __init__(self, app: ASGIApp, sock: socket.socket) -> None:
        self.address = f"http://{HOST}:{sock.getsockname()[1]}"
        super().__init__(app, sock, name="api", grace_s=_GRACE_S)
