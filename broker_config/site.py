"""Site on this machine: a folder with authority, certificates, broker configuration and settings."""

import getpass
import os
import resource
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from broker_config.broker import Broker, BrokerError, describe, toml_lines
from broker_config.files import (
    DROP_IN_FILE,
    RULES_FILE,
    SPARE_DESCRIPTORS,
    UNIT_FILE,
    Profile,
    render_files,
    write_files,
)
from broker_config.mosquitto import installed_version
from broker_config.processes import IDENTITIES, find_mosquitto, identity_files
from fleet_common.identity.authority import create_authority, issue
from fleet_common.identity.certificates import (
    IdentityRole,
    check_identity_name,
)
from fleet_common.identity.enforcement import BrokerAccess
from fleet_common.identity.files import PUBLIC, make_folder, write_atomically
from schemas.names import is_probe, probe_name

AUTHORITY: Final = Path("authority")
BROKER_NAME: Final = "broker"
PID_FILE: Final = Path("mosquitto.pid")
STORAGE: Final = Path("retained")
SETTINGS: Final = Path("settings")
SETTINGS_KEY: Final = {IdentityRole.EDGE: "edge", IdentityRole.DEVICE: "device"}  # under which a name is set
HOSTS: Final = ("localhost", "127.0.0.1")


def make_local_broker(
    directory: Path,
    *,
    fleet: str,
    edges: Sequence[str],
    devices: Sequence[str],
    port: int,
    edge_port: int | None = None,
) -> Broker:
    """Make the folder of a local broker, which must be empty or missing; raise BrokerError or IdentityError.

    Each edge gets a probe, the device as which `fleet edge selftest` connects. Edges and monitors have a port to
    themselves: `edge_port`, or the one after `port`.
    """
    version = installed_version(find_mosquitto())
    broker = _description(fleet, edges, port, port + 1 if edge_port is None else edge_port)
    roles = [(name, IdentityRole.EDGE) for name in broker.edges]
    roles += [(name, IdentityRole.MONITOR) for name in broker.monitors]
    roles += [(name, IdentityRole.DEVICE) for name in (*map(probe_name, broker.edges), *devices)]
    for name, role in roles:  # before anything is made
        check_identity_name(name, role)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BrokerError(f"There is something in {directory} already: name a folder that is empty or not there.")
    make_folder(directory)
    directory = directory.resolve()
    authority = create_authority(directory / AUTHORITY, fleet=broker.fleet, actor=getpass.getuser(), kept=roles)
    hosts = tuple(dict.fromkeys((*HOSTS, socket.gethostname())))
    issue(authority, BROKER_NAME, role=IdentityRole.BROKER, folder=directory, hosts=hosts)
    for name, role in roles:
        issue(authority, name, role=role, folder=directory / IDENTITIES)
    for name, role in roles:
        if role in SETTINGS_KEY and not is_probe(name):  # a self-test takes the settings of its edge
            _write_settings(directory, broker, name, role)
    # The port that devices cannot fill: a revocation must get through.
    access = BrokerAccess(host=HOSTS[0], port=broker.edge_port, pid_file=directory / PID_FILE)
    access.save(authority.folder.broker)
    make_folder(directory / STORAGE)
    rendered = render_files(broker, Profile.PRODUCTION, home=directory, version=version)
    # It runs in a terminal on loopback, not as a service for others.
    left_out = (DROP_IN_FILE, UNIT_FILE, RULES_FILE)
    write_files([file for file in rendered if file.name not in left_out], directory)
    return broker


def _description(fleet: str, edges: Sequence[str], port: int, edge_port: int) -> Broker:
    return describe(
        {
            "fleet": fleet,
            "edges": tuple(edges),
            "monitors": ("monitor", "dashboard"),  # an operator's commands, and pages that steer
            "host": "127.0.0.1",
            "port": port,
            "edge_port": edge_port,
            "janitor": None,  # it is for services
            "tls": {
                "ca": AUTHORITY / "ca.pem",
                "crl": AUTHORITY / "crl.pem",
                "certificate": "broker.pem",
                "key": "broker.key",
            },
            "max_connections": _connections(),
            "storage": STORAGE,
            "pid_file": PID_FILE,
            # The user who made the files runs it, also root: no other user can read them.
            "user": "root" if os.geteuid() == 0 else None,
        },
        production=True,
    )


def _connections() -> int:
    """Return how many connections leave a broker on this machine enough descriptors for its edges."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    usual = Broker.production()
    if soft == resource.RLIM_INFINITY:
        return usual.max_connections
    return max(1, min(usual.max_connections, soft - usual.max_edge_connections - SPARE_DESCRIPTORS))


def _write_settings(directory: Path, broker: Broker, name: str, role: IdentityRole) -> None:
    assert broker.tls is not None
    files = identity_files(directory, broker.tls, name)
    connection = {
        "host": HOSTS[0],
        "port": broker.port_of(name),
        "ca": str(files.ca),
        "certificate": str(files.certificate),
        "key": str(files.key),
    }
    lines = toml_lines({"fleet": broker.fleet, SETTINGS_KEY[role]: name, "broker": connection})
    path = settings_file(directory, name)
    make_folder(path.parent)
    write_atomically(path, ("\n".join(lines) + "\n").encode(), mode=PUBLIC)


def settings_file(directory: Path, name: str) -> Path:
    return directory / SETTINGS / f"{name}.toml"
