"""Server of the dashboard: uvicorn on a thread of its own."""

import errno
import socket
import threading
from typing import Final

import uvicorn

from fleet_admin.dashboard.app import create_app
from fleet_admin.dashboard.errors import DashboardError
from fleet_admin.dashboard.services import Services, open_services
from fleet_admin.dashboard.settings import DashboardSettings, listen_address

__all__ = ["DashboardServer"]

_GRACE_S: Final = 2
_CONNECTIONS: Final = 500
_BACKLOG: Final = 128


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
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # the gate believes those of the settings' proxies alone
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=_GRACE_S,
            ssl_certfile=settings.https_certificate,
            ssl_keyfile=settings.https_key,
        )
        try:
            config.load()
        except (OSError, ValueError) as error:
            raise DashboardError(
                f"The certificate {settings.https_certificate} and its key cannot be used: {error}."
            ) from error
        self._sock = _listen(host, port)
        scheme = "https" if settings.https_certificate else "http"
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{scheme}://{shown}:{self._sock.getsockname()[1]}/"
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._sock],), name="dashboard", daemon=True)
        self._thread.start()
        self._services.steering.start()

    def wait(self) -> None:
        """Wait until it has been stopped."""
        while self._thread.is_alive():
            self._thread.join(1.0)  # in pieces, so that Ctrl-C is taken

    def stop(self) -> None:
        """Finish the answers under way, shortly, and end. Idempotent."""
        self._services.steering.stop()
        self._server.should_exit = True
        self._thread.join()
        self._sock.close()


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
