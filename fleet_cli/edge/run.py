"""`fleet edge run`: the edge as a service."""

import sys

from fleet_cli.settings_flags import with_settings
from fleet_edge.edge import Edge
from fleet_edge.settings import EdgeSettings
from fleet_edge.store.engine import parse_url, shown
from fleet_runtime.systemd import Systemd

__all__ = ["run_command"]


@with_settings(EdgeSettings)
def run_command(settings: EdgeSettings) -> None:
    """Verify the drafts of a fleet until told to stop. SIGTERM lets open sessions end first; SIGINT does not.

    A second SIGTERM ends it at once too. What is open then goes on at another edge, or here when this one is back.
    """
    running, unit = Edge(settings), Systemd.from_environment()

    def tell() -> None:
        online = (
            f"Edge {settings.edge} of fleet {settings.fleet} is online at {settings.broker.host}:{settings.broker.port}"
        )
        info, database = running.target, shown(parse_url(settings.db))
        target = f"target {info.name}, {info.vocabulary}, context {info.context}, on {info.runs_on}"
        _say(f"{online}: {target}, sessions in {database}.")
        unit.ready(f"{online}.")

    running.check()
    _say(f"Loading the target model {settings.target} …")
    running.run(on_online=tell, on_step=unit.alive, on_end=unit.stopping)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
