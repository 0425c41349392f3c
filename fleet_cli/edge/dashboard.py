"""Dashboard within an edge: served from its process, where the setting `dashboard` says."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet_cli.errors import CommandError
from fleet_common.settings import Settings, load_settings
from fleet_edge.settings import EdgeSettings
from schemas.errors import FleetError

_log = logging.getLogger(__name__)


@contextmanager
def edge_dashboard(settings: EdgeSettings) -> Iterator[Callable[[], str]]:
    """Serve the dashboard from the moment that it is started until the context is left.

    Yields:
        What starts it, once the edge has made its database; returns where it is, or nothing where there is none. An
        edge goes on without its dashboard.

    Raises:
        CommandError: What it needs is not installed.
        SettingsError: Its settings cannot work.
    """
    if not settings.dashboard:
        yield lambda: ""
        return
    try:
        from fleet_admin.dashboard.server import DashboardServer
        from fleet_admin.dashboard.settings import DashboardSettings
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The setting dashboard needs the package {error.name!r}; install this one with the extra 'dashboard'."
        ) from error
    # All but where it is comes from its own settings: an edge's identity at the broker is no administrator's.
    flags = {"listen": settings.dashboard, "db": settings.db}
    served = load_settings(DashboardSettings, config=_file_of(DashboardSettings), flags=flags)
    running: list[DashboardServer] = []

    def start() -> str:
        try:
            running.append(DashboardServer(served))
        except FleetError as error:
            _log.error("The edge has no dashboard: %s", error)
            return ""
        return running[0].address

    try:
        yield start
    finally:
        for each in running:
            each.stop()


def _file_of(model: type[Settings]) -> Path | None:
    """Return the TOML file that the environment names for a program's settings."""
    named = os.environ.get(model.variable_prefix + "CONFIG")
    return Path(named) if named else None
