"""A fleet with its own authority and a real mosquitto over mutual TLS, for tests."""

import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from broker_config.broker import Broker
from broker_config.files import Profile, render_files
from broker_config.mosquitto import ACCESS_FILE, CONF_FILE
from fleet_common.identity.authority import Authority, create_authority, issue, utc_now
from fleet_common.identity.certificates import IdentityRole, make_request, new_key, save_key
from fleet_common.identity.enforcement import BrokerAccess
from fleet_common.mqtt.link import Will
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings, LinkSettings, TlsSettings
from tests.support.broker_trial import TrialBroker, TrialFiles
from tests.support.brokers import require_mosquitto

FLEET = "home"
HOST = "127.0.0.1"
HOME = Path("/etc/mosquitto/fleet")


@dataclass(slots=True)
class Clock:
    ahead: timedelta = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


def new_authority(folder: Path, clock: Any = utc_now) -> Authority:
    return create_authority(folder, fleet=FLEET, actor="tester", kept=[("north", IdentityRole.EDGE)], clock=clock)


def of_server(folder: Path, host: str = HOST) -> tuple[Path, Path]:
    """Return a server's certificate and key in one file, and the authority's certificate."""
    issued = issue(new_authority(folder / "ca"), "server", role=IdentityRole.BROKER, folder=folder, hosts=[host])
    both = folder / "both.pem"
    both.write_bytes(issued.certificate.read_bytes() + issued.key.read_bytes())
    return both, issued.ca


def enrol(authority: Authority, name: str, folder: Path, role: IdentityRole = IdentityRole.DEVICE) -> TlsSettings:
    """Enroll as device and operator do, in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    key = new_key()
    files = TlsSettings(authority.folder.certificate, folder / f"{name}.pem", folder / f"{name}.key")
    assert files.key is not None
    assert files.certificate is not None
    save_key(files.key, key)
    entry = authority.sign(x509.load_pem_x509_csr(make_request(key, name)), name=name, role=role)
    files.certificate.write_text(entry.pem)
    return files


@dataclass(slots=True)
class TlsFleet:
    folder: Path
    authority: Authority
    broker: TrialBroker
    access: BrokerAccess
    stack: ExitStack = field(default_factory=ExitStack)

    def enrol(self, name: str, role: IdentityRole = IdentityRole.DEVICE) -> TlsSettings:
        return enrol(self.authority, name, self.folder / "identities", role)

    def link(self, tls: TlsSettings, client_id: str, *, port: int | None = None, will: Will | None = None) -> PahoLink:
        """Return a link that is not started; it is stopped at the end."""
        settings = LinkSettings(
            client_id=client_id,
            host=HOST,
            port=port or self.broker.port,
            tls=tls,
            will=will,
            min_backoff_s=0.02,
            max_backoff_s=0.1,
        )
        link = PahoLink(settings, rng=random.Random(1))
        self.stack.callback(link.stop)
        return link

    def settings(self, tls: TlsSettings) -> BrokerSettings:
        return BrokerSettings(host=HOST, port=self.broker.port, ca=tls.ca, certificate=tls.certificate, key=tls.key)


@contextmanager
def tls_fleet(folder: Path, **description: Any) -> Iterator[TlsFleet]:
    require_mosquitto()
    authority = new_authority(folder / "ca")
    broker = Broker.production(fleet=FLEET, **description)
    texts = {file.name: file.text for file in render_files(broker, Profile.PRODUCTION, home=HOME)}
    certificates = folder / "broker"
    made = issue(authority, "broker", role=IdentityRole.BROKER, hosts=[HOST], folder=certificates)
    assert made.key.name == "broker.key"
    shutil.copyfile(authority.folder.revocation_list, certificates / "crl.pem")
    with TrialBroker(TrialFiles(texts[CONF_FILE], texts[ACCESS_FILE], certificates), broker) as process:
        assert process._process is not None
        assert process._directory is not None
        pid_file = folder / "broker.pid"
        pid_file.write_text(str(process._process.pid))
        crl = process._directory / "crl.pem"
        access = BrokerAccess(host=HOST, port=process.edge_port, crl=crl, pid_file=pid_file)
        with ExitStack() as stack:
            yield TlsFleet(folder, authority, process, access, stack)
