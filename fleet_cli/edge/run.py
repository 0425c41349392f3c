"""`fleet edge run`: the edge as a service."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fleet_edge.edge import Edge
from fleet_edge.settings import EdgeSettings
from fleet_edge.store.engine import parse_url, shown
from fleet_runtime.settings import load_settings
from fleet_runtime.systemd import Systemd

__all__ = ["run_command"]


def run_command(
    config: Annotated[Path | None, typer.Option(help="TOML file.", envvar="FLEET_EDGE_CONFIG")] = None,
    fleet: Annotated[str | None, typer.Option(help="Fleet's name.")] = None,
    edge: Annotated[str | None, typer.Option(help="This edge's name.")] = None,
    host: Annotated[str | None, typer.Option(help="Broker's host.")] = None,
    port: Annotated[int | None, typer.Option(help="Broker's port.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Who vouches for the broker (PEM); turns TLS on.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="This edge's own certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    target: Annotated[str | None, typer.Option(help="Large model: folder, Hugging Face repo id or GGUF file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads; 0 leaves it to torch.")] = None,
    db: Annotated[str | None, typer.Option(help="SQLAlchemy URL of the session log.")] = None,
    spool: Annotated[Path | None, typer.Option(help="Folder for records while the database is away.")] = None,
    form: Annotated[str | None, typer.Option(help="Downlink form: auto, sparse, samples or dense.")] = None,
) -> None:
    """Verify the drafts of a fleet until told to stop. SIGTERM lets open sessions end first; SIGINT does not.

    A second SIGTERM ends it at once too. What is open then goes on at another edge, or here when this one is back.
    """
    settings = load_settings(
        EdgeSettings,
        config=config,
        flags={
            "fleet": fleet,
            "edge": edge,
            "broker": {"host": host, "port": port, "ca": ca, "certificate": certificate, "key": key},
            "target": target,
            "dtype": dtype,
            "threads": threads,
            "db": db,
            "spool": spool,
            "form": form,
        },
    )
    running, unit = Edge(settings), Systemd.from_environment()

    def tell() -> None:
        online = (
            f"Edge {settings.edge} of fleet {settings.fleet} is online at {settings.broker.host}:{settings.broker.port}"
        )
        info, database = running.target, shown(parse_url(settings.db))
        _say(f"{online}: target {info.name}, {info.vocabulary}, context {info.context}, sessions in {database}.")
        unit.ready(f"{online}.")

    _say(f"Loading the target model {settings.target} …")
    running.run(on_online=tell, on_step=unit.alive, on_end=unit.stopping)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
