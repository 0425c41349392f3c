"""`fleet broker init`: a broker with certificates on this machine, with one command, for trying."""

import getpass
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from cryptography import x509

from broker_config.broker import Broker
from broker_config.description import describe
from broker_config.files import Profile, render_files, write_files
from broker_config.local import IDENTITIES, identity_files
from broker_config.runner import find_mosquitto
from broker_config.systemd import DROP_IN_FILE
from broker_config.version import installed_version
from fleet_cli.errors import CommandError
from fleet_identity.authority import Authority, create_authority
from fleet_identity.broker_access import BrokerAccess
from fleet_identity.files import PUBLIC, make_folder, write_atomically
from fleet_identity.keys import new_key, save_key
from fleet_identity.requests import make_request
from fleet_identity.roles import IdentityRole, check_identity_name

__all__ = ["make_local_broker", "register"]

AUTHORITY: Final = Path("authority")
BROKER_NAME: Final = "broker"
PID_FILE: Final = Path("mosquitto.pid")
STORAGE: Final = Path("retained")
HOSTS: Final = ("localhost", "127.0.0.1")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("init")(init_command)


def init_command(
    directory: Annotated[Path, typer.Argument(help="Folder to make; must be empty or not there.", file_okay=False)],
    fleet: Annotated[str, typer.Option(help="Fleet's name.")] = "home",
    edge: Annotated[list[str] | None, typer.Option(help="Name of an edge; may be repeated.")] = None,
    devices: Annotated[int, typer.Option(min=0, max=1000, help="Number of devices: device-1, device-2, …")] = 3,
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8883,
) -> None:
    """Make a working broker with certificates on this machine, and say how to run it.

    Every identity's key is made here, which is right for trying and wrong for devices: those make their own keys with
    `fleet device enroll`.
    """
    names = [f"device-{number}" for number in range(1, devices + 1)]
    broker = make_local_broker(directory, fleet=fleet, edges=edge or ["edge-1"], devices=names, port=port)
    directory = directory.resolve()
    typer.echo(f"Made a broker for the fleet {broker.fleet} in {directory}. Run it with:\n")
    typer.echo(f"    {find_mosquitto()} -c {directory / 'mosquitto.conf'}\n")
    for command, name in (("edge", broker.edges[0]), *(("device", name) for name in names[:1])):
        typer.echo(f"Settings of {name} (a TOML file for `fleet {command} run --config`):\n")
        typer.echo(f"{_settings(directory, broker, command, name)}\n")
    if names[1:]:
        typer.echo(f"The others' files are in {directory / IDENTITIES} under their own names.")
    typer.echo(f"Try it with `fleet broker check {directory}`; revoke with `fleet broker revoke`.", err=True)


def make_local_broker(
    directory: Path, *, fleet: str, edges: Sequence[str], devices: Sequence[str], port: int
) -> Broker:
    """Make the folder: authority, certificates, configuration. `broker_config.local.LocalBroker` runs it.

    Args:
        directory: Must be empty or not there.
        fleet: The fleet's name.
        edges: Names of the edges.
        devices: Names of the devices.
        port: Where it will listen.

    Raises:
        CommandError: Something is there already.
        BrokerError: mosquitto is not installed, the description cannot work, or a file cannot be written.
        IdentityError: A name is reserved or malformed, or a file cannot be written.
    """
    version = installed_version(find_mosquitto())
    broker = _description(fleet, edges, port)
    roles = [(name, IdentityRole.EDGE) for name in broker.edges]
    roles += [(name, IdentityRole.MONITOR) for name in broker.monitors]
    roles += [(name, IdentityRole.DEVICE) for name in devices]
    for name, role in roles:  # before anything is made
        check_identity_name(name, role)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CommandError(f"There is something in {directory} already: name a folder that is empty or not there.")
    make_folder(directory)
    directory = directory.resolve()
    authority = create_authority(directory / AUTHORITY, fleet=broker.fleet, actor=getpass.getuser(), kept=roles)
    assert broker.tls is not None
    _issue(authority, BROKER_NAME, IdentityRole.BROKER, directory / broker.tls.certificate, directory / broker.tls.key)
    for name, role in roles:
        files = identity_files(directory, broker.tls, name)
        _issue(authority, name, role, files.certificate, files.key)
    access = BrokerAccess(host=HOSTS[0], port=port, pid_file=directory / PID_FILE)
    access.save(authority.folder.broker)
    make_folder(directory / STORAGE)
    rendered = render_files(broker, Profile.PRODUCTION, home=directory, version=version)
    # It runs in a terminal, not as a service.
    write_files([file for file in rendered if file.name != DROP_IN_FILE], directory)
    return broker


def _description(fleet: str, edges: Sequence[str], port: int) -> Broker:
    return describe(
        {
            "fleet": fleet,
            "edges": tuple(edges),
            "host": "127.0.0.1",
            "port": port,
            "tls": {
                "ca": AUTHORITY / "ca.pem",
                "crl": AUTHORITY / "crl.pem",
                "certificate": "broker.pem",
                "key": "broker.key",
            },
            "storage": STORAGE,
            "pid_file": PID_FILE,
            # Whoever made the files runs it, root too: no other user can read them.
            "user": "root" if os.geteuid() == 0 else None,
        },
        production=True,
    )


def _issue(authority: Authority, name: str, role: IdentityRole, certificate: Path, key_file: Path) -> None:
    hosts = tuple(dict.fromkeys((*HOSTS, socket.gethostname()))) if role is IdentityRole.BROKER else ()
    key = new_key()
    request = x509.load_pem_x509_csr(make_request(key, name))
    entry = authority.sign(request, name=name, role=role, hosts=hosts)
    make_folder(key_file.parent)
    save_key(key_file, key)
    write_atomically(certificate, entry.pem.encode(), mode=PUBLIC)


def _settings(directory: Path, broker: Broker, command: str, name: str) -> str:
    assert broker.tls is not None
    files = identity_files(directory, broker.tls, name)
    lines = [
        f'fleet = "{broker.fleet}"',
        f'{command} = "{name}"',
        "",
        "[broker]",
        f'host = "{HOSTS[0]}"',
        f"port = {broker.port}",
        f'ca = "{files.ca}"',
        f'certificate = "{files.certificate}"',
        f'key = "{files.key}"',
    ]
    return "\n".join(f"    {line}".rstrip() for line in lines)
