"""Preflight checks of the edge before a model is loaded: the target's files, database, spool and broker."""

from collections.abc import Callable
from functools import partial
from typing import Final

from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_common.settings import SettingsError, check_all
from fleet_edge.session_log.alerts.settings import load_alert_settings
from fleet_edge.session_log.database import check_database
from fleet_edge.session_log.errors import SpoolInUse
from fleet_edge.session_log.spool import Spool
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.registry import check_draft, check_verifier

# The broker may be starting too; if another check has failed, the wait is short.
_CONNECT_S: Final = 10.0
_SHORT_S: Final = 1.0


def preflight(settings: EdgeSettings, *, make_link: Callable[[LinkSettings], Link] = PahoLink) -> None:
    """Check all that can be checked before the target model is loaded; creates the tables of the database.

    An unreachable database is not an error: the edge starts without it. Raises `SettingsError` with a line for each
    setting that cannot work, `ConnectFailed` if only the broker cannot be reached.
    """
    runs_already = False

    def check_spool() -> None:
        nonlocal runs_already
        try:
            Spool(settings.spool).close()
        except SpoolInUse:
            runs_already = True
            raise

    wrong: SettingsError | None = None
    try:
        check_all(
            settings,
            {
                "target": partial(check_verifier, settings),
                "edge_draft": partial(check_draft, settings),
                "db": partial(check_database, settings.db),
                "spool": check_spool,
                "alerts": partial(load_alert_settings, settings.alerts),
            },
        )
    except SettingsError as error:
        wrong = error
    # A second connection of the same name would disconnect the running edge.
    if not runs_already:
        try:
            link = make_link(settings.broker.link(settings.fleet, settings.edge, will=None))
            link.start(timeout_s=_CONNECT_S if wrong is None else _SHORT_S)
            link.stop()
        except ConnectFailed as error:
            if wrong is None:
                raise
            wrong = SettingsError(f"{wrong}\n{error}")
    if wrong is not None:
        raise wrong
