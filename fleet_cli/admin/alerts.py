"""`fleet admin alerts`: what is wrong with the fleet; looked for, acknowledged, cleared."""

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fleet_admin.reports import ALERTS
from fleet_cli.admin.actor import Acting, actor_of
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Wide
from fleet_cli.errors import CommandError
from fleet_cli.tables import cell, print_json, print_table

if TYPE_CHECKING:
    from fleet_admin.alerts.alerts import Alerts
    from fleet_admin.alerts.settings import AlertSettings
    from fleet_admin.alerts.views import AlertView

_MOST: Final = 1000


def register(app: typer.Typer) -> None:
    app.command()(alerts)


def alerts(
    everything: Annotated[bool, typer.Option("--all", help="Those too that are over, the latest first.")] = False,
    ack: Annotated[str | None, typer.Option(metavar="ID", help="Say that you take care of this one.")] = None,
    clear: Annotated[
        str | None, typer.Option(metavar="ID", help="End this one; what is still wrong makes a new one.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look for alerts until interrupted, and have them told.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="PATH", envvar="FLEET_ALERTS_CONFIG", help="TOML file: thresholds, and who is told."),
    ] = None,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List the alerts that are open; acknowledge or clear one; look for new ones."""
    if sum((ack is not None, clear is not None, watch)) > 1:
        raise CommandError("Give one of --ack, --clear and --watch.")
    if watch:
        _watch(db, config, as_json=as_json)
        return
    actor = actor_of(acting)
    with open_alerts(db, read_only=ack is None and clear is None) as book:
        if ack is not None:
            alert = book.acknowledge(ack, who=actor.who, source=actor.source)
            typer.echo(f"{cell(alert.acknowledged_by)} takes care of {alert.id[:8]}: {cell(alert.sentence)}")
            return
        if clear is not None:
            alert = book.clear(clear, who=actor.who, source=actor.source)
            typer.echo(f"{alert.id[:8]} is cleared: {cell(alert.sentence)}")
            return
        found = book.list(open=None if everything else True, limit=_MOST)
    if as_json:
        print_json(found)
        return
    empty = "There are no alerts." if everything else "No alert is open."
    print_table(f"Alerts: {len(found)}", ALERTS, found, wide=wide, empty=empty)


def open_alerts(url: str, *, read_only: bool) -> "Alerts":
    """Open the alerts of a session log.

    Raises:
        CommandError: A package is missing.
    """
    try:
        from fleet_admin.alerts.alerts import Alerts
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra 'admin'."
        ) from error
    return Alerts(url, read_only=read_only)


def load_alert_settings(config: Path | None) -> "AlertSettings":
    """Return the settings of alerts, from a TOML file and the environment."""
    from fleet_admin.alerts.settings import AlertSettings
    from fleet_common.settings import load_settings

    return load_settings(AlertSettings, config=config, flags={})


def _watch(db: str, config: Path | None, *, as_json: bool) -> None:
    from fleet_admin.alerts.evaluator import RunningAlerts

    settings = load_alert_settings(config)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    def show(alert: "AlertView") -> None:
        if as_json:
            print_json(alert)
        else:
            state = alert.severity if alert.open else "over"
            typer.echo(f"{cell(alert.last_at)} {state} {alert.id[:8]} {alert.rule}: {cell(alert.sentence)}")

    with open_alerts(db, read_only=False) as book, RunningAlerts(book, settings) as running:
        for alert in book.open():
            show(alert)
        typer.echo(f"Looking every {settings.every_s:g} s until interrupted.", err=True)
        while not stop.is_set():
            for alert in running.step():
                show(alert)
            stop.wait(settings.every_s)
