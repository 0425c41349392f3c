"""`fleet broker render`: the files of a broker, from its description."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from broker_config.broker import Broker, BrokerMissing, describe, read_description
from broker_config.files import Profile, render_files, write_files
from broker_config.mosquitto import MosquittoVersion, installed_version
from broker_config.processes import find_mosquitto

LOOPBACK_PORT: Final = 1883
HOME: Final = Path("/etc/mosquitto/fleet")


def register(app: typer.Typer) -> None:
    app.command("render")(render_command)


def render_command(
    out: Annotated[Path, typer.Option(help="Folder to write to; made if it is not there.", file_okay=False)],
    profile: Annotated[Profile, typer.Option(help="Where the broker runs.")] = Profile.PRODUCTION,
    config: Annotated[Path | None, typer.Option(help="Description (TOML); what it lacks has a default.")] = None,
    fleet: Annotated[str | None, typer.Option(help="Fleet's name.")] = None,
    edge: Annotated[list[str] | None, typer.Option(help="Name of an edge; may be repeated.")] = None,
    monitor: Annotated[list[str] | None, typer.Option(help="Name of a monitor; may be repeated.")] = None,
    home: Annotated[
        Path | None, typer.Option(help=f"Where the files will lie on the broker's machine; {HOME} if left out.")
    ] = None,
    mosquitto: Annotated[
        MosquittoVersion | None, typer.Option(help="Version there; that of this machine's if left out, else 2.0.")
    ] = None,
) -> None:
    """Write mosquitto's configuration, access rules, firewall and systemd units."""
    flags = {"fleet": fleet, "edges": edge or None, "monitors": monitor or None}
    given = {key: value for key, value in flags.items() if value is not None}
    broker = _describe(config, profile, given)
    if home is None:
        # A broker for this machine runs where its files were written.
        home = out.resolve() if profile is Profile.LOOPBACK else HOME
    files = render_files(broker, profile, home=home, version=mosquitto or _version())
    write_files(files, out)
    for file in files:
        typer.echo(f"{out / file.name}")
    typer.echo(f"Next: fleet broker check {out}", err=True)


def _describe(config: Path | None, profile: Profile, flags: dict[str, Any]) -> Broker:
    production = profile is not Profile.LOOPBACK
    if config is None:
        broker = describe(flags, production=production)
    else:
        # Once for a sentence that names the file, once more with the flags.
        read_values = read_description(config, production=production).model_dump(exclude_unset=True)
        broker = describe(read_values | flags, production=production)
    return broker if broker.port else broker.model_copy(update={"port": LOOPBACK_PORT})


def _version() -> MosquittoVersion:
    try:
        return installed_version(find_mosquitto())
    except BrokerMissing:
        return MosquittoVersion.V2_0
