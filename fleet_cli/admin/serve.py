"""`fleet admin serve`: the dashboard."""

import sys

import typer

from fleet_admin.dashboard.settings import DashboardSettings
from fleet_cli.admin.options import needs_extra
from fleet_cli.settings_flags import with_settings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(serve)


@with_settings(DashboardSettings)
def serve(settings: DashboardSettings) -> None:
    """Serve the dashboard until told to stop."""
    with needs_extra("dashboard"):
        from fleet_admin.dashboard.server import DashboardServer
        from fleet_admin.dashboard.services import open_services

    services = open_services(settings)
    server = DashboardServer(settings, services=services)
    try:
        print(f"The dashboard is at {server.address}", file=sys.stderr, flush=True)
        if not services.accounts.list():
            print("Nobody can log in yet: fleet admin user add NAME --role operator", file=sys.stderr, flush=True)
        server.wait()
    finally:
        server.stop()
