"""Pages of the dashboard over a session log, each loaded several times."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final

from benchmarks.log.filling import name_of
from benchmarks.log.questions import Answered
from benchmarks.shared.viewer import Viewer
from fleet_admin.dashboard.server import DashboardServer
from fleet_admin.dashboard.services import open_services
from fleet_admin.dashboard.settings import DashboardSettings

__all__ = ["pages"]

_PATHS: Final = (
    "/",
    "/?range=1h",
    "/?range=30d",
    "/?range=365d",
    "/devices",
    "/devices/{device}",
    "/edges",
    "/sessions",
    "/sessions?device={device}",
    "/sessions?edge=edge-rare",
    "/sessions?reason=failed",
    "/sessions/{session}",
    "/usage",
    "/usage?range=30d",
    "/usage?range=365d&by=device",
    "/rollouts",
    "/alerts",
    "/audit",
)


def pages(url: str, *, now: datetime, devices: int, times: int) -> Iterator[tuple[str, Answered]]:
    """Load each page several times, and tell what that took from the request to the last byte (ms)."""
    with _dashboard(url, now) as (viewer, session):
        for path in _PATHS:
            taken = []
            for _ in range(times):
                begun = time.perf_counter()
                viewer.look(path.format(session=session, device=name_of(min(7, devices - 1))))
                taken.append(1000 * (time.perf_counter() - begun))
            ordered = sorted(taken)
            late = ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]
            yield path, Answered(statistics.median(ordered), late, taken[0])


@contextmanager
def _dashboard(url: str, now: datetime) -> Iterator[tuple[Viewer, str]]:
    settings = DashboardSettings(db=url, listen="127.0.0.1:0")
    services = open_services(settings, now=lambda: now)
    server = DashboardServer(settings, services=services)
    try:
        yield Viewer(server.address, services), services.log.sessions(limit=1)[0].session
    finally:
        server.stop()
