"""Command group `fleet broker`: the broker's configuration and the fleet's identities."""

import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from broker_config.broker import Broker, BrokerMissing, describe, read_description
from broker_config.check import check_directory
from broker_config.files import Profile, render_files, write_files
from broker_config.mosquitto import CONF_FILE, MosquittoVersion, installed_version
from broker_config.processes import IDENTITIES, find_mosquitto, identity_files
from broker_config.site import SETTINGS, make_local_broker, settings_file
from fleet_cli import identities
from fleet_cli.commands import program
from fleet_cli.options import run_checks
from schemas.names import probe_name

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

_LOOPBACK_PORT: Final = 1883
_HOME: Final = Path("/etc/mosquitto/fleet")


@app.command("render")
def render_command(
    out: Annotated[Path, typer.Option(help="Folder to write to; created if missing.", file_okay=False)],
    profile: Annotated[Profile, typer.Option(help="Where the broker runs.")] = Profile.PRODUCTION,
    config: Annotated[
        Path | None, typer.Option(help="Description of the broker (TOML); every value has a default.")
    ] = None,
    fleet: Annotated[str | None, typer.Option(help="Fleet's name.")] = None,
    edge: Annotated[list[str] | None, typer.Option(help="Name of an edge; repeatable.")] = None,
    monitor: Annotated[list[str] | None, typer.Option(help="Name of a monitor; repeatable.")] = None,
    home: Annotated[
        Path | None, typer.Option(help=f"Folder of the files on the broker's machine; by default {_HOME}.")
    ] = None,
    mosquitto: Annotated[
        MosquittoVersion | None, typer.Option(help="Mosquitto version there; by default this machine's, or else 2.0.")
    ] = None,
) -> None:
    """Write mosquitto's configuration, access rules, firewall and systemd units."""
    flags = {"fleet": fleet, "edges": edge or None, "monitors": monitor or None}
    given = {key: value for key, value in flags.items() if value is not None}
    broker = _describe(config, profile, given)
    if home is None:
        # A broker for this machine runs where its files were written.
        home = out.resolve() if profile is Profile.LOOPBACK else _HOME
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
        # Once for an error message that names the file, and again with the flags.
        read_values = read_description(config, production=production).model_dump(exclude_unset=True)
        broker = describe(read_values | flags, production=production)
    return broker if broker.port else broker.model_copy(update={"port": _LOOPBACK_PORT})


def _version() -> MosquittoVersion:
    try:
        return installed_version(find_mosquitto())
    except BrokerMissing:
        return MosquittoVersion.V2_0


@app.command("init")
def init_command(
    directory: Annotated[Path, typer.Argument(help="Folder to create; must be missing or empty.", file_okay=False)],
    fleet: Annotated[str, typer.Option(help="Fleet's name.")] = "home",
    edge: Annotated[list[str] | None, typer.Option(help="Name of an edge; repeatable.")] = None,
    devices: Annotated[int, typer.Option(min=0, max=1000, help="Number of devices: device-1, device-2, …")] = 3,
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8883,
    edge_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Separate TCP port for edges; by default the next port.")
    ] = None,
) -> None:
    """Create a broker configuration with certificates, and print how to run it.

    It makes the keys of all identities. That is fine for a trial; real devices make their own keys with
    `fleet device enroll`.
    """
    names = [f"device-{number}" for number in range(1, devices + 1)]
    broker = make_local_broker(
        directory, fleet=fleet, edges=edge or ["edge-1"], devices=names, port=port, edge_port=edge_port
    )
    directory = directory.resolve()
    typer.echo(f"Made a broker for the fleet {broker.fleet} in {directory}. Run it and an edge, each in a terminal:\n")
    for command in _services(directory, broker):
        typer.echo(f"    {shlex.join(command)}")
    typer.echo(
        "\nThen have the edge checked and a text written, look for what is wrong, or talk with the large model:\n"
    )
    for command in _trials(directory, broker, names):
        typer.echo(f"    {shlex.join(command)}")
    typer.echo(f"\nSettings of all edges and devices are in {directory / SETTINGS}, keys in {directory / IDENTITIES}.")


@app.command("check")
def check_command(
    directory: Annotated[Path, typer.Argument(help="Folder written by `fleet broker render` or `init`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check who may read the files, and that certificates and keys go together; exit code 1 if a check failed."""
    run_checks(partial(check_directory, directory), as_json=as_json)


def _services(directory: Path, broker: Broker) -> Iterator[list[str]]:
    yield [str(find_mosquitto()), "-c", str(directory / CONF_FILE)]
    yield [program(), "edge", "run", "--config", str(settings_file(directory, broker.edges[0]))]


def _trials(directory: Path, broker: Broker, devices: Sequence[str]) -> Iterator[list[str]]:
    assert broker.tls is not None
    edge = broker.edges[0]
    probe = identity_files(directory, broker.tls, probe_name(edge))
    files = ["--certificate", str(probe.certificate), "--key", str(probe.key)]
    yield [program(), "edge", "selftest", "--config", str(settings_file(directory, edge)), *files]
    for name in devices[:1]:
        config = str(settings_file(directory, name))
        yield [program(), "device", "generate", "--config", config, "Why is the sky blue?"]
        yield [program(), "device", "doctor", "--config", config]
        yield [program(), "device", "chat", "--config", config]


identities.register(app)
