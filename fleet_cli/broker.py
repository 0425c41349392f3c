"""Command group `fleet broker`: the broker's configuration and the fleet's identities."""

import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError

from broker_config.broker import Broker, BrokerMissing, describe, read_description
from broker_config.checks.check import check_directory
from broker_config.files import Profile, render_files, write_files
from broker_config.monitoring import BrokerFigures
from broker_config.mosquitto import CONF_FILE, MosquittoVersion, installed_version
from broker_config.processes import IDENTITIES, find_mosquitto, identity_files
from broker_config.site import SETTINGS, make_local_broker, settings_file
from fleet_cli import identities
from fleet_cli.commands import program
from fleet_cli.errors import CommandError
from fleet_cli.options import Interruption, run_checks
from fleet_common.identity.certificates import probe_name
from fleet_common.metrics import MetricsSettings, require_library
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.validation import field_at, plain_sentence

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

_LOOPBACK_PORT: Final = 1883
_HOME: Final = Path("/etc/mosquitto/fleet")
_START_S: Final = 15.0
_POLL_S: Final = 0.5


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


def broker_settings(**given: object) -> BrokerSettings:
    try:
        return BrokerSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"--{name}: " for name in field_at(BrokerSettings, first))
        why = plain_sentence(first).replace("'broker.", "'--")  # here they are options
        raise CommandError(f"These options cannot be used: {where}{why}.") from error


@app.command("metrics")
def metrics_command(
    *,
    host: Annotated[str, typer.Option(help="Broker's host.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Broker's port.")] = 8883,
    name: Annotated[str, typer.Option(help="Name of this monitor; no other program may use it.")] = "monitor",
    ca: Annotated[Path | None, typer.Option(help="Certificate of the broker's authority (PEM).")] = None,
    certificate: Annotated[Path | None, typer.Option(help="The monitor's certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    listen: Annotated[str, typer.Option(help="Address and port of /metrics.")] = "127.0.0.1:9465",
    token_file: Annotated[Path | None, typer.Option(help="File with the bearer token; needed beyond loopback.")] = None,
) -> None:
    """Serve the figures that mosquitto publishes below $SYS as metrics for Prometheus, until interrupted.

    Only a monitor may read them: they describe the whole broker.
    """
    try:
        settings = MetricsSettings(listen=listen, token_file=token_file)
    except ValidationError as error:
        sentence = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise CommandError(f"--listen: {sentence.replace('metrics.token_file', '--token-file')}.") from error
    if settings.address is None:
        raise CommandError("--listen: give an address and a port, such as 127.0.0.1:9465.")
    require_library()
    from fleet_common.metrics_server import MetricsServer

    broker = broker_settings(host=host, port=port, ca=ca, certificate=certificate, key=key)
    link = PahoLink(broker.link("_broker", name, will=None))
    figures = BrokerFigures(link)
    figures.subscribe()
    server = MetricsServer(settings.address, figures.pages(), token=settings.token())
    interruption = Interruption()
    link.start(timeout_s=_START_S)
    server.start()
    typer.echo(f"The broker's figures are at {server.url}/metrics.", err=True)
    try:
        while not interruption.wait(_POLL_S):
            pass
    finally:
        server.stop()
        link.stop()


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
    typer.echo(f"Prove it with: {shlex.join([program(), 'broker', 'check', str(directory)])}", err=True)


@app.command("check")
def check_command(
    directory: Annotated[Path, typer.Argument(help="Folder written by `fleet broker render` or `init`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Start a broker on the files, with certificates of its own, and verify them; exit code 1 if a check failed."""
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
