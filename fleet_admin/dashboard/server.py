"""Server of the dashboard."""

import errno
import socket
from typing import Final

from fleet_admin.dashboard.app import create_app
from fleet_admin.dashboard.errors import DashboardError
from fleet_admin.dashboard.services import Services, open_services
from fleet_admin.dashboard.settings import DashboardSettings, listen_address
from fleet_common.http_server import HttpServer

_GRACE_S: Final = 2
_KEEP_ALIVE_S: Final = 10
_BACKLOG: Final = 512


class DashboardServer:
    """Serves the dashboard from the moment that it is made, until it is stopped.

    Args:
        settings: Of the dashboard.
        services: What its pages are made of; opened as the settings say if left out.

    Attributes:
        address: Where it is, as a URL.

    Raises:
        DashboardError: The address cannot be listened on, or the certificate cannot be used.
        StoreError: The database cannot be opened.
    """

    def __init__(self, settings: DashboardSettings, *, services: Services | None = None) -> None:
        self._services = services or open_services(settings)
        app = create_app(self._services)
        host, port = listen_address(settings.listen)
        sock = _listen(host, port)
        scheme = "https" if settings.https_certificate else "http"
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{scheme}://{shown}:{sock.getsockname()[1]}/"
        try:
            self._server = HttpServer(
                app,
                sock,
                name="dashboard",
                grace_s=_GRACE_S,
                keep_alive_s=_KEEP_ALIVE_S,
                certificate=settings.https_certificate,
                key=settings.https_key,
            )
        except (OSError, ValueError) as error:
            sock.close()
            raise DashboardError(
                f"The certificate {settings.https_certificate} and its key cannot be used: {error}."
            ) from error
        self._server.start()
        self._services.steering.start()

    def wait(self) -> None:
        """Wait until it has been stopped."""
        self._server.wait()

    def stop(self) -> None:
        """Finish the answers under way, shortly, and end. Idempotent."""
        self._services.steering.stop()
        self._server.stop()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        what = (
            "is in use: stop what listens there"
            if error.errno == errno.EADDRINUSE
            else f"cannot be used ({error.strerror})"
        )
        raise DashboardError(f"The dashboard's address {host}:{port} {what}, or listen elsewhere.") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
