"""Alerts that a program looks for beside its work, if its settings name their file."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fleet_admin.alerts.evaluator import RunningAlerts


def alerts_of(config: Path | None, db: str) -> "RunningAlerts | None":
    """Return what looks for alerts, not started yet; None if nothing is to.

    Args:
        config: TOML file of their settings.
        db: URL of the session log, which need not be there yet.

    Raises:
        SettingsError: Their settings cannot work.
    """
    if config is None:
        return None
    from fleet_admin.alerts.alerts import Alerts
    from fleet_admin.alerts.evaluator import RunningAlerts
    from fleet_admin.alerts.settings import AlertSettings
    from fleet_common.settings import load_settings

    settings = load_settings(AlertSettings, config=config.expanduser(), flags={})
    return RunningAlerts(Alerts(db, later=True), settings)
