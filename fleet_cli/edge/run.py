"""`fleet edge run`: the edge as a service."""

import logging
import sys

from fleet_cli.alerts import alerts_of
from fleet_cli.edge.dashboard import edge_dashboard
from fleet_cli.events_flag import with_events
from fleet_cli.settings_flags import with_settings
from fleet_common.host import Systemd, use_one_heap
from fleet_common.logs import Event, EventStream, hold_back_repetition, write_log_as
from fleet_edge.edge import Edge
from fleet_edge.settings import EdgeSettings
from fleet_edge.store.engine import parse_url, shown

_log = logging.getLogger(__name__)


@with_events(outlives_reader=True)
@with_settings(EdgeSettings)
def run_command(settings: EdgeSettings, *, events: EventStream) -> None:
    """Verify the drafts of a fleet until told to stop. SIGTERM lets open sessions end first; SIGINT does not.

    A second SIGTERM ends it at once too. What is open then goes on at another edge, or here when this one is back.
    """
    write_log_as(settings.log_format, fleet=settings.fleet, edge=settings.edge)
    hold_back_repetition()
    use_one_heap()  # before there are threads
    running, unit, alerts = Edge(settings), Systemd.from_environment(), alerts_of(settings.alerts, settings.db)

    def say(sentence: str) -> None:
        if settings.log_format == "json":
            _log.info(sentence)
        elif not events:
            print(sentence, file=sys.stderr, flush=True)

    def tell() -> None:
        online = (
            f"Edge {settings.edge} of fleet {settings.fleet} is online at {settings.broker.host}:{settings.broker.port}"
        )
        info, database = running.target, shown(parse_url(settings.db))
        events.write(
            Event.ONLINE,
            fleet=settings.fleet,
            edge=settings.edge,
            host=settings.broker.host,
            port=settings.broker.port,
            target=info.name,
            vocabulary=str(info.vocabulary),
            context=info.context,
            runs_on=info.runs_on,
            database=database,
        )
        target = f"target {info.name}, {info.vocabulary}, context {info.context}, on {info.runs_on}"
        say(f"{online}: {target}, sessions in {database}.")
        if address := start_dashboard():
            say(f"Its dashboard is at {address}.")
        unit.ready(f"{online}.")
        if alerts is not None:
            alerts.start()

    with edge_dashboard(settings) as start_dashboard:
        running.check()
        events.write(Event.LOADING, target=settings.target)
        say(f"Loading the target model {settings.target} …")
        try:
            handed_over = running.run(
                on_online=tell,
                on_step=unit.alive,
                on_end=unit.stopping,
                on_drain=lambda sessions: events.write(Event.DRAINING, sessions=sessions),
            )
        finally:
            if alerts is not None:
                alerts.close()
        events.write(Event.STOPPED, handed_over=handed_over)
