"""`fleet admin serve`: the dashboard."""

import signal
import sys

import typer

from fleet_admin.dashboard.settings import DashboardSettings
from fleet_cli.admin.options import needs_extra
from fleet_cli.alerts import alerts_of
from fleet_cli.errors import ExitCode
from fleet_cli.settings_flags import with_settings


def register(app: typer.Typer) -> None:
    app.command()(serve)


@with_settings(DashboardSettings)
def serve(settings: DashboardSettings) -> None:
    """Serve the dashboard until told to stop."""
    with needs_extra("dashboard"):
        from fleet_admin.dashboard.server import DashboardServer
        from fleet_admin.dashboard.services import open_services

    # As Ctrl-C does: the answers under way are finished.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.DONE))
    services, alerts = open_services(settings), alerts_of(settings.alerts, settings.db)
    server = DashboardServer(settings, services=services)
    try:
        print(f"The dashboard is at {server.address}", file=sys.stderr, flush=True)
        if not services.accounts.list():
            print("Nobody can log in yet: fleet admin user add NAME --role operator", file=sys.stderr, flush=True)
        if alerts is not None:
            alerts.start()
        server.wait()
    finally:
        if alerts is not None:
            alerts.close()
        server.stop()
