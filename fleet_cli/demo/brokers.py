"""Broker of the demo: which one runs, where, and how each participant gets in."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from broker_config.broker import Broker, BrokerMissing
from broker_config.processes import EmbeddedBroker, LocalBroker, MosquittoProcess, ThrowAwayBroker, find_mosquitto
from fleet_cli.broker.init import make_local_broker
from fleet_cli.errors import CommandError

_ANY_PORT: Final = 8883  # what the folder describes; the demo's broker runs on a free one


@dataclass(frozen=True, slots=True)
class Place:
    """Where the broker is.

    Attributes:
        name: For the report.
        host: Name or address.
        port: TCP port.
        credentials: Command-line arguments with which a participant of that name gets in.
        lives: Whether it still runs; a broker that was there before is not ours to watch.
        ports: Those of participants that have another one, by name.
    """

    name: str
    host: str
    port: int
    credentials: Callable[[str], Sequence[str]] = lambda _name: ()
    lives: Callable[[], bool] = lambda: True
    ports: Mapping[str, int] = field(default_factory=dict)

    def arguments(self, participant: str) -> list[str]:
        """Return what a participant's command line needs to reach the broker."""
        return [
            "--host",
            self.host,
            "--port",
            str(self.ports.get(participant, self.port)),
            *self.credentials(participant),
        ]


@contextmanager
def demo_broker(wanted: str, *, tls: bool, fleet: str, edge: str, devices: Sequence[str]) -> Iterator[Place]:
    """Start the broker that is wanted, if it is not there already.

    Raises:
        CommandError: There is no such broker, or not with TLS.
        BrokerError: It does not start.
    """
    host, colon, port = wanted.rpartition(":")
    if tls:
        if wanted not in ("auto", "mosquitto"):
            raise CommandError("--tls makes identities for a mosquitto of its own; leave --broker out.")
        with _over_tls(fleet, edge, devices) as place:
            yield place
    elif colon:
        if not port.isdigit() or not host:
            raise CommandError(f"--broker {wanted} is not an address; write HOST:PORT, e.g. 127.0.0.1:1883.")
        yield Place(wanted, host, int(port))
    else:
        name, runner = _plain(wanted, Broker(fleet=fleet, edges=(edge,)))
        with runner:
            yield Place(f"{name} {runner.host}:{runner.port}", runner.host, runner.port, lives=lambda: runner.running)


@contextmanager
def _over_tls(fleet: str, edge: str, devices: Sequence[str]) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="fleet-tls-") as folder:
        home = Path(folder) / "broker"
        make_local_broker(home, fleet=fleet, edges=(edge,), devices=devices, port=_ANY_PORT)
        with LocalBroker(home, port=0) as broker:

            def credentials(name: str) -> Sequence[str]:
                files = broker.identity(name)
                return ["--ca", str(files.ca), "--certificate", str(files.certificate), "--key", str(files.key)]

            where = f"mosquitto {broker.host}:{broker.port} (mutual TLS)"
            yield Place(where, broker.host, broker.port, credentials, lambda: broker.running, {edge: broker.edge_port})


def _plain(wanted: str, description: Broker) -> tuple[str, ThrowAwayBroker]:
    if wanted == "mosquitto" or (wanted == "auto" and _has_mosquitto()):
        return "mosquitto", MosquittoProcess(description)
    if wanted in ("auto", "embedded"):
        return "embedded rumqttd", EmbeddedBroker(description)
    raise CommandError(f"--broker {wanted} is not known; write auto, embedded, mosquitto or HOST:PORT.")


def _has_mosquitto() -> bool:
    try:
        find_mosquitto()
    except BrokerMissing:
        return False
    return True
